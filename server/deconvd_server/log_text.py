"""Log lines that clients cannot write: what they send may be in a message, but never as a line of its own."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Final, TypeAlias

__all__ = ["LogFormatter", "excerpt", "printable"]

_EXCERPT_LENGTH: Final = 200
"""Characters of a text that a client has a hand in."""

_INDENT: Final = "    "

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def printable(text: str) -> str:
    """Return a text as one line, in which what cannot be printed is escaped as in Python's strings."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def excerpt(text: object) -> str:
    """Return what a log may have of a text that a client has a hand in: printable, and not long."""
    line = printable(str(text)[: _EXCERPT_LENGTH + 1])
    return line if len(line) <= _EXCERPT_LENGTH else f"{line[:_EXCERPT_LENGTH]}…"


class LogFormatter(logging.Formatter):
    """Formats each record, also those of libraries, as one line, and tracebacks behind it with an indent."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:
        """Return the traceback: an error's own text may have lines that look like records."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(_INDENT + printable(line) for line in lines)
