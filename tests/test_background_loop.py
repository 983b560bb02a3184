"""A loop in the background works when it should, sleeps else, and ends with its owner."""

from __future__ import annotations

import logging
import threading
import weakref

import pytest

from deconvd_client.server_set import background_loop
from deconvd_client.server_set.background_loop import BackgroundLoop
from tests.processes import wait_until

ASLEEP_S = 3600.0


class Owner:
    """Works in a loop, with pauses as given, and then sleeps."""

    def __init__(self, *pauses_s: float) -> None:
        self.pauses_s = list(pauses_s)
        self.threads: list[threading.Thread] = []
        self.loop = BackgroundLoop(self.work)

    def work(self) -> float:
        self.threads.append(threading.current_thread())
        return self.pauses_s.pop(0) if self.pauses_s else ASLEEP_S


def test_it_works_until_there_is_nothing_to_do_and_again_when_it_is_woken() -> None:
    owner = Owner(0.0, 0.01, 0.0)
    assert owner.loop.is_asleep

    owner.loop.wake()
    wait_until(lambda: len(owner.threads) == 4 and owner.loop.is_asleep)
    owner.loop.wake()
    wait_until(lambda: len(owner.threads) == 5)

    assert len(set(owner.threads)) == 1
    assert owner.threads[0] is not threading.current_thread()
    owner.loop.close()


def test_it_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background_loop, "_ERROR_PAUSE_S", 0.0)
    outcomes = iter([ValueError("oops")])

    def fail_once() -> None:
        for error in outcomes:
            raise error

    class Failing(Owner):
        def work(self) -> float:
            pause_s = super().work()
            fail_once()
            return pause_s

    owner = Failing()
    with caplog.at_level(logging.ERROR):
        owner.loop.wake()
        wait_until(lambda: len(owner.threads) == 2)

    assert "oops" in caplog.text
    owner.loop.close()


def test_it_ends_when_it_is_closed_and_is_not_woken_after_that() -> None:
    owner = Owner()
    owner.loop.wake()
    wait_until(lambda: owner.loop.is_asleep and bool(owner.threads))

    owner.loop.close()
    owner.loop.wake()

    assert owner.loop.is_asleep
    assert len(owner.threads) == 1


def test_it_keeps_no_owner_alive() -> None:
    def wake_one() -> weakref.ref[Owner]:
        owner = Owner()
        owner.loop.wake()
        wait_until(lambda: owner.loop.is_asleep and bool(owner.threads))
        return weakref.ref(owner)

    reference = wake_one()

    wait_until(lambda: reference() is None)
