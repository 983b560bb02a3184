"""Decides which operands to name by their digests, and remembers which digests the server has."""

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
"""Smaller operands are sent: that takes about as long as computing their digest and looking it up."""

_MAX_KNOWN_COUNT: Final = 4096
"""How many digests are remembered. The least recently used one is forgotten first."""

_OPEN_TIMEOUT_S: Final = 2.0
"""How long a call waits for a session that it can do without."""

_PAUSE_S: Final = 2.0
"""How long digests are not used after a session was lost or could not be opened."""


class KnownDigests:
    """The digests that the server has for a session, each with a shape and an element type. Thread-safe.

    Args:
        session: It is opened for the first operand that is worth a digest.
        borrower: If the server lends memory, operands are in that memory and digests are not used.
    """

    def __init__(self, session: ClientSession, borrower: Borrower) -> None:
        self._session = session
        self._borrower = borrower
        self._lock = new_lock()
        self._is_off = False
        self._paused_until_s = 0.0
        self._known: Lru[tuple[bytes, TensorSpec, bytes], bool] = Lru(_MAX_KNOWN_COUNT)

    def is_worth_hashing(self, array: Array, deadline: Deadline) -> bool:
        """Return whether to name a constant operand by its digest. This may open a session.

        Constant operands (W and b) are often the same in many calls. Others change with each call, so that
        the server would not have them.
        """
        if array.nbytes < _MIN_BYTES or self._borrower.has_lender(deadline):
            return False
        session = self._try_open_session(deadline)
        return session is not None and array.nbytes <= session.quota_bytes

    def knows(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> bool:
        """Return whether the server had these elements when a call last named them."""
        with self._lock:
            return self._known.get((session, spec, digest.blake3)) is not None

    def learn(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Note that the server has these elements."""
        with self._lock:
            self._known.put((session, spec, digest.blake3), True)

    def forget(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Note that the server does not have these elements."""
        with self._lock:
            self._known.drop((session, spec, digest.blake3))

    def pause(self) -> None:
        """Stop using digests for a while. Calls seem to reach several servers, and not all know the session."""
        self._paused_until_s = time.monotonic() + _PAUSE_S

    def _try_open_session(self, deadline: Deadline) -> SessionInfo | None:
        """Return the session. None if there is none now, or the server has no sessions at all."""
        if self._is_off or time.monotonic() < self._paused_until_s:
            return None
        try:
            return self._session.open(deadline.with_limit(_OPEN_TIMEOUT_S), fail_fast=True)
        except UnimplementedError:
            self._is_off = True
        except DeconvdError:
            self.pause()  # if the server is still in trouble, the call itself reports it
        return None
