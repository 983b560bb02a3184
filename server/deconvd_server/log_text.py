"""Log lines that clients cannot forge: a line may quote a client's text, but the text never makes a line of its own."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Final, TypeAlias

__all__ = ["LogFormatter", "excerpt", "printable"]

_EXCERPT_LENGTH: Final = 200
"""How many characters of a client's text the log gets."""

_INDENT: Final = "    "

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def printable(text: str) -> str:
    """Return a text as one line. Characters that cannot be printed are escaped as in Python's strings."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def excerpt(text: object) -> str:
    """Return the beginning of a text that a client may have influenced, fit for a log: printable and short."""
    line = printable(str(text)[: _EXCERPT_LENGTH + 1])
    return line if len(line) <= _EXCERPT_LENGTH else f"{line[:_EXCERPT_LENGTH]}…"


class LogFormatter(logging.Formatter):
    """Formats each record as one line, followed by an indented traceback if it has one. It serves libraries, too."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:
        """Return a traceback, indented: the text of an error may have lines that look like records."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(_INDENT + printable(line) for line in lines)
