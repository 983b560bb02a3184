"""Ends a command by the signals that ask a process to end, so that its temporary files go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

__all__ = ["exit_on_signals"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
_SIGNAL_CODE: Final = 128
"""What shells add to the number of the signal that ended a command."""


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Have these signals raise SystemExit in the block."""
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:  # not those that the process should ignore, as under nohup
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(_SIGNAL_CODE + number)
