"""Large calls in parts of their samples: while one part is computed, the next comes and the last one goes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cuda.host_memory import HostMemory
from deconvd_server.device.cuda.kind import Kind, addresses
from deconvd_server.device.cuda.marks import Marks
from deconvd_server.device.cuda.memory import DeviceMemory
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES
from deconvd_server.device.cuda.runtime import Bytes, Stream, copy, download, upload
from deconvd_server.device.cuda.staging import Staging, bytes_of
from deconvd_server.device.protocol import Operand
from deconvd_server.ledger import Stage

__all__ = ["Pipeline"]

_PART_BYTES = 4 << 20
_MAX_PARTS_COUNT = 8
"""Parts of x and y that take the card no less to copy than the host takes to enqueue them."""

_REMEMBERED_COUNT = 1024


class Pipeline:
    """Computes y where the card reaches x and y by itself: one stream for each way, one for the work.

    Args:
        stream: For the work.
        memory: Where blocks come from.
        staging: Copies operands that are not divided, on the stream for the work.
        host_memory: What the card reaches.
    """

    def __init__(
        self, stream: Stream, memory: DeviceMemory, staging: Staging, host_memory: HostMemory
    ) -> None:
        self._up, self._work, self._down = Stream(), stream, Stream()
        self._memory = memory
        self._staging = staging
        self._host_memory = host_memory
        self._marks = Marks(stream)

    def parts_count(self, x: Operand, y: Operand) -> int:
        """Return in how many parts a call is to be computed: of as many samples each."""
        if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
            return 1
        most = min((x.nbytes + y.nbytes) // _PART_BYTES, _MAX_PARTS_COUNT)
        if most < 2 or not (self._host_memory.holds(x) and self._host_memory.holds(y)):
            return 1
        return _even_count(most, len(x), x.nbytes, y.nbytes)

    def run(self, kind: Kind, operands: Sequence[Operand], y: Array, call: Call) -> None:
        """Compute y.

        The first part of x is on its way before anything else is seen to: the bus is what takes
        longest, and a thread that has just woken is slow.

        Args:
            kind: Of the call, with as many parts as `parts_count` returns.
            operands: x, then those that are not divided.

        Raises as `Lane.run` does.
        """
        frame, job, count = kind.frame, kind.job, kind.parts_count
        x, *others = operands
        assert isinstance(x, np.ndarray)
        with self._memory.take(frame.total_bytes) as base:
            x_at, *used_at = addresses(base, frame.operands, kind.operands_at)
            (y_at,) = addresses(base, frame.results, kind.results_at)
            workspace = base + frame.workspace.offset
            try:
                self._marks.begin(self._up)
                for x_part, y_part in zip(_parts(x, count), _parts(y, count), strict=True):
                    call.check()
                    upload(x_at, x_part, self._up.pointer)
                    if others:
                        self._put(others, kind.operands_at[1:], used_at, call)
                        others = []
                    self._up.fork(self._work)
                    job.enqueue([x_at, *used_at], [y_at], workspace, self._work.pointer)
                    self._work.fork(self._down)
                    download(y_part, y_at, self._down.pointer)
                    x_at, y_at = x_at + x_part.nbytes, y_at + y_part.nbytes
                self._marks.end(Stage.UPLOAD, self._up)
                self._marks.end(Stage.COMPUTE)
                self._marks.end(Stage.DOWNLOAD, self._down)
            finally:
                # the last to end comes first: to wait for the others then takes no time
                for stream in (self._down, self._work, self._up):
                    stream.wait()
            self._marks.account(call.ledger)

    def _put(
        self,
        others: Sequence[Operand],
        others_at: Sequence[int | None],
        targets: Sequence[int],
        call: Call,
    ) -> None:
        """Enqueue copies of the operands that are not divided to where they are used."""
        for other, lies_at, target in zip(others, others_at, targets, strict=True):
            if isinstance(other, np.ndarray):
                self._staging.upload(other, target, call.check)
            elif lies_at is not None and lies_at != target:
                copy(target, lies_at, other.spec.nbytes, self._work.pointer)


@lru_cache(_REMEMBERED_COUNT)
def _even_count(most: int, samples_count: int, x_bytes: int, y_bytes: int) -> int:
    """Return how many parts, at most, have as many samples each, and begin where plans want their operands."""
    for count in range(most, 1, -1):
        part_bytes = x_bytes // count | y_bytes // count
        if samples_count % count == 0 and part_bytes % OPERAND_ALIGNMENT_BYTES == 0:
            return count
    return 1


def _parts(array: Array, count: int) -> list[Bytes]:
    """Return the bytes of equal parts of an array's samples."""
    whole = bytes_of(array)
    step = whole.size // count
    return [whole[begin : begin + step] for begin in range(0, whole.size, step)]
