"""Whose turn to stream it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from deconvd_server.call.context import CallContext
from deconvd_server.engine.admission import Admission
from deconvd_server.service.stream_admission import StreamAdmission
from tests.processes import wait_until

ALL_BYTES = 100
TIMEOUT_S = 30


@pytest.fixture
def admission() -> Admission:
    return Admission(16, ALL_BYTES, 16)


@pytest.fixture
def places(admission: Admission) -> Iterator[StreamAdmission]:
    lost: list[str] = []
    places = StreamAdmission(admission, 16, 16, lost.append)
    yield places
    places.close()
    assert not lost


class Stream(threading.Thread):
    """A stream that takes all the memory from its turn on until it is ended."""

    def __init__(self, places: StreamAdmission, peer: str) -> None:
        super().__init__(daemon=True)
        self._places = places
        self._call = CallContext(TIMEOUT_S, peer_key=peer)
        self.is_running = threading.Event()
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        with self._places.admit(ALL_BYTES, self._call):
            self.is_running.set()
            self.is_over.wait()

    @property
    def has_memory(self) -> bool:
        return self.is_running.is_set() and self.is_alive()


def test_who_waits_for_memory_with_many_streams_keeps_nobody_else_waiting_for_all_of_them(
    places: StreamAdmission, admission: Admission
) -> None:
    many = [Stream(places, "a") for _ in range(10)]
    wait_until(lambda: places.load.running_count == 1 and places.load.waiting_count == 9)
    other = Stream(places, "b")
    wait_until(lambda: places.load.waiting_count == 10)

    for is_other in (False, True):  # at first the one that was in line for the memory already
        wait_until(lambda: admission.load.waiting_count == 1)
        (running,) = [stream for stream in many if stream.has_memory]
        running.is_over.set()
        running.join()
        wait_until(lambda: any(stream.has_memory for stream in [*many, other]))
        assert other.has_memory == is_other

    for stream in [*many, other]:
        stream.is_over.set()
    for stream in [*many, other]:
        stream.join()
