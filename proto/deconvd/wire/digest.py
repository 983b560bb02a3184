"""The digest of a tensor's elements, by which a request can name them."""

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
"""Smaller arrays are hashed by one thread, which is faster than several."""

_PIECE_BYTES: Final = 64 << 20
"""How much is hashed between two calls of `check`: about ten milliseconds of work."""


def digest_of(array: Array, check: Callable[[], None] = lambda: None) -> pb.Digest:
    """Return the digest of an array's elements as laid out in `Tensor.raw`. Other threads can run meanwhile.

    An array in another layout is copied, but only piece by piece.

    Args:
        check: Called between pieces. An exception that it raises ends the work.
    """
    digest = blake3(max_threads=blake3.AUTO if array.nbytes >= _PARALLEL_BYTES else 1)
    for part in elements_parts(array):
        for piece in part.pieces(_PIECE_BYTES):
            check()
            digest.update(piece.data)
    return pb.Digest(blake3=digest.digest(), size_bytes=array.nbytes)
