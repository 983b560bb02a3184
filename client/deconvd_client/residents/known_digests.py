"""Which operands are worth naming by their digests, and which digests the server is known to have."""

from __future__ import annotations

import time
from typing import Final

from deconvd.errors import DeconvdError, UnimplementedError
from deconvd.host.forks import new_lock
from deconvd.lru import Lru
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.residents.session import ClientSession
from deconvd_client.residents.session_thread import SessionInfo
from deconvd_client.shared_memory import Borrower

__all__ = ["KnownDigests"]

_MIN_BYTES: Final = 64 << 10
"""What is smaller is sent about as fast as its digest is computed and looked up."""

_MAX_KNOWN_COUNT: Final = 4096
_OPEN_TIMEOUT_S: Final = 2.0
"""A call that can do without a session does not wait for one longer, and not for a server that is not there."""

_PAUSE_S: Final = 2.0
"""How long nothing is offered once a session was lost, or could not be opened."""


class KnownDigests:
    """Which contents the server has for the session, by digest, shape and element type. Thread-safe.

    Args:
        session: Opened for the first operand that is worth it.
        memory: Where that is lent, operands lie in it, and none is.
    """

    def __init__(self, session: ClientSession, memory: Borrower) -> None:
        self._session = session
        self._borrower = memory
        self._lock = new_lock()
        self._is_off = False
        self._paused_until_s = 0.0
        self._known: Lru[tuple[bytes, TensorSpec, bytes], bool] = Lru(_MAX_KNOWN_COUNT)

    def is_worth_hashing(self, array: Array, deadline: Deadline) -> bool:
        """Return whether an operand that all samples have in common is to be named by its digest.

        Such are the same from call to call, as others are not.
        """
        if array.nbytes < _MIN_BYTES or self._borrower.has_lender(deadline):
            return False
        opened = self._try_open_session(deadline)
        return opened is not None and array.nbytes <= opened.quota_bytes

    def knows(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> bool:
        """Return whether the server had a content for a session when it was last named."""
        with self._lock:
            return self._known.get((session, spec, digest.blake3)) is not None

    def learn(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Take note that the server has it."""
        with self._lock:
            self._known.put((session, spec, digest.blake3), True)

    def forget(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Take note that the server does not have it."""
        with self._lock:
            self._known.drop((session, spec, digest.blake3))

    def pause(self) -> None:
        """Offer nothing for a while: calls seem to go to servers that do not know the session."""
        self._paused_until_s = time.monotonic() + _PAUSE_S

    def _try_open_session(self, deadline: Deadline) -> SessionInfo | None:
        """Return the session; None if there is none to be had, now or at all."""
        if self._is_off or time.monotonic() < self._paused_until_s:
            return None
        try:
            return self._session.open(deadline.with_limit(_OPEN_TIMEOUT_S), fail_fast=True)
        except UnimplementedError:
            self._is_off = True
        except DeconvdError:
            self.pause()  # the call itself says what is wrong, if it still is
        return None
