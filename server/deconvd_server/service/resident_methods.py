"""The calls about tensors that stay: HoldSession, PutTensor, GetTensor, DropTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from deconvd.errors import InvalidArgumentError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.stream_parts import Part, PartReader, elements_part
from deconvd.wire.tensor import message_from_spec, spec_from_message
from deconvd_server.call.context import CallContext
from deconvd_server.device.pieces import piece_bytes, sample_pieces
from deconvd_server.engine.engine import Engine
from deconvd_server.residents import ResidentEntry, Residents
from deconvd_server.residents.elements import read_array, read_samples, write_samples
from deconvd_server.residents.sessions import Sessions
from deconvd_server.residents.tenant import Session
from deconvd_server.resources.capabilities import new_name
from deconvd_server.service.method import (
    ClientStreamingMethod,
    Parts,
    RpcMethod,
    ServerStreamingMethod,
    SessionMethod,
    UnaryMethod,
)
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.shared_memory import Lender, SharedTensors

__all__ = ["ResidentCalls"]


class ResidentCalls:
    """Serves the calls about sessions and the tensors that stay for them.

    Args:
        residents: What stays, and where.
        lender: Lends memory to clients on this host; None if no one does.
        streams: Who may stream.
    """

    def __init__(
        self,
        residents: Residents,
        lender: Lender | None,
        streams: StreamAdmission,
    ) -> None:
        self._residents = residents
        self._registry = residents.registry
        self._lender = lender
        self._stream_admission = streams

    def methods(self) -> dict[str, RpcMethod]:
        """Return what serves these calls, by their names."""
        return {
            "HoldSession": SessionMethod(pb.HoldSessionRequest, self.hold_session),
            "PutTensor": ClientStreamingMethod(pb.PutTensorRequest, self.put_tensor),
            "GetTensor": ServerStreamingMethod(pb.GetTensorRequest, self.get_tensor),
            "DropTensors": UnaryMethod(pb.DropTensorsRequest, self.drop_tensors),
        }

    def hold_session(
        self, first: pb.HoldSessionRequest, call: CallContext, hang_up: Callable[[], None]
    ) -> _HoldSessionHandler:
        """Serve HoldSession: return the session that its first message opens or resumes.

        Args:
            hang_up: Ends the call, from any thread.
        """
        sessions = self._residents.sessions
        session = (
            sessions.resume(first.session, first.tenant_key, hang_up)
            if first.session
            else sessions.open(first.tenant_key, hang_up, call.peer_key)
        )
        call.on_cancel(partial(sessions.mark_broken, session, hang_up))
        response = pb.HoldSessionResponse(
            session=session.name,
            lease_s=self._residents.lease_s,
            quota_bytes=self._residents.tenant_bytes,
        )
        return _HoldSessionHandler(response, sessions, session, hang_up)

    def put_tensor(
        self, reader: PartReader[pb.PutTensorRequest], call: CallContext
    ) -> pb.PutTensorResponse:
        """Serve PutTensor."""
        header = reader.read_header().header
        session = self._residents.join(header.session, call)
        spec = spec_from_message("tensor", header.tensor)
        engine = self._residents.engines.least_loaded()
        kept = self._registry.make(session, spec, engine, call)
        try:
            self._fill(kept, header.tensor, reader, engine, call)
            name = new_name()
            self._registry.bind_name(kept, session, name)
        finally:
            self._registry.release(kept)
        return pb.PutTensorResponse(resident=pb.Resident(handle=name))

    def _fill(
        self,
        kept: ResidentEntry,
        message: pb.Tensor,
        reader: PartReader[pb.PutTensorRequest],
        engine: Engine,
        call: CallContext,
    ) -> None:
        """Set a tensor's elements, from wherever its message says that they are."""
        payload = message.WhichOneof("payload")
        if payload == "shared":
            with SharedTensors(self._lender) as shared:
                lies_at = SharedSlice.from_message(message.shared)
                array = shared.host_place("tensor", kept.spec, lies_at)
                engine.write(kept.device_tensor, array, call)
        elif payload is None:
            with ExitStack() as stack:
                with self._registry.rest(kept, call):  # the wait for a place may be long
                    stack.enter_context(self._stream_admission.admit(piece_bytes(kept.spec), call))
                for samples, spec in sample_pieces(kept.spec):
                    with self._registry.rest(kept, call):
                        array = reader.read("tensor", spec)
                    write_samples(kept, samples, array, call)
                with self._registry.rest(kept, call):
                    reader.expect_end()  # with the place held: a client that never ends takes one of those only
            return
        else:
            raise InvalidArgumentError(
                "tensor must have its elements behind a stream's header, or in shared memory, got "
                f"them as {payload}",
                argument="tensor",
            )
        reader.expect_end()

    def get_tensor(self, request: Envelope[pb.GetTensorRequest], call: CallContext) -> Parts:
        """Serve GetTensor."""
        message = request.message
        session = self._residents.join(message.session, call)
        kept = self._registry.acquire_by_name(session, message.resident.handle, "resident", call)
        placed: list[Part] = []
        try:
            if message.HasField("place"):
                placed.append(self._copy_to_shared_memory(kept, message.place, call))
            else:
                yield from self._stream_elements(kept, call)
        finally:
            self._registry.release(kept)
        yield from placed

    def _copy_to_shared_memory(
        self, kept: ResidentEntry, place: pb.SharedSlice, call: CallContext
    ) -> pb.GetTensorResponse:
        """Copy a tensor into shared memory; return the message that says so."""
        with SharedTensors(self._lender) as shared:
            lies_at = SharedSlice.from_message(place)
            read_array(kept, call, shared.host_place("place", kept.spec, lies_at))
        header = message_from_spec(kept.spec)
        header.shared.CopyFrom(place)
        return pb.GetTensorResponse(header=header)

    def _stream_elements(self, kept: ResidentEntry, call: CallContext) -> Iterator[Part]:
        """Yield the parts that carry a tensor."""
        with ExitStack() as stack:
            with self._registry.rest(kept, call):
                yield pb.GetTensorResponse(header=message_from_spec(kept.spec))
                stack.enter_context(self._stream_admission.admit(piece_bytes(kept.spec), call))
            for samples, _ in sample_pieces(kept.spec):
                part = elements_part(read_samples(kept, samples, call))
                with self._registry.rest(kept, call):
                    yield part

    def drop_tensors(
        self, request: Envelope[pb.DropTensorsRequest], call: CallContext
    ) -> Envelope[pb.DropTensorsResponse]:
        """Serve DropTensors."""
        message = request.message
        session = self._residents.join(message.session, call)
        self._registry.drop(session, [resident.handle for resident in message.residents])
        return Envelope(pb.DropTensorsResponse(), {})


@dataclass(frozen=True)
class _HoldSessionHandler:
    """A session, as its stream holds it. See `Holding`."""

    response: pb.HoldSessionResponse
    sessions: Sessions
    session: Session
    close_stream: Callable[[], None]

    def handle(self, _message: pb.HoldSessionRequest) -> None:
        """Take a message for a sign of life."""
        self.sessions.heartbeat(self.session)

    def end(self) -> None:
        """End the session."""
        self.sessions.end(self.session, self.close_stream)
