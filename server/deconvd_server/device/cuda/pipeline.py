"""Large calls in parts of their samples: while one part is computed, the next comes and the last one goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deconvd.tensor import Array, spec_of
from deconvd_server.call import Call
from deconvd_server.device.cuda.frame import Frame
from deconvd_server.device.cuda.host_memory import HostMemory
from deconvd_server.device.cuda.job import Job
from deconvd_server.device.cuda.kind import addresses, spec_to_place
from deconvd_server.device.cuda.marks import Marks
from deconvd_server.device.cuda.memory import DeviceMemory
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES
from deconvd_server.device.cuda.runtime import Bytes, Stream, copy, download, upload
from deconvd_server.device.cuda.staging import Staging, bytes_of
from deconvd_server.device.protocol import Operand
from deconvd_server.ledger import Stage

__all__ = ["Pipeline"]

_PART_BYTES = 8 << 20
_MAX_PARTS_COUNT = 8
"""Parts of x and y that take the card much longer to copy than the host takes to enqueue them."""


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
        return next((count for count in range(most, 1, -1) if _is_even(count, x, y)), 1)

    def run(
        self,
        job: Job,
        count: int,
        x: Array,
        others: Sequence[tuple[Operand, int | None]],
        y: Array,
        call: Call,
    ) -> None:
        """Compute y.

        Args:
            job: That of a part.
            count: As `parts_count` returns it.
            others: Operands that are not divided, and where they lie on the card; None for arrays.

        Raises as `Lane.run` does.
        """
        whole = [spec_of(x), *job.operands[1:]]
        at = [None, *(lies_at for _, lies_at in others)]
        frame = Frame([*map(spec_to_place, whole, at)], [spec_of(y)], job.workspace_bytes)
        with self._memory.take(frame.total_bytes) as base:
            x_at, *used_at = addresses(base, frame.operands, at)
            (y_at,) = addresses(base, frame.results, [None])
            try:
                self._marks.begin(self._up)
                for (other, lies_at), target in zip(others, used_at, strict=True):
                    if isinstance(other, np.ndarray):
                        self._staging.upload(other, target, call.check)
                    elif lies_at is not None and lies_at != target:
                        copy(target, lies_at, other.spec.nbytes, self._work.pointer)
                for x_part, y_part in zip(_parts(x, count), _parts(y, count), strict=True):
                    call.check()
                    upload(x_at, x_part, self._up.pointer)
                    self._up.fork(self._work)
                    workspace = base + frame.workspace.offset
                    job.enqueue([x_at, *used_at], [y_at], workspace, self._work.pointer)
                    self._work.fork(self._down)
                    download(y_part, y_at, self._down.pointer)
                    x_at, y_at = x_at + x_part.nbytes, y_at + y_part.nbytes
                self._marks.end(Stage.UPLOAD, self._up)
                self._marks.end(Stage.COMPUTE)
                self._marks.end(Stage.DOWNLOAD, self._down)
            finally:
                for stream in (self._up, self._work, self._down):
                    stream.wait()
            self._marks.account(call.ledger)


def _is_even(count: int, x: Array, y: Array) -> bool:
    """Return whether parts have as many samples each, and begin where plans want their operands."""
    part_bytes = x.nbytes // count | y.nbytes // count
    return len(x) % count == 0 and part_bytes % OPERAND_ALIGNMENT_BYTES == 0


def _parts(array: Array, count: int) -> list[Bytes]:
    """Return the bytes of equal parts of an array's samples."""
    return np.split(bytes_of(array), count)
