"""Tensors by what they are: the digest of their elements."""

from __future__ import annotations

from typing import Final

from blake3 import blake3

from deconvd.codec import Buffer
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["DIGEST_BYTES", "digest_of"]

DIGEST_BYTES: Final = 32

_PARALLEL_BYTES: Final = 2 << 20
"""From this size on several threads are faster than one."""


def digest_of(elements: Buffer) -> pb.Digest:
    """Return the digest of elements as they are in `Tensor.raw`. It lets other threads run."""
    threads_count = blake3.AUTO if len(elements) >= _PARALLEL_BYTES else 1
    digest = blake3(elements, max_threads=threads_count).digest()
    return pb.Digest(blake3=digest, size_bytes=len(elements))
