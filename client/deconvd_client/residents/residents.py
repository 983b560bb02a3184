"""Tensors that stay on the server, and calls that use them: made again where it has lost some."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import numpy as np

from deconvd.errors import ExhaustedError, LostSessionError, LostTensorError
from deconvd.tensor import Array, spec_of
from deconvd_client import calls
from deconvd_client.asked import Answered, Asked
from deconvd_client.deadline import Deadline
from deconvd_client.nearest import Nearest
from deconvd_client.residents.attempt import Attempt, Call, Means
from deconvd_client.residents.contents import Contents
from deconvd_client.residents.kept import Kept
from deconvd_client.residents.session import Handle, Session
from deconvd_client.residents.source import Source
from deconvd_client.residents.transfers import Transfers
from deconvd_client.shared_memory import Borrower

__all__ = ["Residents"]

_T = TypeVar("_T")

_SESSIONS_COUNT: Final = 3
"""How many sessions one call may lose: more is no accident."""


class Residents:
    """What the server keeps for a connection. Thread-safe.

    Args:
        nearest: The ways to the server.
        memory: Memory that it may lend.
        tenant_key: As in HoldSessionRequest.
        timeout_s: How long each call may take.
    """

    def __init__(
        self, nearest: Nearest, memory: Borrower, tenant_key: bytes, timeout_s: float
    ) -> None:
        self._nearest = nearest
        self._timeout_s = timeout_s
        self._memory = memory
        self._session = Session(nearest, tenant_key)
        self._contents = Contents(self._session, memory)
        self._transfers = Transfers(nearest, memory)

    def put(self, array: Array) -> Kept:
        """Have the server keep an array; it is referred to, to be sent again at need."""
        deadline = Deadline(self._timeout_s)
        source = Source(array)
        kept = Kept(spec_of(array), source=source)
        self._in_session(lambda session: self._put(session, kept, source, deadline), deadline)
        return kept

    def get(self, kept: Kept) -> Array:
        """Return the elements of a tensor that the server keeps.

        Raises:
            LostTensorError: The server no longer has it, and there is no array to take them from.
        """
        deadline = Deadline(self._timeout_s)
        return self._in_session(lambda session: self._got(session, kept, deadline), deadline)

    def arrays(self, call: Call) -> dict[str, Array]:
        """Make a call and return its results, by the names of their fields.

        Raises:
            LostTensorError: The server no longer has an operand, and it cannot be sent again.
        """
        deadline = Deadline(self._timeout_s)
        operands: dict[str, Array] = {}
        for field, operand in call.operands.items():
            if isinstance(operand, Kept) or (
                field in call.operation.constants and self._contents.is_worth(operand, deadline)
            ):
                return self._made(call, deadline)[1].arrays
            operands[field] = operand
        asked = Asked(call.operation, call.request, call.problem, operands, call.results, deadline)
        return self._sent(asked).arrays

    def kept(self, call: Call) -> dict[str, Kept]:
        """Make a call whose results stay on the server, and return what stands for them.

        Raises:
            LostTensorError: As for `arrays`.
        """
        attempt, answered = self._made(call, Deadline(self._timeout_s))
        return attempt.results(answered.response)

    def close(self, deadline: Deadline) -> None:
        """End the session: the server drops all that it keeps for it."""
        self._session.close(deadline)

    def _made(self, call: Call, deadline: Deadline) -> tuple[Attempt, Answered]:
        """Make a call, and return the attempt that was answered."""

        def made(session: bytes) -> tuple[Attempt, Answered]:
            means = self._means(session, deadline)
            for _ in call.operands:
                attempt = Attempt(call, means)
                try:
                    return attempt, self._answered(call, attempt)
                except LostTensorError as error:
                    if not attempt.forget(error.argument):
                        raise
            last = Attempt(call, means, send_all=True)
            return last, self._answered(call, last)

        return self._in_session(made, deadline)

    def _answered(self, call: Call, attempt: Attempt) -> Answered:
        with attempt.beside():
            if attempt.keeps:
                asked = attempt.asked
                answered = self._with_room(lambda: self._sent(asked), asked.deadline)
            else:
                answered = self._sent(attempt.asked)
        attempt.settle(answered.response)
        return answered

    def _sent(self, asked: Asked) -> Answered:
        return self._nearest.call(
            lambda stub: calls.answer(stub, self._memory, asked), asked.deadline
        )

    def _means(self, session: bytes, deadline: Deadline) -> Means:
        return Means(
            session,
            self._contents,
            deadline,
            put=lambda kept, source: self._put(session, kept, source, deadline),
            handle=partial(self._session.handle, session),
        )

    def _put(self, session: bytes, kept: Kept, source: Source, deadline: Deadline) -> Handle:
        with source.beside():
            resident = self._with_room(
                lambda: self._transfers.put(session, source.array, deadline), deadline
            )
        handle = self._session.handle(session, resident, kept.spec.nbytes)
        kept.adopt(handle)
        return handle

    def _got(self, session: bytes, kept: Kept, deadline: Deadline) -> Array:
        handle = kept.handle_in(session)
        if handle is not None:
            try:
                return self._transfers.get(session, handle.resident, kept.spec, deadline)
            except LostTensorError:
                kept.lose(handle)
        return np.array(kept.source_unchanged("the tensor").array, kept.spec.dtype)

    def _in_session(self, work: Callable[[bytes], _T], deadline: Deadline) -> _T:
        """Return what `work` returns for the session, in a new one if the server does not know it."""
        for _ in range(_SESSIONS_COUNT - 1):
            session = self._session.open(deadline).name
            try:
                return work(session)
            except LostSessionError:
                self._session.lose(session)
                self._contents.pause()
        return work(self._session.open(deadline).name)

    def _with_room(self, work: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `work` returns, once what nobody uses is dropped if the server has no room."""
        try:
            return work()
        except ExhaustedError:
            self._session.flush(deadline)
        return work()
