"""The methods for sessions and residents: HoldSession, PutTensor, GetTensor, DropTensors."""

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
from deconvd_server.service.parsed_request import note_telemetry
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.shared_memory import Lender, SharedTensors

__all__ = ["ResidentMethods"]


class ResidentMethods:
    """Serves the methods for sessions and residents.

    Args:
        residents: The residents, and the engines on whose devices they are.
        lender: Lends memory to clients on this host; None if the server lends none.
        streams: Admits streams.
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
        """Return the methods by their names."""
        return {
            "HoldSession": SessionMethod(pb.HoldSessionRequest, self.hold_session),
            "PutTensor": ClientStreamingMethod(pb.PutTensorRequest, self.put_tensor),
            "GetTensor": ServerStreamingMethod(pb.GetTensorRequest, self.get_tensor),
            "DropTensors": UnaryMethod(pb.DropTensorsRequest, self.drop_tensors),
        }

    def hold_session(
        self, first: pb.HoldSessionRequest, call: CallContext, close_stream: Callable[[], None]
    ) -> _HoldSessionHandler:
        """Serve HoldSession: return the handler of the session that its first message opens or resumes.

        Args:
            close_stream: Ends the call, from any thread.
        """
        sessions = self._residents.sessions
        session = (
            sessions.resume(first.session, first.tenant_key, close_stream, call.identity)
            if first.session
            else sessions.open(first.tenant_key, close_stream, call.peer_key, call.identity)
        )
        call.on_cancel(partial(sessions.mark_broken, session, close_stream))
        response = pb.HoldSessionResponse(
            session=session.name,
            lease_s=self._residents.lease_s,
            quota_bytes=self._residents.tenant_bytes,
            can_remember=True,
        )
        return _HoldSessionHandler(response, sessions, session, close_stream)

    def put_tensor(
        self, reader: PartReader[pb.PutTensorRequest], call: CallContext
    ) -> pb.PutTensorResponse:
        """Serve PutTensor."""
        header = reader.read_header().header
        note_telemetry(header, call)
        session = self._residents.join(header.session, call)
        spec = spec_from_message("tensor", header.tensor)
        engine = self._residents.engines.least_loaded()
        entry = self._registry.make(session, spec, engine, call)
        try:
            self._fill(entry, header.tensor, reader, engine, call)
            name = new_name()
            self._registry.bind_name(entry, session, name)
        finally:
            self._registry.release(entry)
        return pb.PutTensorResponse(resident=pb.Resident(handle=name))

    def _fill(
        self,
        entry: ResidentEntry,
        message: pb.Tensor,
        reader: PartReader[pb.PutTensorRequest],
        engine: Engine,
        call: CallContext,
    ) -> None:
        """Set the elements of a new resident, from shared memory or from the stream."""
        payload = message.WhichOneof("payload")
        if payload == "shared":
            call.transport = "shared_memory"
            with SharedTensors(self._lender, call.identity) as shared:
                shared_slice = SharedSlice.from_message(message.shared)
                array = shared.host_place("tensor", entry.spec, shared_slice)
                call.received_bytes = entry.spec.nbytes
                engine.write(entry.device_tensor, array, call)
        elif payload is None:
            if engine.info.has_own_memory:
                reader.empty = engine.allocate_host_array
            with ExitStack() as stack:
                # While the entry rests it can be spilled or evicted. The wait for a place, or the client, may be long.
                with self._registry.rest(entry, call):
                    stack.enter_context(self._stream_admission.admit(piece_bytes(entry.spec), call))
                for samples, spec in sample_pieces(entry.spec):
                    with self._registry.rest(entry, call):
                        array = reader.read("tensor", spec)
                    call.received_bytes += spec.nbytes
                    write_samples(entry, samples, array, call)
                with self._registry.rest(entry, call):
                    # The place is still held, so a client that never ends its stream takes no more than a place.
                    reader.expect_end()
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
        note_telemetry(message, call)
        session = self._residents.join(message.session, call)
        entry = self._registry.acquire_by_name(session, message.resident.handle, "resident", call)
        headers: list[Part] = []
        try:
            if message.HasField("place"):
                headers.append(self._copy_to_shared_memory(entry, message.place, call))
            else:
                yield from self._stream_elements(entry, call)
        finally:
            self._registry.release(entry)
        yield from headers  # once the resident is released: the client may take its time to read it

    def _copy_to_shared_memory(
        self, entry: ResidentEntry, place: pb.SharedSlice, call: CallContext
    ) -> pb.GetTensorResponse:
        """Copy a resident into shared memory; return the header that says so."""
        call.transport = "shared_memory"
        with SharedTensors(self._lender, call.identity) as shared:
            shared_slice = SharedSlice.from_message(place)
            read_array(entry, call, shared.host_place("place", entry.spec, shared_slice))
        call.sent_bytes = entry.spec.nbytes
        header = message_from_spec(entry.spec)
        header.shared.CopyFrom(place)
        return pb.GetTensorResponse(header=header)

    def _stream_elements(self, entry: ResidentEntry, call: CallContext) -> Iterator[Part]:
        """Yield the header and the elements of a resident."""
        with ExitStack() as stack:
            with self._registry.rest(entry, call):
                yield pb.GetTensorResponse(header=message_from_spec(entry.spec))
                stack.enter_context(self._stream_admission.admit(piece_bytes(entry.spec), call))
            for samples, spec in sample_pieces(entry.spec):
                part = elements_part(read_samples(entry, samples, call))
                call.sent_bytes += spec.nbytes
                with self._registry.rest(entry, call):
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
    """Handles the stream of a session. See `SessionHandler`."""

    response: pb.HoldSessionResponse
    sessions: Sessions
    session: Session
    close_stream: Callable[[], None]

    def handle(self, _message: pb.HoldSessionRequest) -> None:
        """Extend the session's lease: every message is a heartbeat."""
        self.sessions.heartbeat(self.session)

    def end(self) -> None:
        """End the session."""
        self.sessions.end(self.session, self.close_stream)
