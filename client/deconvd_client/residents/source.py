"""What a resident tensor was made of, to be sent again if the server loses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

from deconvd.digest import digest_of
from deconvd.tensor import Array, elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.uninterrupted import do_beside

__all__ = ["Source"]

_BESIDE_BYTES: Final = 1 << 20
"""From this size on a thread of its own pays for a digest."""


class Source:
    """An array, and the digest of what was in it once.

    Args:
        array: It is referred to, not copied.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        self._digest: pb.Digest | None = None

    @property
    def digest(self) -> pb.Digest:
        """The digest of what was in the array when this was first asked for, or before `beside`."""
        if self._digest is None:
            self._digest = digest_of(elements_of(self.array))
        return self._digest

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Take the digest while the block, which does not change the array, runs."""
        if self._digest is not None or self.array.nbytes < _BESIDE_BYTES:
            self.digest  # noqa: B018  # it is kept
            yield
            return
        ended: SimpleQueue[None] = SimpleQueue()
        do_beside(lambda: self._take_digest(ended))
        try:
            yield
        finally:
            ended.get()

    def _take_digest(self, ended: SimpleQueue[None]) -> None:
        try:
            self.digest  # noqa: B018  # it is kept
        finally:
            ended.put(None)

    @property
    def is_unchanged(self) -> bool:
        """Whether the array holds what it held then."""
        return digest_of(elements_of(self.array)) == self.digest
