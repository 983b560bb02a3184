"""What a resident tensor was made of, to be sent again if the server loses it."""

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
"""From this size on a thread of its own pays for a digest."""


class _DigestTask:
    """The work of another thread on an array's digest."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._is_cancelled = False
        self._outcome: SimpleQueue[pb.Digest | None] = SimpleQueue()

    def run(self) -> None:
        """Do it."""
        digest = None
        try:
            digest = digest_of(self._array, self._check)
        except _DigestCancelledError:
            pass
        finally:
            self._outcome.put(digest)

    def cancel(self) -> None:
        """Have it ended soon."""
        self._is_cancelled = True

    def wait(self) -> pb.Digest | None:
        """Return the digest once it is there; None if it was given up."""
        return self._outcome.get()

    def _check(self) -> None:
        if self._is_cancelled:
            raise _DigestCancelledError


class _DigestCancelledError(Exception):
    """The digest is wanted no longer."""


class SourceArray:
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
            self._digest = digest_of(self.array)
        return self._digest

    @contextmanager
    def hash_in_background(self) -> Iterator[None]:
        """Take the digest while the block, which does not change the array, runs; not if it fails."""
        if self._digest is not None or self.array.nbytes < _MIN_BACKGROUND_BYTES:
            self.digest  # noqa: B018  # it is kept
            yield
            return
        work = _DigestTask(self.array)
        run_in_background(work.run)
        try:
            yield
        except BaseException:
            work.cancel()
            raise
        finally:
            self._digest = work.wait()

    @property
    def is_unchanged(self) -> bool:
        """Whether the array holds what it held then."""
        return digest_of(self.array) == self.digest
