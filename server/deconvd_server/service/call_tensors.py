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
    LostTensorError,
    UnavailableError,
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
    """The tensors of one call, from its request to its response; to be used as a context.

    One whose operands come with its request calls these in turn:

        take, prepare, answer

    One whose operands stream calls these, and `make_residents` between them for what is to be kept:

        find, choose_engine, take_missing, bring_operands, response, commit

    What is kept is good once it is committed. At the end of the block everything is given back.

    Attributes:
        parsed: What the request asks for.
        brought_bytes: What elements the request has come with, in host memory that is its own.

    Args:
        request: The call's message, without elements.
        lender: Whose memory tensors may be in; None if there is none.
        residents: Where tensors may be kept.

    Raises:
        LostSessionError: The request needs a session, and names none that there is.
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
        self.brought_bytes = 0
        self._request = request
        self._call = call
        self._engines = residents.engines
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
        """Take all operands of a request, those that are still arriving too, and the places of its results.

        Raises:
            InvalidArgumentError: As `SharedTensors.operand` and `array_of_spec` do.
            NotFoundError: Something that the request names is not there.
        """
        self.brought_bytes = sum(map(len, request.raw.values()))
        if self.parsed.shared_slices:
            self._take_shared(request)
        for field, spec in self.parsed.operands.items():
            if field in self.parsed.shared_slices:
                continue
            argument, tensor = ARGUMENTS[field], getattr(self._request, field)
            if self._residents is None or field not in self.parsed.named:
                self._operands[field] = array_of_spec(
                    argument, spec, tensor, request.raw.get(field)
                )
            elif not self._residents.find(field, spec, tensor):
                raise LostTensorError(
                    f"{argument} must be sent: the server has nothing with its digest",
                    argument=argument,
                )

    def _take_shared(self, request: Envelope[Message]) -> None:
        """Take what lies in shared memory, or is to be put there."""
        operands, results = self.parsed.operands, self.parsed.results
        self._shared = shared = SharedTensors(self._lender)
        for field, lies_at in self.parsed.shared_slices.items():
            if field in operands:
                self._operands[field] = shared.operand(ARGUMENTS[field], operands[field], lies_at)
            else:
                self._places[field] = shared.place(f"{field}_place", results[field], lies_at)
        if isinstance(request, OverlappedRequest):
            self._mark_arriving(request.progress)

    def _mark_arriving(self, progress: ArrivalProgress) -> None:
        """Take the operands in shared memory for arriving, one behind the other."""
        begin_bytes = 0
        for field in self.parsed.operation.write_order:
            if field in self.parsed.operands and field in self.parsed.shared_slices:
                operand = self._operands[field]
                if isinstance(operand, np.ndarray):  # and not memory of a card
                    self._operands[field] = Arriving(operand, progress, begin_bytes)
                begin_bytes += self.parsed.operands[field].nbytes

    def prepare(self) -> tuple[Engine, Mapping[str, Operand], Mapping[str, ResultTarget]]:
        """Return an engine, and on it the operands that were taken and a place for each result.

        An operand may still be arriving. A place is where the client wants the result in shared memory, a new
        tensor on the engine's device for one that is to be kept, and what it will be for one that is to be sent.

        Raises as `choose_engine` and `bring_operands` do.
        """
        engine = self.choose_engine()
        if self._residents is None:
            return engine, self._operands, {**self._places, **self.parsed.sent_results}
        operands = self.bring_operands(engine)
        kept = self.make_residents(self.parsed.results, engine)
        return engine, operands, {**self._places, **kept, **self.parsed.sent_results}

    def find_present(self) -> dict[str, TensorSpec]:
        """Find the operands of a stream that are here already; return what is missing of the others.

        Those are the ones given by digest, by the names of their fields, in the stream's order.

        Raises:
            InvalidArgumentError: An operand has elements in the header.
            NotFoundError: Something that the request names is not there.
        """
        missing = {}
        for field, spec in self.parsed.operands.items():
            argument, tensor = ARGUMENTS[field], getattr(self._request, field)
            payload = tensor.WhichOneof("payload")
            if payload in ("raw", "shared"):
                raise InvalidArgumentError(
                    f"{argument} must have its elements behind a stream's header, or be on the "
                    f"server, got them as {payload}",
                    argument=argument,
                )
            if self._residents is None or field not in self.parsed.named:
                continue
            if not self._residents.find(field, spec, tensor):
                missing[field] = spec
        return missing

    def choose_engine(self) -> Engine:
        """Return the engine to work on.

        That is the one on whose card the client has tensors, else where most of the bytes are that
        are kept, or else the least loaded.

        Raises:
            InvalidArgumentError: The client has tensors on several cards.
        """
        engines = self._engines
        if len(engines.all) == 1:
            return engines.all[0]
        on_card = engines.engine_of(*self._operands.values(), *self._places.values())
        nearest = None if self._residents is None else self._residents.preferred_engine()
        return on_card or nearest or engines.least_loaded()

    def take_missing(self, arrays: Mapping[str, Array], engine: Engine) -> None:
        """Take what was missing, and keep it for its digest if there is room on an engine's device.

        Raises:
            InvalidArgumentError: It is not what its digest says.
        """
        for field, array in arrays.items():
            digest = getattr(self._request, field).digest
            if digest_of(array) != digest:
                argument = ARGUMENTS[field]
                raise InvalidArgumentError(
                    f"{argument} must be what its digest says, and its elements have another",
                    argument=argument,
                )
            self._operands[field] = array
            if self._residents is not None:
                with suppress(ExhaustedError, UnavailableError):  # it serves from where it is
                    self._residents.copy(field, array, engine)
                    self._residents.register_content(field, digest)

    # On an engine

    def bring_operands(self, engine: Engine) -> dict[str, Operand]:
        """Bring the operands that were taken or found to where an engine can use them, and return them.

        Those that are to be kept are copied to its device first, once they are there, unless they are kept
        already, and get new handles.

        Raises:
            ExhaustedError, UnavailableError, LostSessionError: What is to be kept cannot be.
        """
        residents = self._residents
        if residents is None:
            return self._operands
        operands = dict(self._operands)
        for field in self.parsed.operands:
            is_to_be_kept = field in self.parsed.keep
            if is_to_be_kept and field in operands and field not in residents:
                tensor = wait_for(operands[field], self._call)
                residents.copy(field, tensor, engine, self.brought_bytes)
            if field in residents:
                operands[field] = residents.operand(field, engine)
                if is_to_be_kept:
                    residents.give_handle(field)
        return operands

    def make_residents(
        self, specs: Mapping[str, TensorSpec], engine: Engine
    ) -> dict[str, DeviceTensor]:
        """Return new tensors on an engine's device, with handles, for what is to be kept and is not yet.

        Args:
            specs: Operands or results, by the names of their fields.

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
        """Let the handles of what is kept stand for it, until the session ends.

        Raises:
            LostSessionError: It has ended.
        """
        if self._residents is not None:
            self._residents.commit()

    def answer(self, sent: Mapping[str, Array]) -> Envelope[Message]:
        """Commit, and return the response with the elements of the results that are sent."""
        message = self.parsed.response
        if self._residents is not None:
            self._residents.commit()
            message = self.response()
        raw = {field: elements_of(array) for field, array in sent.items()} if sent else {}
        return Envelope(message, raw)

    def response(self) -> Message:
        """Return the response without elements: not to be changed."""
        if self._residents is None or not self.parsed.keep:
            return self.parsed.response
        handles = self._residents.handles
        fields: dict[str, Message] = dict(self.parsed.descriptions)
        for field in handles.keys() & fields.keys():
            fields[field] = _describe_resident(self.parsed.descriptions[field], handles[field])
        kept = {
            field: pb.Resident(handle=handle)
            for field, handle in handles.items()
            if field in self.parsed.operands
        }
        if kept:
            fields["kept"] = pb.KeptOperands(**kept)
        return messages_for(self.parsed.operation).response(**fields)


def _describe_resident(description: pb.Tensor, handle: bytes) -> pb.Tensor:
    """Return a description of a tensor that has a handle."""
    message = pb.Tensor()
    message.CopyFrom(description)
    message.resident.handle = handle
    return message
