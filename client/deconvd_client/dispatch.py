"""How a call is made: which of its operands stay on the server, by which way it goes, and what is tried again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from deconvd.direct.events import MAX_MESSAGE_BYTES
from deconvd.errors import LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.codec import Buffer, Envelope
from deconvd.wire.tensor import elements_of
from deconvd_client.calls.call_spec import CallResult, CallSpec, LastLedger
from deconvd_client.calls.deadline import Deadline
from deconvd_client.residents import Attempt, Call, Resident, ResidentExecutor
from deconvd_client.shared_memory import Borrower, call_with_shared_memory
from deconvd_client.transports.route import Route
from deconvd_client.transports.sliced_stream import begin_stream_attempt
from deconvd_client.transports.stub import Stub

__all__ = ["Dispatcher"]

_MAX_UNARY_BYTES: Final = (4 << 20) - (64 << 10)
"""Operands and results together: a stream is faster above it, and proxies have limits of 4 MiB."""

_MAX_BRIEF_BYTES: Final = MAX_MESSAGE_BYTES - (16 << 10)
"""Operands and results together, of a direct call in one message: to copy so little costs less than a stream."""


class Dispatcher:
    """Makes the calls of one server. Thread-safe.

    The way of a call, and where each turning is taken:

        here, `arrays`     operands as they are | some stay there, or are named by their digests: `Residents`
        `Nearest.call`     the server's Unix socket | its target; and again, after a pause
        here, `_call_with_retry`  tensors in shared memory | all in one message | slice by slice in a stream
        `Stub`             by `Failover`, what is brief and streams | by gRPC, the rest
        `Failover`         by a direct connection | by gRPC, if there is none

    Args:
        nearest: The ways to the server.
        memory: Memory that it may lend; None if tensors are not to go that way.
        residents: What it keeps.
        empty: Returns new memory for a result.
        last: Takes note of the ledgers.
        timeout_s: How long each call may take.
    """

    def __init__(
        self,
        nearest: Route,
        memory: Borrower | None,
        residents: ResidentExecutor,
        empty: Callable[[TensorSpec], Array],
        last: LastLedger,
        timeout_s: float,
    ) -> None:
        self._route = nearest
        self._borrower = memory
        self._residents = residents
        self._empty = empty
        self._timeout_s = timeout_s
        self._ledger = last

    def execute(self, call: Call) -> dict[str, Array]:
        """Make a call and return its results, by the names of their fields.

        Raises:
            LostTensorError: The server no longer has an operand, and it cannot be sent again.
        """
        deadline = Deadline(self._timeout_s)
        operands: dict[str, Array] = {}
        for field, operand in call.operands.items():
            if isinstance(operand, Resident) or (
                field in call.operation.constants
                and self._residents.known_digests.is_worth_hashing(operand, deadline)
            ):
                return self._execute_with_residents(call, deadline)[1].arrays
            operands[field] = operand
        asked = CallSpec(
            call.operation, call.request, call.problem, operands, call.results, deadline
        )
        return self.send(asked, self._borrower).arrays

    def execute_and_keep(self, call: Call) -> dict[str, Resident]:
        """Make a call whose results stay on the server, and return what stands for them.

        Raises:
            LostTensorError: As for `arrays`.
        """
        attempt, answered = self._execute_with_residents(call, Deadline(self._timeout_s))
        return attempt.results(answered.response)

    def send(self, asked: CallSpec, memory: Borrower | None) -> CallResult:
        """Make a call whose operands are as they are to be.

        Args:
            memory: For large tensors: on the host or on a card, if there may be any.
        """
        work = partial(self._send_once, memory=memory, asked=asked)
        answered = self._route.call(work, asked.deadline)
        self._ledger.text = answered.ledger
        return answered

    def _execute_with_residents(self, call: Call, deadline: Deadline) -> tuple[Attempt, CallResult]:
        """Make a call that has residents, and return the attempt that was answered."""
        work = partial(self._execute_in_session, call=call, deadline=deadline)
        return self._residents.run_in_session(work, deadline)

    def _execute_in_session(
        self, session: bytes, call: Call, deadline: Deadline
    ) -> tuple[Attempt, CallResult]:
        """Make a call in a session: again, once the server has said what it has lost."""
        means = self._residents.attempt_context(session, deadline)
        for _ in call.operands:
            attempt = Attempt(call, means)
            try:
                return attempt, self._send_attempt(attempt)
            except LostTensorError as error:
                if not attempt.forget(error.argument):
                    raise
        last = Attempt(call, means, send_all=True)
        return last, self._send_attempt(last)

    def _send_attempt(self, attempt: Attempt) -> CallResult:
        asked = attempt.call_spec
        with attempt.hash_in_background():
            if attempt.needs_room:
                work = partial(self.send, asked, self._borrower)
                answered = self._residents.retry_after_flush(work, asked.deadline)
            else:
                answered = self.send(asked, self._borrower)
        attempt.record_response(answered.response)
        return answered

    def _send_once(self, stub: Stub, memory: Borrower | None, asked: CallSpec) -> CallResult:
        """Make a call once: through shared memory, in one message, or in a stream."""
        if memory is not None:
            shared = call_with_shared_memory(memory, stub.call, asked)
            if shared is not None:
                return shared
        tensors_bytes = _payload_bytes(asked)
        is_brief = tensors_bytes <= _MAX_BRIEF_BYTES
        is_message = is_brief or (tensors_bytes <= _MAX_UNARY_BYTES and not stub.is_direct)
        if not (asked.are_digests_known and is_message):
            (message, arrays), ledger = stub.stream(
                partial(begin_stream_attempt, asked, self._empty), asked.deadline
            )
            return CallResult(message, arrays, ledger)
        raw: dict[str, Buffer] = {field: elements_of(a) for field, a in asked.operands.items()}
        return stub.call(asked, Envelope(asked.request, raw), placed={}, is_brief=is_brief)


def _payload_bytes(asked: CallSpec) -> int:
    """Return what the tensors have that a call would carry, to and fro."""
    tensors: list[Array | TensorSpec] = [*asked.operands.values(), *asked.results.values()]
    return sum(tensor.nbytes for tensor in tensors)
