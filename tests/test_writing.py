"""How far a client has come with writing an operand: heard in time, and waited for no longer, whatever it says."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from deconvd.direct_events import FrameKind, frame
from deconvd.errors import DeadlineError
from deconvd.line import Line, tell_written
from deconvd_server import writing
from deconvd_server.call import Call
from deconvd_server.writing import LateError, Writing
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
        heard = Writing(far)
        heard.total_bytes = 2
        yield heard
        process.kill()


def test_what_was_said_is_known_without_waiting(ends: tuple[Line, Line]) -> None:
    near, far = ends
    heard = Writing(far)
    assert not heard.has_within(0, 1)
    for size_bytes in (10, 20, 30):
        tell_written(near, size_bytes)
    assert heard.has_within(0, 30)
    assert not heard.has_within(0, 31)
    heard.total_bytes = 30
    assert heard.is_done()
    heard.require()
    heard.total_bytes = 31
    assert not heard.is_done()
    with pytest.raises(LateError):
        heard.require()


def test_what_is_said_in_time_is_waited_for(ends: tuple[Line, Line]) -> None:
    near, far = ends
    heard = Writing(far)
    later = threading.Timer(0.02, tell_written, [near, 7])
    later.start()
    assert heard.has_within(30, 7)
    later.join()


def test_a_device_is_held_as_long_as_a_slow_copy_takes(
    ends: tuple[Line, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_GRACE_S", 1.0)
    monkeypatch.setattr(writing, "_SLOWEST_BYTES_PER_S", 1000)
    near, far = ends
    heard = Writing(far)
    heard.total_bytes = 100
    tell_written(near, 50)
    heard.expect(50)
    began_s = time.monotonic()
    with pytest.raises(LateError):
        heard.expect(100)
    # for all waits together
    assert time.monotonic() - began_s + heard.waited_s > 1.05
    began_s = time.monotonic()
    with pytest.raises(LateError):
        heard.expect(100)
    assert time.monotonic() - began_s < 1


def test_who_says_the_same_again_and_again_keeps_no_device(chatterer: Writing) -> None:
    assert not chatterer.is_done()  # and it is not waited for whether that is all
    with pytest.raises(LateError):
        chatterer.expect(2)


def test_who_says_the_same_again_and_again_has_its_deadline(chatterer: Writing) -> None:
    call = Call(timeout_s=0.1)
    call.writing = chatterer
    with pytest.raises(DeadlineError):
        call.wait_until_written()
