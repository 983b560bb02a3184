"""Busy polling: what comes soon is seen at once, and what does not costs next to nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct import busy_polling
from deconvd.direct.busy_polling import BusyPolling
from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import ConnectionClosedError, ConnectionTimeoutError
from deconvd.direct.events import ProgressReport
from deconvd_server.transports.direct.last_caller import LastCaller
from tests.processes import processor_s
from tests.servers import server_process
from tests.stream_pairs import overlapped_streams


class CountedStream(SocketStream):
    """Counts how often it is polled, and notes for how long; does not sleep after that."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.polls_count = 0
        self.timeouts_s: list[float] = []

    def poll(self, timeout_s: float) -> bool:
        """See `ByteStream`."""
        self.polls_count += 1
        self.timeouts_s.append(timeout_s)
        return super().poll(timeout_s)

    def wait(self) -> None:
        """See `ByteStream`: here it returns at once."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SocketStream, CountedStream]]:
    monkeypatch.setattr(busy_polling, "_HAS_SEVERAL_PROCESSORS", True)
    one, other = socket.socketpair()
    with closing(SocketStream(one)) as near, closing(CountedStream(other)) as far:
        yield near, far


def yes() -> bool:
    return True


def taken(stream: SocketStream) -> bytes:
    """Return what has come."""
    space = bytearray(100)
    return bytes(space[: stream.read_into(memoryview(space))])


def is_polled(polling: BusyPolling, stream: CountedStream) -> bool:
    """Wait, and return whether the stream was polled meanwhile."""
    before_count = stream.polls_count
    polling.wait(stream, yes)
    return stream.polls_count > before_count


def test_what_comes_ends_the_wait(ends: tuple[SocketStream, CountedStream]) -> None:
    near, far = ends
    polling = BusyPolling(1000)
    for _ in range(3):
        later = threading.Timer(0.02, near.write, [b"abc"])
        later.start()
        assert is_polled(polling, far)
        assert taken(far) == b"abc"
        later.join()


def test_what_does_not_come_is_polled_for_ever_more_seldom(
    ends: tuple[SocketStream, CountedStream],
) -> None:
    _, far = ends
    polling = BusyPolling(0.01)
    assert [n for n in range(12) if is_polled(polling, far)] == [0, 2, 6]


def test_it_begins_shortly_before_what_is_waited_for_usually_comes(
    ends: tuple[SocketStream, CountedStream],
) -> None:
    near, far = ends
    polling = BusyPolling(1000, lead_s=0.05)
    slept_s = []
    for _ in range(4):
        later = threading.Timer(0.3, near.write, [b"a"])
        later.start()
        far.timeouts_s.clear()
        polling.wait(far, yes)
        assert taken(far) == b"a"
        slept_s.append(sum(far.timeouts_s))
        later.join()
    assert slept_s[0] == 0
    assert 0 < slept_s[1] < slept_s[3]


def test_what_comes_sooner_than_usual_is_seen_at_once(
    ends: tuple[SocketStream, CountedStream],
) -> None:
    near, far = ends
    polling = BusyPolling(0.3, lead_s=0.1)
    polling.wait(far, yes)  # in vain: it takes at least that long
    assert not is_polled(polling, far)
    near.write(b"a")
    far.timeouts_s.clear()
    polling.wait(far, yes)
    (slept_s,) = far.timeouts_s
    assert slept_s > 0


def test_it_is_left_off_once_it_is_not_worth_it(ends: tuple[SocketStream, CountedStream]) -> None:
    _, far = ends
    answers = iter([True, True, True, False])
    BusyPolling(1000).wait(far, lambda: next(answers))
    assert next(answers, None) is None
    assert far.polls_count == 2


@pytest.mark.parametrize("longest_s", [1000, 0.01])
def test_whether_or_not_it_is_polled_what_comes_is_waited_for(longest_s: float) -> None:
    one, other = socket.socketpair()
    with closing(SocketStream(one)) as near, closing(SocketStream(other)) as far:
        polling = BusyPolling(longest_s)
        for _ in range(3):
            later = threading.Timer(0.05, near.write, [b"a"])
            later.start()
            polling.wait(far, yes)
            assert far.poll(0)
            assert taken(far) == b"a"
            later.join()


def test_nothing_is_waited_for_beyond_the_deadline() -> None:
    one, other = socket.socketpair()
    with closing(SocketStream(one)), closing(SocketStream(other)) as far:
        far.set_deadline(0.05)
        with pytest.raises(ConnectionTimeoutError):
            BusyPolling(0.01).wait(far, yes)


def test_the_end_of_a_stream_is_seen(ends: tuple[SocketStream, CountedStream]) -> None:
    near, far = ends
    near.close()
    BusyPolling(1000).wait(far, yes)
    assert far.polls_count == 1
    with pytest.raises(ConnectionClosedError):
        taken(far)


def test_what_a_line_has_read_ahead_is_not_waited_for() -> None:
    with overlapped_streams() as (client, server):
        for size_bytes in (1, 2):
            client.send(ProgressReport(size_bytes))
        assert server.next_event() == ProgressReport(1)
        assert not server._stream.poll(0)  # the other came with it
        BusyPolling(1000).wait(server, yes)
        assert server.next_event() == ProgressReport(2)


def test_with_one_processor_nobody_polls(
    ends: tuple[SocketStream, CountedStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy_polling, "_HAS_SEVERAL_PROCESSORS", False)
    assert not is_polled(BusyPolling(1000), ends[1])


def test_attention_is_undivided_while_one_line_is_called() -> None:
    attention, one, other = LastCaller(), object(), object()
    seen = []
    for line in (one, one, one, other, one, one, other, other):
        attention.note_call(line)
        seen.append((attention.is_sole_caller(one), attention.is_sole_caller(other)))
    nobody, first, second = (False, False), (True, False), (False, True)
    assert seen == [nobody, first, first, nobody, nobody, first, nobody, second]


def test_a_server_that_nobody_calls_takes_no_time(tmp_path: Path) -> None:
    x = W = np.ones((1, 1, 1, 1), np.float32)
    with server_process(tmp_path) as server, deconvd_client.connect(server.target) as F:
        for _ in range(300):
            F.deconvolution_2d(x, W)
        before_s = processor_s(server.process.pid)
        time.sleep(1)
        assert processor_s(server.process.pid) - before_s < 0.3
