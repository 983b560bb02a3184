"""How a call is made: which operands are residents, which path its tensors take, and what is tried again."""

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
from deconvd_client.transports.large_call import make_large_call
from deconvd_client.transports.route import Route
from deconvd_client.transports.sliced_stream import pays_as_stream
from deconvd_client.transports.stub import Stub

__all__ = ["Dispatcher"]

_MAX_UNARY_BYTES: Final = (4 << 20) - (64 << 10)
"""Largest operands and results together of a message: a stream is faster above it, and proxies have limits of 4 MiB."""

_MAX_BRIEF_BYTES: Final = MAX_MESSAGE_BYTES - (16 << 10)
"""The same for a message on a direct connection: up to here its copies cost less than a stream."""


class Dispatcher:
    """Makes the calls to one server. Thread-safe.

    The path of a call, and where it branches:

        `Dispatcher.execute`    all operands are sent | some are residents, or are named by digest: `ResidentExecutor`
        `Route.call`            by the server's Unix socket | by its target; retries, after a pause
        `Dispatcher._send_once` large tensors in shared memory | all in one message | `make_large_call`
        `make_large_call`       striped over several direct connections | slice by slice in a stream
        `Stub`                  small messages and streams by `Failover` | the rest by gRPC
        `Failover`              by a direct connection | by gRPC, if there is none

    Args:
        route: Leads to the server.
        borrower: Memory that the server may lend; None if tensors must not go that way.
        residents: The tensors that the server keeps.
        empty: Returns new memory for a result.
        ledger: Receives the ledger of each call.
        timeout_s: How long each call may take.
    """

    def __init__(
        self,
        route: Route,
        borrower: Borrower | None,
        residents: ResidentExecutor,
        empty: Callable[[TensorSpec], Array],
        ledger: LastLedger,
        timeout_s: float,
    ) -> None:
        self._route = route
        self._borrower = borrower
        self._residents = residents
        self._empty = empty
        self._timeout_s = timeout_s
        self._ledger = ledger

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
        call_spec = CallSpec(
            call.operation, call.request, call.problem, operands, call.results, deadline
        )
        return self.send(call_spec, self._borrower).arrays

    def execute_and_keep(self, call: Call) -> dict[str, Resident]:
        """Make a call whose results stay on the server, and return them as residents, by the names of their fields.

        Raises:
            LostTensorError: As for `execute`.
        """
        attempt, result = self._execute_with_residents(call, Deadline(self._timeout_s))
        return attempt.results(result.response)

    def send(self, call_spec: CallSpec, borrower: Borrower | None) -> CallResult:
        """Make a call whose operands are ready to be sent, and try it again where that helps.

        Args:
            borrower: Memory for large tensors, on the host or on a card; None if they are sent.
        """
        work = partial(self._send_once, borrower=borrower, call_spec=call_spec)
        result = self._route.call(work, call_spec.deadline)
        self._ledger.text = result.ledger
        return result

    def _execute_with_residents(self, call: Call, deadline: Deadline) -> tuple[Attempt, CallResult]:
        """Make a call that has residents, and return the attempt that succeeded."""
        work = partial(self._execute_in_session, call=call, deadline=deadline)
        return self._residents.run_in_session(work, deadline)

    def _execute_in_session(
        self, session: bytes, call: Call, deadline: Deadline
    ) -> tuple[Attempt, CallResult]:
        """Make a call in a session; make it again each time the server says that it has lost an operand."""
        context = self._residents.attempt_context(session, deadline)
        for _ in call.operands:
            attempt = Attempt(call, context)
            try:
                return attempt, self._send_attempt(attempt)
            except LostTensorError as error:
                if not attempt.forget(error.argument):
                    raise
        last = Attempt(call, context, send_all=True)
        return last, self._send_attempt(last)

    def _send_attempt(self, attempt: Attempt) -> CallResult:
        call_spec = attempt.call_spec
        with attempt.hash_in_background():
            if attempt.needs_room:
                work = partial(self.send, call_spec, self._borrower)
                result = self._residents.retry_after_flush(work, call_spec.deadline)
            else:
                result = self.send(call_spec, self._borrower)
        attempt.record_response(result.response)
        return result

    def _send_once(self, stub: Stub, borrower: Borrower | None, call_spec: CallSpec) -> CallResult:
        """Make a call once: through shared memory, in one message, or in parts."""
        if borrower is not None:
            result = call_with_shared_memory(borrower, stub.call, call_spec)
            if result is not None:
                return result
        payload_bytes = 0
        tensors: list[Array | TensorSpec] = [
            *call_spec.operands.values(),
            *call_spec.results.values(),
        ]
        for tensor in tensors:
            payload_bytes += tensor.nbytes
        is_brief = payload_bytes <= _MAX_BRIEF_BYTES
        is_message = is_brief or (
            payload_bytes <= _MAX_UNARY_BYTES
            and not stub.is_direct
            and not pays_as_stream(call_spec, stub.link_rate)
        )
        if is_message:
            raw: dict[str, Buffer] = {}
            for field, array in call_spec.operands.items():
                raw[field] = elements_of(array)
            request = Envelope(call_spec.request, raw)
            return stub.call(call_spec, request, placed={}, is_brief=is_brief)
        return make_large_call(stub, call_spec, self._empty)
