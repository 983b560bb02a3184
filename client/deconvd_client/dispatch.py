"""How a call is made: which operands are residents, which path its tensors take, and what is tried again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Final

from deconvd.direct.events import MAX_MESSAGE_BYTES
from deconvd.errors import LostTensorError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Buffer, Envelope
from deconvd.wire.messages import USE_CUDNN_TENSOR_CORE
from deconvd.wire.span_attributes import problem_attributes
from deconvd.wire.tensor import elements_of
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.request_id import current_request_id, name_call
from deconvd_client.calls.tracing import (
    TRACE_SDK,
    current_call_span,
    record_call,
    records_spans,
)
from deconvd_client.calls.transfer import Transfer
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


_MAX_SHARED_BYTES: Final = 128 << 20
"""Largest operands and results together that `Dispatcher.execute_into` puts into shared memory."""


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
        ledgers: Records the ledger of each call.
        timeout_s: How long each call may take.
    """

    def __init__(
        self,
        route: Route,
        borrower: Borrower | None,
        residents: ResidentExecutor,
        empty: Callable[[TensorSpec], Array],
        ledgers: LedgerRecorder,
        timeout_s: float,
    ) -> None:
        self._route = route
        self._borrower = borrower
        self._residents = residents
        self._empty = empty
        self._timeout_s = timeout_s
        self._ledgers = ledgers

    def execute(self, call: Call, deadline: Deadline | None = None) -> dict[str, Array]:
        """Make a call and return its results, by the names of their fields.

        Args:
            deadline: When the caller must have an answer; None for the time that each call may take.

        Raises:
            LostTensorError: The server no longer has an operand, and it cannot be sent again.
        """
        if deadline is None:
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

    def execute_into(self, call: Call, transfer: Transfer) -> None:
        """Make a call whose results go where `transfer` says.

        All operands are sent, also those that others name by their digest. Shared memory is used only for small calls:
        it counts as memory of this process, and the caller has other memory already.

        Args:
            call: Its operands are on the host, and none is a resident.
        """
        operands: dict[str, Array] = {}
        total_bytes = sum(spec.nbytes for spec in call.results.values())
        for field, operand in call.operands.items():
            assert not isinstance(operand, Resident)
            operands[field] = operand
            total_bytes += operand.nbytes
        call_spec = CallSpec(
            call.operation,
            call.request,
            call.problem,
            operands,
            call.results,
            Deadline(self._timeout_s),
            transfer,
        )
        borrower = self._borrower if total_bytes <= _MAX_SHARED_BYTES else None
        transfer.collect(self.send(call_spec, borrower).arrays)

    def execute_and_keep(self, call: Call, deadline: Deadline | None = None) -> dict[str, Resident]:
        """Make a call whose results stay on the server, and return them as residents, by the names of their fields.

        Args:
            deadline: As for `execute`.

        Raises:
            LostTensorError: As for `execute`.
        """
        deadline = deadline or Deadline(self._timeout_s)
        attempt, result = self._execute_with_residents(call, deadline)
        return attempt.results(result.response)

    def send(self, call_spec: CallSpec, borrower: Borrower | None) -> CallResult:
        """Make a call whose operands are ready to be sent, and try it again where that helps.

        Args:
            borrower: Memory for large tensors, on the host or on a card; None if they are sent.
        """
        # small calls notice each function: the first two conditions need none
        if TRACE_SDK in sys.modules and current_call_span.get() is None and records_spans():
            return self._send_recorded(call_spec, borrower)
        request_id = current_request_id.get()
        if request_id:
            call_spec = name_call(call_spec, request_id)
        work = partial(self._send_once, borrower=borrower, call_spec=call_spec)
        start_s = time.perf_counter()
        result = self._route.call(work, call_spec.deadline)
        self._ledgers.last.text = result.ledger
        if self._ledgers.lists.get():  # small calls notice each function
            self._ledgers.record(call_spec.operation.name, result.ledger, start_s)
        return result

    def _send_recorded(self, call_spec: CallSpec, borrower: Borrower | None) -> CallResult:
        """Make a call as `send` does, and record its span."""
        attributes = {
            **problem_attributes(call_spec.problem),
            "deconvd.sent_bytes": sum(array.nbytes for array in call_spec.operands.values()),
            "deconvd.received_bytes": sum(spec.nbytes for spec in call_spec.results.values()),
        }
        with record_call(call_spec.operation.name, attributes) as span:
            request = deepcopy(call_spec.request)  # other calls share the original
            span.write_context(request.telemetry)
            result = self.send(replace(call_spec, request=request), borrower)
            span.finish(result.ledger)
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
        if (span := current_call_span.get()) is not None:
            span.begin_attempt(stub.target)
        options = call_spec.request.options
        if options.use_cudnn_tensor_core == pb.USE_CUDNN_TENSOR_CORE_NEVER:
            remedy = "update it, or do without the value 'never'"
            stub.require_feature(USE_CUDNN_TENSOR_CORE, remedy, call_spec.deadline)
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
