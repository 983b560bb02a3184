"""Tensors by what they are: the digest of their elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from blake3 import blake3

from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import elements_parts

__all__ = ["DIGEST_BYTES", "digest_of"]

DIGEST_BYTES: Final = 32

_PARALLEL_BYTES: Final = 2 << 20
"""From this size on several threads are faster than one."""

_PIECE_BYTES: Final = 64 << 20
"""What is digested between two calls of `check`: some ten milliseconds."""


def digest_of(array: Array, check: Callable[[], None] = lambda: None) -> pb.Digest:
    """Return the digest of an array's elements as they are in `Tensor.raw`. It lets other threads run.

    What must be copied for it is copied piece by piece.

    Args:
        check: Called now and then; what it raises ends the work.
    """
    digest = blake3(max_threads=blake3.AUTO if array.nbytes >= _PARALLEL_BYTES else 1)
    for part in elements_parts(array):
        for piece in part.pieces(_PIECE_BYTES):
            check()
            digest.update(piece.data)
    return pb.Digest(blake3=digest.digest(), size_bytes=array.nbytes)
