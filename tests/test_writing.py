"""How far a client has come with writing an operand: heard in time, and waited for no longer, whatever it says."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from deconvd.direct_events import FrameKind, frame
from deconvd.errors import DeadlineError, UnavailableError
from deconvd.line import Line, tell_written
from deconvd_server import writing
from deconvd_server.call import Call
from deconvd_server.device.arriving import Following, LateError, wait_for
from deconvd_server.writing import Writing
from tests.devices import arriving
from tests.line_pairs import descriptor_of, early_ends


@pytest.fixture
def ends() -> Iterator[tuple[Line, Line]]:
    with early_ends() as (near, far):
        yield near, far


_CHATTER = """
import os, sys
frames = bytes.fromhex(sys.argv[2]) * 4096
while True:
    os.write(int(sys.argv[1]), frames)
"""


@pytest.fixture
def chatterer(ends: tuple[Line, Line]) -> Iterator[Writing]:
    """What is heard of a client that says the same again and again, faster than it can be heard."""
    near, far = ends
    told = frame(FrameKind.WRITTEN, (1).to_bytes(8, "little"))
    descriptor = descriptor_of(near)
    arguments = [str(descriptor), told.hex()]
    with subprocess.Popen(
        [sys.executable, "-c", _CHATTER, *arguments], pass_fds=[descriptor]
    ) as process:
        assert far.has_come(30)
        yield Writing(far)
        process.kill()


TWO = np.zeros(2, np.uint8)


def test_what_was_said_is_known_without_waiting(ends: tuple[Line, Line]) -> None:
    near, far = ends
    heard = Writing(far)
    assert not heard.wait_for(1, 0)
    for size_bytes in (10, 20, 30):
        tell_written(near, size_bytes)
    assert heard.wait_for(30, 0)
    assert not heard.wait_for(31, 0)


def test_nothing_is_waited_for_where_nothing_is_needed(ends: tuple[Line, Line]) -> None:
    assert Writing(ends[1]).wait_for(0, 0)


def test_what_was_written_before_is_there() -> None:
    with early_ends() as (_, far):
        heard = Writing(far, 10)
        assert heard.wait_for(10, 0)
        assert not heard.wait_for(11, 0)


def test_what_is_said_in_time_is_waited_for(ends: tuple[Line, Line]) -> None:
    near, far = ends
    heard = Writing(far)
    later = threading.Timer(0.02, tell_written, [near, 7])
    later.start()
    assert heard.wait_for(7, 30)
    later.join()


def test_who_says_the_same_again_and_again_keeps_no_device(chatterer: Writing) -> None:
    (operand,) = operands = arriving(chatterer, TWO)
    assert not operand.is_there()  # and it is not waited for whether that is all
    with pytest.raises(LateError):
        Following(operands).expect(operand, 2)


def test_who_says_the_same_again_and_again_has_its_deadline(chatterer: Writing) -> None:
    (operand,) = arriving(chatterer, TWO)
    with pytest.raises(DeadlineError):
        wait_for(operand, Call(timeout_s=0.1))


def test_who_says_the_same_again_and_again_is_heard_a_millisecond_longer_than_there_is_time(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000, 1e-4)

    def hear_the_same(_: Line, timeout_s: float) -> int:
        assert timeout_s > -1e-3
        return 1

    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(writing, "hear_written", hear_the_same)
    heard = Writing(ends[1], 1)

    assert not heard.wait_for(2, 5e-3)
    assert next(clock) - 1000 == pytest.approx(6e-3, abs=5e-4)


def test_who_writes_nothing_for_long_is_waited_for_no_longer(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    now_s = 1000.0
    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=lambda: now_s))
    heard = Writing(far)
    tell_written(near, 5)
    now_s += 25
    assert not heard.wait_for(6, 0)
    now_s += 29
    tell_written(near, 5)  # which is no progress
    assert not heard.wait_for(6, 0)

    now_s += 2
    message = "written nothing of the call's operands for 30 s: 5 bytes are there"
    with pytest.raises(UnavailableError, match=message) as raised:
        heard.wait_for(6, 0)
    assert raised.value.retry_after_s == 0.1


def test_it_says_since_when_its_client_is_waited_for(ends: tuple[Line, Line]) -> None:
    near, far = ends
    begun_s = time.monotonic()
    heard = Writing(far)
    assert heard.waits_since_s == math.inf

    assert not heard.wait_for(2, 0.01)
    since_s = heard.waits_since_s
    assert begun_s <= since_s < time.monotonic()
    assert not heard.wait_for(2, 0.01)
    assert heard.waits_since_s == since_s  # nothing has come

    tell_written(near, 1)
    assert not heard.wait_for(2, 1)
    assert heard.waits_since_s > since_s
    tell_written(near, 2)
    assert heard.wait_for(2, 30)
    assert heard.waits_since_s == math.inf
