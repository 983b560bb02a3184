"""Tensors that stay on the server: put there, fetched, and had anew where it has lost them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import numpy as np

from deconvd.errors import ExhaustedError, LostSessionError, LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd_client.calls.call_spec import LastLedger
from deconvd_client.calls.deadline import Deadline
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
"""How many sessions one call may lose: more is no accident."""


class ResidentExecutor:
    """What the server keeps for a connection. Thread-safe.

    Args:
        nearest: The ways to the server.
        memory: Memory that it may lend.
        tenant_key: As in HoldSessionRequest.
        empty: Returns new memory for a tensor.
        last: Takes note of the ledgers.
        timeout_s: How long each call may take.

    Attributes:
        contents: Which operands are worth naming by their digests, and are known there.
    """

    def __init__(
        self,
        nearest: Route,
        memory: Borrower,
        tenant_key: bytes,
        empty: Callable[[TensorSpec], Array],
        last: LastLedger,
        timeout_s: float,
    ) -> None:
        self._ledger = last
        self._timeout_s = timeout_s
        self._session = ClientSession(nearest, tenant_key)
        self.known_digests: KnownDigests = KnownDigests(self._session, memory)
        self._transfers = Transfers(nearest, memory, empty)

    def put(self, array: Array) -> Resident:
        """Have the server keep an array; it is referred to, to be sent again at need."""
        deadline = Deadline(self._timeout_s)
        source = SourceArray(array)
        kept = Resident(spec_of(array), source=source)
        self.run_in_session(lambda session: self._put(session, kept, source, deadline), deadline)
        return kept

    def get(self, kept: Resident) -> Array:
        """Return the elements of a tensor that the server keeps.

        Raises:
            LostTensorError: The server no longer has it, and there is no array to take them from.
        """
        deadline = Deadline(self._timeout_s)
        return self.run_in_session(lambda session: self._get(session, kept, deadline), deadline)

    @property
    def has_session(self) -> bool:
        """Whether a session is open now, as far as is known."""
        return self._session.is_open

    @property
    def session_name(self) -> bytes:
        """The name of the session that is open now, as far as is known; empty if there is none."""
        return self._session.name

    def attempt_context(self, session: bytes, deadline: Deadline) -> AttemptContext:
        """Return what an attempt needs to make a call in a session."""
        return AttemptContext(
            session,
            self.known_digests,
            deadline,
            put=lambda kept, source: self._put(session, kept, source, deadline),
            make_handle=partial(self._session.make_handle, session),
        )

    def run_in_session(self, work: Callable[[bytes], _T], deadline: Deadline) -> _T:
        """Return what `work` returns for the session, in a new one if the server does not know it."""
        for _ in range(_MAX_SESSIONS_COUNT - 1):
            session = self._session.open(deadline).name
            try:
                return work(session)
            except LostSessionError:
                self._session.lose(session)
                self.known_digests.pause()
        return work(self._session.open(deadline).name)

    def retry_after_flush(self, work: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `work` returns, once what nobody uses is dropped if the server has no room."""
        try:
            return work()
        except ExhaustedError:
            self._session.flush(deadline)
        return work()

    def close(self, deadline: Deadline) -> None:
        """End the session: the server drops all that it keeps for it."""
        self._session.close(deadline)

    def _put(
        self, session: bytes, kept: Resident, source: SourceArray, deadline: Deadline
    ) -> ResidentHandle:
        with source.hash_in_background():
            resident, self._ledger.text = self.retry_after_flush(
                lambda: self._transfers.put(session, source.array, deadline), deadline
            )
        handle = self._session.make_handle(session, resident, kept.spec.nbytes)
        kept.adopt(handle)
        return handle

    def _get(self, session: bytes, kept: Resident, deadline: Deadline) -> Array:
        handle = kept.handle_for(session)
        if handle is not None:
            try:
                array, self._ledger.text = self._transfers.get(
                    session, handle.resident, kept.spec, deadline
                )
            except LostTensorError:
                kept.lose(handle)
            else:
                return array
        return np.array(kept.require_source("the tensor").array, kept.spec.dtype)
