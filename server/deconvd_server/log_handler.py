"""The handler of the server's log. Records that repeat are written once a second, with their number."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable
from copy import copy
from typing import Final, TextIO

from deconvd_server.log_stream import LogStream
from deconvd_server.log_text import REPEATS

__all__ = ["REPEAT_KEY", "LogHandler"]

REPEAT_KEY: Final = "repeat_key"
"""The attribute of a record that says which other records it repeats: those with an equal key. Others never repeat."""

_PERIOD_S: Final = 1.0

_KEYS_COUNT: Final = 1024
"""How many kinds of records are remembered. More in one second are all written."""


class _Repeats:
    """The records of one kind since one was written."""

    __slots__ = ("count", "last", "until_s")

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s
        self.count = 0
        self.last: logging.LogRecord | None = None


class LogHandler(logging.StreamHandler[TextIO | LogStream]):
    """Writes records to a stream, but those of one kind at most once a second.

    The first one is written at once. Later ones are counted. `write_repeats` writes the last of them with the count,
    and how many messages a `LogStream` has lost.
    """

    def __init__(self, stream: TextIO | LogStream) -> None:
        super().__init__(stream)
        self._repeats_by_key: dict[Hashable, _Repeats] = {}
        self._repeats_lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a record now."""
        key = getattr(record, REPEAT_KEY, None)
        return bool(super().filter(record)) and (key is None or self._is_due(key, record))

    def write_repeats(self, *, all_of_them: bool = False) -> None:
        """Write a record of each kind that has repeated for a second. To be called about once a second.

        Args:
            all_of_them: Do not wait until the second is over.
        """
        due: list[logging.LogRecord] = []
        now_s = time.monotonic()
        with self._repeats_lock:
            for key, repeats in list(self._repeats_by_key.items()):
                if not all_of_them and now_s < repeats.until_s:
                    continue
                if repeats.last is None:
                    del self._repeats_by_key[key]
                    continue
                setattr(repeats.last, REPEATS, repeats.count - 1)
                due.append(repeats.last)
                self._repeats_by_key[key] = _Repeats(now_s + _PERIOD_S)
        self.acquire()
        try:
            self._write_lost_count()
            for record in due:
                self.emit(record)
        finally:
            self.release()

    def close(self) -> None:
        """Write what was counted, and close."""
        self.write_repeats(all_of_them=True)
        super().close()

    def _write_lost_count(self) -> None:
        stream = self.stream
        if not isinstance(stream, LogStream) or not stream.lost_count or not stream.is_ready():
            return
        text = "%d messages were lost: nobody read standard error"
        count, stream.lost_count = stream.lost_count, 0
        level = logging.WARNING
        self.emit(logging.LogRecord(__name__, level, __file__, 0, text, (count,), None))

    def _is_due(self, key: Hashable, record: logging.LogRecord) -> bool:
        with self._repeats_lock:
            repeats = self._repeats_by_key.get(key)
            if repeats is not None:
                repeats.count += 1
                repeats.last = copy(record)
                repeats.last.exc_info = None  # its frames refer to a call's tensors
                return False
            if len(self._repeats_by_key) < _KEYS_COUNT:
                self._repeats_by_key[key] = _Repeats(time.monotonic() + _PERIOD_S)
            return True
