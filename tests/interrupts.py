"""Interrupts, as a signal handler raises them, at chosen moments and at random ones."""

from __future__ import annotations

import contextlib
import dis
import gc
import itertools
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, Final

import grpc

import deconvd
import deconvd_client

__all__ = [
    "AlarmError",
    "InterruptError",
    "InterruptOutcome",
    "interrupt_at_random",
    "interrupt_everywhere",
]

_INTERRUPTED_PATHS: Final = (
    *(str(Path(str(package.__file__)).parent) for package in (deconvd, deconvd_client, grpc)),
    *(str(module.__file__) for module in (contextlib, queue, threading)),
)
"""The code that interrupts are to strike in: the client's, and what it calls in Python."""


class InterruptError(BaseException):
    """What the handler raises: no Exception, as KeyboardInterrupt is none."""


class _Interrupter:
    """A trace function that raises InterruptError once, at the moment of a number.

    Moments are those at which Python runs signal handlers: where a function of the packages begins, after
    each call that it makes, and where a loop of it turns.
    """

    def __init__(self, moment: int) -> None:
        self._left_count = moment
        self._last: dict[FrameType, str] = {}
        self.has_interrupted = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.has_interrupted or not frame.f_code.co_filename.startswith(_INTERRUPTED_PATHS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "call":
            self._count_moment()
        elif event == "opcode":
            last = self._last.get(frame, "")
            now = self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            # Not after a call that has raised: Python runs no handler there, and an error raised by a tracer just
            # before PUSH_EXC_INFO leaves what is being handled, and the frames of its traceback, alive for good.
            has_raised = now == "PUSH_EXC_INFO"
            if not has_raised and (last.startswith("CALL") or "JUMP_BACKWARD" in last):
                self._count_moment()
        elif event == "return":
            self._last.pop(frame, None)
        return self.trace

    def _count_moment(self) -> None:
        self._left_count -= 1
        if self._left_count == 0:
            self.has_interrupted = True
            self._last.clear()  # frames, which hold what the work holds
            sys.settrace(None)
            raise InterruptError


def interrupt_everywhere(work: Callable[[], object]) -> Iterator[None]:
    """Run `work` again and again, each time with an interrupt at a later moment; yield after each.

    It ends with a run that had ended before its interrupt came.
    """
    for moment in itertools.count(1):
        striker = _Interrupter(moment)
        before = sys.gettrace()
        gc.disable()  # it would run finalizers of what other tests have dropped, and the interrupt strike in one
        sys.settrace(striker.trace)
        try:
            work()
        except InterruptError:
            pass
        finally:
            sys.settrace(before)
            gc.enable()
        yield
        if not striker.has_interrupted:
            return


class AlarmError(TimeoutError):
    """What many a handler raises: an Exception, and one that the system's calls raise too."""


class InterruptOutcome(Enum):
    """What became of interrupts at random moments."""

    RAISED = "one was raised by the work"
    LOST = "they struck, and the work went on as if they had not"
    LATE = "the work had ended before"
    DROPPED = "they struck in finalizers, from which Python raises nothing"


def interrupt_at_random(
    work: Callable[[], object],
    random: Random,
    mean_s: float,
    *,
    strikes_count: int = 1,
    error: type[BaseException] = InterruptError,
) -> InterruptOutcome:
    """Run `work`, with interrupts at random moments.

    Args:
        strikes_count: How many.
        mean_s: How long after the begin, or the last interrupt, the next one comes, in the mean.
        error: What they raise.
    """
    left_count, struck_count = strikes_count, 0

    def strike(*_: object) -> None:
        nonlocal left_count, struck_count
        if left_count > 0:
            left_count -= 1
            struck_count += 1
            signal.setitimer(signal.ITIMER_REAL, random.expovariate(1 / mean_s) + 1e-6)
            raise error

    before = signal.signal(signal.SIGALRM, strike)
    dropped_count = 0

    def drop(unraisable: sys.UnraisableHookArgs) -> None:
        # Python gives those to it that strike in finalizers; pytest's own would be struck too
        nonlocal dropped_count
        dropped_count += isinstance(unraisable.exc_value, error)

    hook_before, sys.unraisablehook = sys.unraisablehook, drop
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.expovariate(1 / mean_s) + 1e-6)
            work()
        finally:
            left_count = 0
        if not struck_count:
            return InterruptOutcome.LATE
        is_dropped = dropped_count == struck_count
        return InterruptOutcome.DROPPED if is_dropped else InterruptOutcome.LOST
    except error:
        return InterruptOutcome.RAISED
    finally:
        left_count = 0  # the second time, if an interrupt struck just before the first
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook_before
