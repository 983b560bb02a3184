"""A heartbeat goes on for as long as its loop does, also after a moment without memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from deconvd_server.resources import heartbeat
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.heartbeat import Heartbeat
from deconvd_server.transports.grpc.callers import CallerReader
from deconvd_server.transports.grpc.server import GrpcServer
from tests.processes import wait_until

CallLater = Callable[[float, Callable[[], None]], None]


@contextmanager
def grpc_loop() -> Iterator[CallLater]:
    server = GrpcServer(
        {},
        CallerReader(None, takes_certificates=False),
        max_message_bytes=1 << 20,
        arriving_bytes=1 << 20,
        connections_count=1,
        on_lost=lambda: pytest.fail("the thread has ended"),
    )
    server.start()
    yield server.call_later
    server.stop_accepting()
    server.join()


@contextmanager
def accept_loop() -> Iterator[CallLater]:
    listener = Listener("those of the test", [], [], lambda *_: None, pytest.fail)
    thread = threading.Thread(target=listener.run)
    thread.start()
    yield lambda delay_s, work: listener.call_soon(lambda: listener.call_later(delay_s, work))
    listener.stop()
    thread.join()
    listener.close()


@pytest.mark.parametrize("running_loop", [grpc_loop, accept_loop])
def test_a_heartbeat_survives_a_moment_without_memory(
    running_loop: Callable[[], AbstractContextManager[CallLater]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_PERIOD_S", 0.01)
    beats_count = 0

    with running_loop() as call_later:

        def call_later_with_luck(delay_s: float, work: Callable[[], None]) -> None:
            nonlocal beats_count
            beats_count += 1
            if beats_count in (2, 3):
                raise MemoryError
            call_later(delay_s, work)

        Heartbeat(call_later_with_luck)
        wait_until(lambda: beats_count > 5)
