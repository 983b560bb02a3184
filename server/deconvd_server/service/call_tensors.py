"""The tensors of one call: where its operands come from, and where its results go."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from google.protobuf.message import Message

from deconvd.errors import (
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope
from deconvd.wire.digest import digest_of
from deconvd.wire.messages import messages_for
from deconvd.wire.tensor import array_of_spec, elements_of
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Operand, Tensor
from deconvd_server.device.arriving import ArrivalProgress, Arriving, wait_for
from deconvd_server.engine.engine import Engine, ResultTarget
from deconvd_server.residents import CallResidents, Residents
from deconvd_server.service.method import OverlappedRequest
from deconvd_server.service.parsed_request import ParsedRequest
from deconvd_server.shared_memory import Lender, SharedTensors

__all__ = ["CallTensors"]


class CallTensors:
    """The tensors of one call, from its request to its response. Use it as a context.

    If the operands come with the request, call in this order:

        take_operands, prepare, answer

    If the operands come in a stream, call in this order, and `make_residents` in between for new residents:

        find_present, choose_engine, bring_operands, response, remember, commit

    If they are striped over several connections:

        find_present, choose_engine, take_arriving, make_residents, bring_operands, commit, response

    New residents get handles, which are valid once they are committed. The end of the block releases everything.

    Attributes:
        parsed: The parsed request.
        brought_bytes: The size of the elements that came in the request itself: they take host memory of the call's.

    Args:
        request: The call's message, without elements.
        lender: Lends the shared memory that tensors may be in; None if the server lends none.
        residents: The engines, and the residents on their devices.

    Raises:
        LostSessionError: The request needs a session, and does not name one that exists.
        UnimplementedError: The request wants wide sums, which a device does not compute.
    """

    def __init__(
        self,
        request: Any,
        parsed: ParsedRequest,
        lender: Lender | None,
        residents: Residents,
        call: CallContext,
    ) -> None:
        self.parsed = parsed
        call.problem, call.waits = parsed.problem, parsed.waits
        self.brought_bytes = 0
        self._request = request
        self._call = call
        self._engines = residents.engines
        if parsed.has_wide_sums and not self._engines.have_wide_sums:
            raise UnimplementedError("a device of this server has no wide_sums: leave them out")
        self._lender = lender
        self._shared: SharedTensors | None = None
        self._residents: CallResidents | None = None
        if parsed.needs_session:
            session = residents.join(request.session, call)
            self._residents = CallResidents(residents.registry, session, call)
        self._operands: dict[str, Operand] = {}
        self._places: dict[str, Tensor] = {}

    def __enter__(self) -> CallTensors:
        return self

    def __exit__(self, *_: object) -> None:
        if self._residents is not None:
            self._residents.release()
        if self._shared is not None:
            self._shared.__exit__()

    # From the request

    def take_operands(self, request: Envelope[Message]) -> None:
        """Find all operands of a request, even if they are still arriving, and the places for its results.

        Raises:
            InvalidArgumentError: As `SharedTensors.operand` and `array_of_spec` do.
            NotFoundError: The request names something that does not exist.
        """
        self.brought_bytes = sum(map(len, request.raw.values()))
        if self.parsed.shared_slices:
            self._take_shared(request)
        self._call.received_bytes = self.brought_bytes + self.parsed.shared_operands_bytes
        for field, spec in self.parsed.operands.items():
            if field in self.parsed.shared_slices:
                continue
            argument, tensor = ARGUMENTS[field], getattr(self._request, field)
            if self._residents is None or field not in self.parsed.named:
                self._operands[field] = array_of_spec(
                    argument, spec, tensor, request.raw.get(field)
                )
            else:
                self._residents.find(field, spec, tensor)

    def _take_shared(self, request: Envelope[Message]) -> None:
        """Find the operands that are in shared memory, and the places there for results."""
        operands, results = self.parsed.operands, self.parsed.results
        self._shared = shared = SharedTensors(self._lender, self._call.identity)
        self._call.transport = "shared_memory"
        for field, shared_slice in self.parsed.shared_slices.items():
            if field in operands:
                self._operands[field] = shared.operand(
                    ARGUMENTS[field], operands[field], shared_slice
                )
            else:
                self._places[field] = shared.place(f"{field}_place", results[field], shared_slice)
        if isinstance(request, OverlappedRequest):
            self._mark_arriving(request.progress)

    def _mark_arriving(self, progress: ArrivalProgress) -> None:
        """Mark the operands in shared memory as arriving, one after the other.

        The progress counts bytes over all of them, so each needs to know how many bytes come before its own.
        """
        begin_bytes = 0
        for field in self.parsed.operation.write_order:
            if field in self.parsed.operands and field in self.parsed.shared_slices:
                operand = self._operands[field]
                if isinstance(operand, np.ndarray):  # a tensor on a card is written before the call
                    self._operands[field] = Arriving(operand, progress, begin_bytes)
                begin_bytes += self.parsed.operands[field].nbytes

    def prepare(self) -> tuple[Engine, Mapping[str, Operand], Mapping[str, ResultTarget]]:
        """Choose an engine; return it, the operands as it can use them, and a target for each result.

        An operand may still be arriving. The target of a result is its place in shared memory, or a new resident, or,
        if the result is sent in the response, its spec.

        Raises as `choose_engine` and `bring_operands` do.
        """
        engine = self.choose_engine()
        if self._residents is None:
            return engine, self._operands, {**self._places, **self.parsed.sent_results}
        operands = self.bring_operands(engine)
        new_residents = self.make_residents(self.parsed.results, engine)
        return engine, operands, {**self._places, **new_residents, **self.parsed.sent_results}

    def find_present(self) -> None:
        """Find the operands of a stream that are on the server already.

        Raises:
            InvalidArgumentError: An operand has elements in the header.
            NotFoundError: The request names something that does not exist.
        """
        for field, spec in self.parsed.operands.items():
            argument, tensor = ARGUMENTS[field], getattr(self._request, field)
            payload = tensor.WhichOneof("payload")
            if payload in ("raw", "shared"):
                raise InvalidArgumentError(
                    f"{argument} must have its elements behind a stream's header, or be on the "
                    f"server already, got them as {payload}",
                    argument=argument,
                )
            if self._residents is not None and field in self.parsed.named:
                self._residents.find(field, spec, tensor)

    def choose_engine(self) -> Engine:
        """Choose the engine for the call.

        It is the engine of the card that holds the client's arrays; else the one that holds most bytes of the call's
        resident operands; else the least loaded.

        Raises:
            InvalidArgumentError: The client has arrays on several cards.
        """
        engines = self._engines
        if len(engines.all) == 1:
            return engines.all[0]
        on_card = engines.engine_of(*self._operands.values(), *self._places.values())
        nearest = None if self._residents is None else self._residents.preferred_engine()
        return on_card or nearest or engines.least_loaded()

    def take_arriving(self, arrays: Mapping[str, Array], progress: ArrivalProgress) -> None:
        """Take operands that arrive in host memory, one after the other.

        Args:
            arrays: By field, in the order in which they arrive.
            progress: How many bytes of them have arrived.
        """
        begin_bytes = 0
        for field, array in arrays.items():
            self._operands[field] = Arriving(array, progress, begin_bytes)
            begin_bytes += array.nbytes

    def forget_operands(self) -> None:
        """Forget the operands that came, so that their memory is free before the call's end."""
        self._operands.clear()

    # On an engine

    def bring_operands(self, engine: Engine) -> dict[str, Operand]:
        """Bring the operands that were found to where an engine can use them, and return them.

        Operands that the request wants kept are first copied to the engine's device, unless they are resident already.
        They get new handles. The copy waits for operands that are still arriving.

        Raises:
            ExhaustedError, UnavailableError, LostSessionError: An operand cannot be kept.
        """
        residents = self._residents
        if residents is None:
            return self._operands
        operands = dict(self._operands)
        for field in self.parsed.remember & operands.keys():
            self.remember(field, wait_for(operands[field], self._call), engine)
        for field in self.parsed.operands:
            is_kept = field in self.parsed.keep
            if is_kept and field in operands and field not in residents:
                tensor = wait_for(operands[field], self._call)
                residents.copy(field, tensor, engine, self.brought_bytes)
            if field in residents:
                operands[field] = residents.operand(field, engine)
                if is_kept:
                    residents.give_handle(field)
        return operands

    def remember(self, field: str, tensor: Tensor, engine: Engine) -> Tensor:
        """Remember an operand that was sent by its content, on the engine's device, if there is room.

        Returns:
            The operand as the engine can use it: the tensor that is remembered, or else the one that was sent.

        Raises:
            LostSessionError: The session has ended.
        """
        residents = self._residents
        if residents is None or not isinstance(tensor, np.ndarray):
            return tensor
        digest = digest_of(tensor)
        with suppress(ExhaustedError, UnavailableError):
            if field not in residents and not residents.find_content(
                field, self.parsed.operands[field], digest
            ):
                residents.copy(field, tensor, engine, self.brought_bytes)
            if field in residents:
                residents.register_content(field, digest)
        return residents.operand(field, engine) if field in residents else tensor

    def make_residents(
        self, specs: Mapping[str, TensorSpec], engine: Engine
    ) -> dict[str, DeviceTensor]:
        """Make new residents on an engine's device, with handles, for tensors that the request wants kept.

        Args:
            specs: The specs of operands or results, by field. Those that are not wanted, or resident already, are
                passed over.

        Raises as `bring_operands`.
        """
        residents = self._residents
        if residents is None:
            return {}
        return {
            field: residents.make(field, spec, engine)
            for field, spec in specs.items()
            if field in self.parsed.keep and field not in residents
        }

    # To the response

    def commit(self) -> None:
        """Make the handles of new residents valid, until the session ends.

        Raises:
            LostSessionError: The session has ended.
        """
        if self._residents is not None:
            self._residents.commit()

    def answer(self, sent: Mapping[str, Array]) -> Envelope[Message]:
        """Commit, and return the response with the elements of the results in it."""
        self._call.sent_bytes = self.parsed.leaving_bytes
        message = self.parsed.response
        if self._residents is not None:
            self._residents.commit()
            message = self.response()
        raw = {field: elements_of(array) for field, array in sent.items()} if sent else {}
        return Envelope(message, raw)

    def response(self) -> Message:
        """Return the response without elements. It may be shared: do not change it."""
        if self._residents is None or not self.parsed.keep:
            return self.parsed.response
        handles = self._residents.handles
        fields: dict[str, Message] = dict(self.parsed.descriptions)
        for field in handles.keys() & fields.keys():
            fields[field] = _describe_resident(self.parsed.descriptions[field], handles[field])
        operands = {
            field: pb.Resident(handle=handle)
            for field, handle in handles.items()
            if field in self.parsed.operands
        }
        if operands:
            fields["kept"] = pb.KeptOperands(**operands)
        return messages_for(self.parsed.operation).response(**fields)


def _describe_resident(description: pb.Tensor, handle: bytes) -> pb.Tensor:
    """Return the description of a tensor with a handle added."""
    message = pb.Tensor()
    message.CopyFrom(description)
    message.resident.handle = handle
    return message
