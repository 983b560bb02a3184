"""Exit codes of the server's process."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit codes of the server's process. README.md has them in a table."""

    DRAINED = 0
    """It was asked to end, and no call was cut short."""

    FAILED = 1
    """It could not start. `sys.exit` gives this code with the text that says why."""

    WRONG_OPTION = 2
    """An option is wrong: a restart would not help. Click gives this code."""

    NEEDS_RESTART = 3
    """A card, or a thread that all calls need, is lost: only a new process gets it back."""

    CUT_SHORT = 4
    """It was asked to end, and calls were cut short, by the time limit of the drain or by a second signal."""

    DEVICE_HUNG = 5
    """A kernel or copy of a card did not end in time: only a new process gets the card back, if the card recovers."""
