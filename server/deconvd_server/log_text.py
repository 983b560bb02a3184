"""Log lines that clients cannot forge: a line may quote a client's text, but the text never makes a line of its own."""

from __future__ import annotations

import json
import logging
import time
from types import TracebackType
from typing import Final, TypeAlias

__all__ = ["FIELDS", "REPEATS", "JsonLogFormatter", "LogFormatter", "excerpt", "printable"]

_EXCERPT_LENGTH: Final = 200
"""How many characters of a client's text the log gets."""

FIELDS: Final = "fields"
"""The attribute of a record that has fields of its own for JSON, in a dictionary. The line of text says the same."""

REPEATS: Final = "repeats_count"
"""The attribute of a record that tells how many like it were left out since the last one."""

_GRPC_CORE_LOGGER: Final = "grpc._cython.cygrpc"

_NOT_UTF8: Final = "a call's metadata has %d bytes that are not UTF-8"

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
    """Formats each record as one line, followed by an indented traceback if it has one. It serves libraries, too.

    Args:
        worker: This process's name among those that write to the same log; empty if it is alone.
    """

    def __init__(self, worker: str = "") -> None:
        who = f"worker {worker}: " if worker else ""
        super().__init__(f"%(asctime)s %(levelname)s %(name)s: {who}%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line, and its traceback."""
        return super().format(_without_metadata(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        line = printable(super().formatMessage(record))
        repeats_count = getattr(record, REPEATS, 0)
        return f"{line} (and {repeats_count} more like this)" if repeats_count else line

    def formatException(self, ei: _ExcInfo) -> str:
        """Return a traceback, indented: the text of an error may have lines that look like records."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(_INDENT + printable(line) for line in lines)


class JsonLogFormatter(logging.Formatter):
    """Formats each record as one JSON object on a line of ASCII letters, whatever its texts contain.

    Args:
        worker: As for `LogFormatter`.
    """

    def __init__(self, worker: str = "") -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        record = _without_metadata(record)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._worker:
            entry["worker"] = self._worker
        if repeats_count := getattr(record, REPEATS, 0):
            entry["repeats"] = repeats_count
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _without_metadata(record: logging.LogRecord) -> logging.LogRecord:
    """Return a record that quotes no metadata of a client.

    gRPC quotes each piece that is not UTF-8, with a traceback. That is the client's fault and says nothing about the
    server, and the piece may be a token with a stray byte. So such a record becomes one line that quotes nothing.
    """
    error = record.exc_info[1] if record.exc_info else None
    if record.name != _GRPC_CORE_LOGGER or not isinstance(error, UnicodeDecodeError):
        return record
    changes = {"exc_info": None, "args": (len(error.object),), "msg": _NOT_UTF8}
    return logging.makeLogRecord(record.__dict__ | changes)
