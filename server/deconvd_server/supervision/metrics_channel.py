"""How a supervisor asks a worker for metrics, over a socket of their own: a number, an identity; the number, metrics.

Each message has a head of its number and its size. The metrics are JSON: prometheus-client's text would take ten times
as long to read.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, TypeAlias

from prometheus_client import Metric
from prometheus_client.registry import Collector

__all__ = ["Family", "MetricsChannel", "start_metrics_thread"]

Family: TypeAlias = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""The name, the documentation and the type of a metric, and its samples: name, labels, value."""

_HEAD: Final = struct.Struct("<QQ")
_READ_BYTES: Final = 1 << 16

_log = logging.getLogger(__name__)


def start_metrics_thread(descriptor: int, collector_for: Callable[[str], Collector]) -> None:
    """Answer the supervisor, in a thread of its own, until it ends.

    Args:
        descriptor: The worker's end of the socket.
        collector_for: Returns the metrics that an identity may see, or all for an empty one.
    """
    connection = socket.socket(fileno=descriptor)
    messages = _Messages(connection)

    def run() -> None:
        with connection, suppress(OSError):  # the supervisor has ended, as the link says, too
            while (message := messages.take(None)) is not None:
                number, identity = message
                answer = _answer(collector_for, identity.decode())
                connection.sendall(_HEAD.pack(number, len(answer)) + answer)

    threading.Thread(target=run, name="metrics", daemon=True).start()


def _answer(collector_for: Callable[[str], Collector], identity: str) -> bytes:
    """Return the metrics for an identity as JSON; nothing if that fails."""
    try:
        return json.dumps(_families(collector_for(identity).collect())).encode()
    except Exception:  # noqa: BLE001 - logged, and the supervisor is told that there is no answer
        _log.exception("unforeseen error in a scrape")
        return b""


def _families(metrics: Iterable[Metric]) -> list[Family]:
    return [
        (
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
        )
        for metric in metrics
    ]


class MetricsChannel:
    """The supervisor's end. One thread asks, and another one may close it."""

    def __init__(self, connection: socket.socket) -> None:
        self._lock = threading.Lock()
        self._connection = connection
        self._messages = _Messages(connection)
        self._number = 0

    def ask(self, identity: str) -> None:
        """Ask for the metrics that an identity may see, or for all if it is empty."""
        self._number += 1
        data = identity.encode()
        question = _HEAD.pack(self._number, len(data)) + data
        with self._lock:
            try:
                self._connection.send(question, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError as error:  # `answer` will find nothing
                _log.debug("a worker cannot be asked for metrics: %s", error)

    def answer(self, deadline_s: float) -> list[Family] | None:
        """Return the answer to the last question; None if there is none until a time of the monotonic clock."""
        with self._lock:
            while (message := self._messages.take(deadline_s)) is not None:
                number, data = message
                if number == self._number:  # and not an answer that came too late
                    return json.loads(data) if data else None
        return None

    def close(self) -> None:
        """Close the socket, once the worker has ended: then nobody waits for an answer for long."""
        with self._lock:
            self._connection.close()


class _Messages:
    """Takes messages from a socket. One that has come in part is kept for the next time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = bytearray()

    def take(self, deadline_s: float | None) -> tuple[int, bytes] | None:
        """Return the number and the contents of the next message; None if none comes in time, or none will come."""
        while (message := self._cut_off()) is None:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            try:
                self._connection.settimeout(left_s)
                data = self._connection.recv(_READ_BYTES)
            except OSError:  # it is closed, or the time is over
                return None
            if not data:
                return None
            self._data += data
        return message

    def _cut_off(self) -> tuple[int, bytes] | None:
        if len(self._data) < _HEAD.size:
            return None
        number, size_bytes = _HEAD.unpack_from(self._data)
        end = _HEAD.size + size_bytes
        if len(self._data) < end:
            return None
        contents = bytes(self._data[_HEAD.size : end])
        del self._data[:end]
        return number, contents
