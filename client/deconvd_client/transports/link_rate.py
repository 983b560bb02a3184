"""The rate of the link to a server, measured where responses arrive, and the slices that it asks for.

A slice's results are sent in one part, from memory, once all of them are computed. So the time from the first to the
last byte of a part is the link's alone: neither the server's computing nor the request's arrival is in it::

    server     computes        | part 0 |  computes     | part 1 |
    link                         |======|                 |======|
    measured                     |<---->|                 |<---->|

What the thread that reads spends on the processor meanwhile, to decrypt or to copy, is not the link's either.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Final

from google.protobuf.message import Message

from deconvd.host.forks import new_lock
from deconvd.wire.slice_sizes import SLICE_BYTES
from deconvd.wire.stream_parts import PartSource, PendingElements, Uint8Array

__all__ = ["LinkRate", "MeteredSource"]

_FAST_BYTES_PER_S: Final = 400e6
"""From this rate on, processors limit a call as much as the link does. Then slices have the usual size."""

_SLOW_BYTES_PER_S: Final = 250e6
"""Below this rate elements with many zeros are packed.

One thread packs or unpacks from 1.9 GB/s (float16) to 4 (float64). If that saves a quarter of the bytes, it pays on
links of less than a quarter of that rate. The rest is for machines whose processors have other work.
"""

_SLICE_OVERHEAD_S: Final = 2e-4
"""What a slice costs both ends in addition to its bytes."""

_MIN_SLICE_BYTES: Final = 64 << 10
"""The smallest slice that a link can ask for."""

_MIN_PART_BYTES: Final = 512 << 10
"""Shorter parts are not measured: buffers on the way, and a reader that is late, hide how long they take."""

_PARTS_COUNT: Final = 15
"""How many parts count, the latest ones."""

_SLOWER_SHARE: Final = 4
"""The rate is that of the part in the lower quartile: parts that were in buffers before they were read seem faster.

To take a fast link for a slow one costs little, and to take a slow one for a fast one up to half of the rate.
"""

_MAX_AGE_S: Final = 60.0
"""How long a rate holds after the last measurement. Then a call with large slices measures it again.

The parts of small slices cannot be measured, so a link that has become faster would not be noticed.
"""


class LinkRate:
    """How many bytes arrive from a server in a second. Thread-safe."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._part_rates: deque[float] = deque(maxlen=_PARTS_COUNT)
        self._measured_s = -math.inf

    def add_part(self, size_bytes: int, duration_s: float) -> None:
        """Record how long the bytes of a part took to arrive."""
        if size_bytes < _MIN_PART_BYTES:
            return
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._measured_s > _MAX_AGE_S:
                self._part_rates.clear()
            self._part_rates.append(size_bytes / max(duration_s, 1e-6))
            self._measured_s = now_s

    @property
    def is_slow(self) -> bool:
        """Whether the link is known to be so slow that packing elements costs less than their bytes."""
        rate = self.bytes_per_s
        return rate is not None and rate < _SLOW_BYTES_PER_S

    @property
    def bytes_per_s(self) -> float | None:
        """The rate. None if it has not been measured for a minute."""
        with self._lock:
            if not self._part_rates or time.monotonic() - self._measured_s > _MAX_AGE_S:
                return None
            return sorted(self._part_rates)[len(self._part_rates) // _SLOWER_SHARE]

    def slice_bytes(self, total_bytes: int) -> int:
        """Return the size that the slices of a call should have.

        The first slice's operands and the last slice's results have the link for themselves, half of it unused. Small
        slices shorten that time, and large ones save overhead. The sum of both is least where they are equal::

            slice_bytes / rate = total_bytes / slice_bytes * _SLICE_OVERHEAD_S

        The size is rounded to a power of two: plans and buffers are kept for each number of samples, which must not be
        another one in each call.

        Args:
            total_bytes: The size of the operands and results that come in slices.
        """
        rate = self.bytes_per_s
        if rate is None or rate >= _FAST_BYTES_PER_S:
            return SLICE_BYTES
        best_bytes = math.sqrt(total_bytes * rate * _SLICE_OVERHEAD_S)
        rounded_bytes = 1 << round(math.log2(max(best_bytes, _MIN_SLICE_BYTES)))
        return min(rounded_bytes, SLICE_BYTES)


class MeteredSource:
    """The parts of a response, whose arrival is measured. See `PartSource`. One thread reads all of them.

    Args:
        source: The parts as they arrive.
        part_bytes: The size of the results of a slice.
        parts_count: How many parts of that size the response has.
    """

    def __init__(
        self, source: PartSource, link_rate: LinkRate, part_bytes: int, parts_count: int
    ) -> None:
        self.is_buffered: bool = source.is_buffered
        self._source = source
        self._link_rate = link_rate
        self._part_bytes = part_bytes
        self._parts_left_count = parts_count
        self._filled_bytes = 0
        self._unmeasured_bytes = 0  # those that had arrived when the measurement began
        self._began_s = 0.0
        self._began_processor_s = 0.0  # on the clock of this thread's processor time
        self._is_packed = False  # some of the current results came packed: in fewer bytes

    def next(self) -> Message | PendingElements | None:
        """Return the next part. None at the end."""
        part = self._source.next()
        if not isinstance(part, PendingElements):
            return part
        self._is_packed |= part.is_packed
        if not self._filled_bytes:
            self._began_s, self._began_processor_s = time.perf_counter(), time.thread_time()
            self._unmeasured_bytes = part.size_bytes if self.is_buffered else 0
        return part

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements."""
        self._source.read_into(target)
        if not self._parts_left_count:
            return
        self._filled_bytes += len(target)
        if self._filled_bytes >= self._part_bytes:
            if not self._is_packed:
                measured_bytes = self._filled_bytes - self._unmeasured_bytes
                passed_s = time.perf_counter() - self._began_s
                processor_s = time.thread_time() - self._began_processor_s
                self._link_rate.add_part(measured_bytes, passed_s - processor_s)
            self._filled_bytes, self._is_packed = 0, False
            self._parts_left_count -= 1
