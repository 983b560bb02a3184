"""SourceArray: the array that a resident was made from, with a digest that shows whether it has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final

from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.digest import digest_of
from deconvd_client.calls.uninterrupted import run_in_background

__all__ = ["SourceArray"]

_MIN_BACKGROUND_BYTES: Final = 1 << 20
"""Smaller arrays are hashed by the calling thread: another thread would save less than it costs."""


class _DigestTask:
    """Computes the digest of an array in another thread."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._is_cancelled = False
        self._outcome: SimpleQueue[pb.Digest | None] = SimpleQueue()

    def run(self) -> None:
        digest = None
        try:
            digest = digest_of(self._array, self._check)
        except _DigestCancelledError:
            pass
        finally:
            self._outcome.put(digest)  # always, or `wait` would never return

    def cancel(self) -> None:
        """Make `run` stop after the piece that it is hashing."""
        self._is_cancelled = True

    def wait(self) -> pb.Digest | None:
        """Return the digest when it is ready. None if it was cancelled."""
        return self._outcome.get()

    def _check(self) -> None:
        if self._is_cancelled:
            raise _DigestCancelledError


class _DigestCancelledError(Exception):
    """Nobody needs the digest any more."""


class SourceArray:
    """An array, and the digest of its elements at the time they were sent.

    Args:
        array: It is referred to, not copied, so its owner can change it later.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        self._digest: pb.Digest | None = None

    @property
    def digest(self) -> pb.Digest:
        """The digest of the elements at the first use of this property or of `hash_in_background`."""
        if self._digest is None:
            self._digest = digest_of(self.array)
        return self._digest

    @contextmanager
    def hash_in_background(self) -> Iterator[None]:
        """Compute the digest in another thread while the block runs. The block must not change the array.

        If the block fails, the computation is cancelled.
        """
        if self._digest is not None or self.array.nbytes < _MIN_BACKGROUND_BYTES:
            self.digest  # noqa: B018 - the property remembers it
            yield
            return
        task = _DigestTask(self.array)
        run_in_background(task.run)
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            # also after an error: the other thread must not read the array once the caller may change it
            self._digest = task.wait()

    @property
    def is_unchanged(self) -> bool:
        """Whether the array still has the elements of the digest. This hashes the whole array."""
        return digest_of(self.array) == self.digest
