"""Puts residents on the server, fetches them, and runs calls in the session that keeps them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import numpy as np

from deconvd.errors import ExhaustedError, LostSessionError, LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.patience import Patience
from deconvd_client.residents.attempt import AttemptContext
from deconvd_client.residents.known_digests import KnownDigests
from deconvd_client.residents.resident import Resident
from deconvd_client.residents.session import ClientSession, ResidentHandle
from deconvd_client.residents.source_array import SourceArray
from deconvd_client.residents.transfers import Transfers
from deconvd_client.shared_memory import Borrower
from deconvd_client.transports.route import Route

__all__ = ["ResidentExecutor"]

_T = TypeVar("_T")

_MAX_SESSIONS_COUNT: Final = 3
"""How many sessions one call may use. A server that loses more of them in one call will not answer it either."""


class ResidentExecutor:
    """Manages the residents of one connection. Thread-safe.

    Args:
        route: Leads to the server.
        borrower: Memory that the server may lend.
        tenant_key: As in HoldSessionRequest.
        empty: Returns new memory for a tensor.
        ledgers: Records the ledger of each call.
        timeout_s: How long each call may take, in seconds.
        patience: Bounds how long calls wait for a session that they can do without.

    Attributes:
        known_digests: Decides which operands to name by their digests.
    """

    def __init__(
        self,
        route: Route,
        borrower: Borrower,
        tenant_key: bytes,
        empty: Callable[[TensorSpec], Array],
        ledgers: LedgerRecorder,
        timeout_s: float,
        patience: Patience,
    ) -> None:
        self._ledgers = ledgers
        self._timeout_s = timeout_s
        self._session = ClientSession(route, tenant_key)
        self.known_digests: KnownDigests = KnownDigests(self._session, borrower, patience)
        self._transfers = Transfers(route, borrower, empty)

    def put(self, array: Array, deadline: Deadline | None = None) -> Resident:
        """Send an array, and return the resident. The resident refers to the array, so that it can be sent again."""
        limit = deadline or Deadline(self._timeout_s)
        source = SourceArray(array)
        resident = Resident(spec_of(array), source=source)
        self.run_in_session(lambda session: self._put(session, resident, source, limit), limit)
        return resident

    def get(self, resident: Resident, deadline: Deadline | None = None) -> Array:
        """Return the elements of a resident as a new array.

        Raises:
            LostTensorError: The server no longer has it, and its source has changed or never was on this side.
        """
        limit = deadline or Deadline(self._timeout_s)
        return self.run_in_session(lambda session: self._get(session, resident, limit), limit)

    @property
    def has_session(self) -> bool:
        """Whether a session is open. The server may have ended it without the client knowing yet."""
        return self._session.current is not None

    @property
    def session_name(self) -> bytes:
        """The name of the open session. Empty if none is open."""
        return self._session.name

    def knows_session(self, name: bytes) -> bool:
        """Return whether the session of that name is the one that is open here."""
        return name == self.session_name

    def attempt_context(self, session: bytes, deadline: Deadline) -> AttemptContext:
        """Return what an attempt needs for a call in a session."""
        return AttemptContext(
            session,
            self.known_digests,
            deadline,
            put=lambda resident, source: self._put(session, resident, source, deadline),
            make_handle=partial(self._session.make_handle, session),
        )

    def run_in_session(self, work: Callable[[bytes], _T], deadline: Deadline) -> _T:
        """Call `work` with the name of the session. If the server does not know the session, open a new one."""
        for _ in range(_MAX_SESSIONS_COUNT - 1):
            session = self._session.open(deadline).name
            try:
                return work(session)
            except LostSessionError:
                self._session.lose(session)
                self.known_digests.pause()
        return work(self._session.open(deadline).name)

    def retry_after_flush(self, work: Callable[[], _T], deadline: Deadline) -> _T:
        """Call `work`. If the server has no room, drop all residents that nobody uses, and call it once more."""
        try:
            return work()
        except ExhaustedError:
            self._session.flush(deadline)
        return work()

    def close(self, deadline: Deadline) -> None:
        """End the session. The server then drops all residents of it."""
        self._session.close(deadline)

    def _put(
        self, session: bytes, resident: Resident, source: SourceArray, deadline: Deadline
    ) -> ResidentHandle:
        start_s = time.perf_counter()
        with source.hash_in_background():
            name, ledger = self.retry_after_flush(
                lambda: self._transfers.put(session, source.array, deadline), deadline
            )
        self._ledgers.record("PutTensor", ledger, start_s)
        handle = self._session.make_handle(session, name, resident.spec.nbytes)
        resident.adopt(handle)
        return handle

    def _get(self, session: bytes, resident: Resident, deadline: Deadline) -> Array:
        handle = resident.handle_for(session)
        if handle is not None:
            start_s = time.perf_counter()
            try:
                array, ledger = self._transfers.get(
                    session, handle.resident, resident.spec, deadline
                )
            except LostTensorError:
                resident.lose(handle)
            else:
                self._ledgers.record("GetTensor", ledger, start_s)
                return array
        return np.array(resident.require_source("the tensor").array, resident.spec.dtype)
