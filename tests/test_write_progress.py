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

from deconvd.direct.events import FrameKind, pack_frame
from deconvd.direct.frame_stream import FrameStream, report_progress
from deconvd.errors import DeadlineError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.device.arriving import ArrivalTimeoutError, OverlappedOperands, wait_for
from deconvd_server.transports.direct import write_progress
from deconvd_server.transports.direct.write_progress import WriteProgress
from tests.devices import make_arriving
from tests.stream_pairs import descriptor_of, overlapped_streams


@pytest.fixture
def ends() -> Iterator[tuple[FrameStream, FrameStream]]:
    with overlapped_streams() as (near, far):
        yield near, far


_CHATTER = """
import os, sys
frames = bytes.fromhex(sys.argv[2]) * 4096
while True:
    os.write(int(sys.argv[1]), frames)
"""


@pytest.fixture
def chatterer(ends: tuple[FrameStream, FrameStream]) -> Iterator[WriteProgress]:
    """What is heard of a client that says the same again and again, faster than it can be heard."""
    near, far = ends
    told = pack_frame(FrameKind.PROGRESS, (1).to_bytes(8, "little"))
    descriptor = descriptor_of(near)
    arguments = [str(descriptor), told.hex()]
    with subprocess.Popen(
        [sys.executable, "-c", _CHATTER, *arguments], pass_fds=[descriptor]
    ) as process:
        assert far.poll(30)
        yield WriteProgress(far)
        process.kill()


TWO = np.zeros(2, np.uint8)


def test_what_was_said_is_known_without_waiting(ends: tuple[FrameStream, FrameStream]) -> None:
    near, far = ends
    heard = WriteProgress(far)
    assert not heard.wait_for(1, 0)
    for size_bytes in (10, 20, 30):
        report_progress(near, size_bytes)
    assert heard.wait_for(30, 0)
    assert not heard.wait_for(31, 0)


def test_nothing_is_waited_for_where_nothing_is_needed(
    ends: tuple[FrameStream, FrameStream],
) -> None:
    assert WriteProgress(ends[1]).wait_for(0, 0)


def test_what_was_written_before_is_there() -> None:
    with overlapped_streams() as (_, far):
        heard = WriteProgress(far, 10)
        assert heard.wait_for(10, 0)
        assert not heard.wait_for(11, 0)


def test_what_is_said_in_time_is_waited_for(ends: tuple[FrameStream, FrameStream]) -> None:
    near, far = ends
    heard = WriteProgress(far)
    later = threading.Timer(0.02, report_progress, [near, 7])
    later.start()
    assert heard.wait_for(7, 30)
    later.join()


def test_who_says_the_same_again_and_again_keeps_no_device(chatterer: WriteProgress) -> None:
    (operand,) = operands = make_arriving(chatterer, TWO)
    assert not operand.has_arrived()  # and it is not waited for whether that is all
    with pytest.raises(ArrivalTimeoutError):
        OverlappedOperands(operands).wait_for(operand, 2)


def test_who_says_the_same_again_and_again_has_its_deadline(chatterer: WriteProgress) -> None:
    (operand,) = make_arriving(chatterer, TWO)
    with pytest.raises(DeadlineError):
        wait_for(operand, CallContext(timeout_s=0.1))


def test_who_says_the_same_again_and_again_is_heard_a_millisecond_longer_than_there_is_time(
    ends: tuple[FrameStream, FrameStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000, 1e-4)

    def hear_the_same(_: FrameStream, timeout_s: float) -> int:
        assert timeout_s > -1e-3
        return 1

    monkeypatch.setattr(write_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(write_progress, "receive_progress", hear_the_same)
    heard = WriteProgress(ends[1], 1)

    assert not heard.wait_for(2, 5e-3)
    assert next(clock) - 1000 == pytest.approx(6e-3, abs=5e-4)


def test_who_writes_nothing_for_long_is_waited_for_no_longer(
    ends: tuple[FrameStream, FrameStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    now_s = 1000.0
    monkeypatch.setattr(write_progress, "time", SimpleNamespace(monotonic=lambda: now_s))
    heard = WriteProgress(far)
    report_progress(near, 5)
    now_s += 25
    assert not heard.wait_for(6, 0)
    now_s += 29
    report_progress(near, 5)  # which is no progress
    assert not heard.wait_for(6, 0)

    now_s += 2
    message = "written nothing of the call's operands for 30 s: 5 bytes are there"
    with pytest.raises(UnavailableError, match=message) as raised:
        heard.wait_for(6, 0)
    assert raised.value.retry_after_s == 0.1


def test_it_says_since_when_its_client_is_waited_for(ends: tuple[FrameStream, FrameStream]) -> None:
    near, far = ends
    begun_s = time.monotonic()
    heard = WriteProgress(far)
    assert heard.blocked_since_s == math.inf

    assert not heard.wait_for(2, 0.01)
    since_s = heard.blocked_since_s
    assert begun_s <= since_s < time.monotonic()
    assert not heard.wait_for(2, 0.01)
    assert heard.blocked_since_s == since_s  # nothing has come

    report_progress(near, 1)
    assert not heard.wait_for(2, 1)
    assert heard.blocked_since_s > since_s
    report_progress(near, 2)
    assert heard.wait_for(2, 30)
    assert heard.blocked_since_s == math.inf
