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
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.residents.session import ClientSession
from deconvd_client.residents.session_thread import SessionInfo
from deconvd_client.shared_memory import Borrower

__all__ = ["KnownDigests"]

_MIN_BYTES: Final = 64 << 10
"""Smaller operands are sent: that takes about as long as computing their digest and looking it up."""

_MIN_HOPED_BYTES: Final = 4 << 20
"""From which size on a connection hopes that another of its tenant has sent the same elements.

To send them takes longer then, over a network, than the round trip that is lost if there is no other.
"""

_MAX_KNOWN_COUNT: Final = 4096
"""How many digests are remembered. The least recently used one is forgotten first."""

_OPEN_TIMEOUT_S: Final = 2.0
"""How long it may take to open a session that calls can do without."""

_PAUSE_S: Final = 2.0
"""How long digests are not used after a session was lost or could not be opened."""


class KnownDigests:
    """The digests that the server has or lacks for a session, each with a shape and an element type. Thread-safe.

    Args:
        session: It is opened for the first operand that is worth a digest.
        borrower: If the server lends memory, operands are in that memory and digests are not used.
        patience: Bounds how long calls wait for the session.
    """

    def __init__(self, session: ClientSession, borrower: Borrower, patience: Patience) -> None:
        self._session = session
        self._borrower = borrower
        self._patience = patience
        self._opening = SharedTask()
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
        return session is not None and session.can_remember and array.nbytes <= session.quota_bytes

    def expects(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> bool:
        """Return whether the server should have these elements, from this connection or from another of its tenant."""
        with self._lock:
            is_known = self._known.get((session, spec, digest.blake3))
        if is_known is not None:
            return is_known
        return self._session.is_shared and spec.nbytes >= _MIN_HOPED_BYTES

    def learn(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Note that the server has these elements."""
        with self._lock:
            self._known.put((session, spec, digest.blake3), True)

    def forget(self, session: bytes, spec: TensorSpec, digest: pb.Digest) -> None:
        """Note that the server does not have these elements."""
        with self._lock:
            self._known.put((session, spec, digest.blake3), False)

    def pause(self) -> None:
        """Stop using digests for a while. Calls seem to reach several servers, and not all know the session."""
        self._paused_until_s = time.monotonic() + _PAUSE_S

    def _try_open_session(self, deadline: Deadline) -> SessionInfo | None:
        """Return the session. None if there is none now, or the server has no sessions at all.

        The session is opened in the background, while calls send what they could name.
        """
        if self._is_off or time.monotonic() < self._paused_until_s:
            return None
        if (session := self._session.current) is not None:
            return session
        limit_s = min(_OPEN_TIMEOUT_S, self._patience.remaining_s(), deadline.remaining_s())
        self._opening.run(self._open_session, limit_s)
        return self._session.current

    def _open_session(self) -> None:
        """Open a session if that is possible. If the server is in trouble, the calls themselves report it."""
        try:
            self._session.open(Deadline(_OPEN_TIMEOUT_S), fail_fast=True)
        except UnimplementedError:
            self._is_off = True
        except DeconvdError:
            self.pause()
