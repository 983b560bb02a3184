"""The service: takes operands from requests, calls an engine, and puts results into responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial

from google.protobuf.message import Message

import deconvd
from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.operation import OPERATIONS, Operation
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.cache_state import CacheState
from deconvd.wire.codec import Envelope
from deconvd.wire.messages import USE_CUDNN_TENSOR_CORE, WIDE_SUMS, messages_for
from deconvd.wire.packed_elements import PACKED_ELEMENTS
from deconvd.wire.server_counts import ServerCounts
from deconvd.wire.tensor import element_type_number
from deconvd_server.call.context import CallContext
from deconvd_server.engine.engine import Engine
from deconvd_server.residents import Residents
from deconvd_server.resources.worker_table import WORKERS
from deconvd_server.service.call_tensors import CallTensors
from deconvd_server.service.method import BidiStreamingMethod, RpcMethod, UnaryMethod
from deconvd_server.service.parsed_request import note_telemetry, parse_request
from deconvd_server.service.resident_methods import ResidentMethods
from deconvd_server.service.sliced_stream import StreamingOperations
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.service.striped_call import StripedOperations
from deconvd_server.shared_memory import Lender

__all__ = ["DeconvolutionService"]

_FEATURES = ("resident_tensors", PACKED_ELEMENTS, USE_CUDNN_TENSOR_CORE)


class DeconvolutionService:
    """Serves `deconvd.v1.DeconvolutionService`.

    Args:
        residents: The engines, and the residents on their devices.
        lender: Lends memory to clients on this host; None if the server lends none.
        endpoints: The instance id, sockets and port that GetServerInfo returns.
        counts: Returns what the server has done for an identity, or for all if it is empty, and what it has in use.
        count_active: Returns how many direct connections have a call under way, or had one a moment ago.
        max_message_bytes: The largest request and the largest response.
        streams: Admits streams: their places, and their host memory.
        executor: Computes the slices of streams. It has a thread for each slice that may be in flight.
    """

    def __init__(
        self,
        residents: Residents,
        lender: Lender | None,
        endpoints: pb.GetServerInfoResponse,
        counts: Callable[[str], ServerCounts],
        count_active: Callable[[], int],
        *,
        max_message_bytes: int,
        streams: StreamAdmission,
        executor: Executor,
    ) -> None:
        self._residents = residents
        self._lender = lender
        self._endpoints = endpoints
        self._counts = counts
        self._count_active = count_active
        self._max_message_bytes = max_message_bytes
        self._resident_calls = ResidentMethods(residents, lender, streams)
        self._streams = StreamingOperations(residents, lender, max_message_bytes, streams, executor)
        self._striped = StripedOperations(residents, lender, streams)

    def methods(self) -> dict[str, RpcMethod]:
        """Return the methods by their names."""
        methods_by_name: dict[str, RpcMethod] = {}
        for operation in OPERATIONS:
            messages = messages_for(operation)
            methods_by_name[operation.name] = UnaryMethod(
                messages.request,
                partial(self.run, operation),
                partial(self._striped.serve, operation),
            )
            methods_by_name[operation.stream_name] = BidiStreamingMethod(
                messages.stream_request, partial(self._streams.serve, operation)
            )
        return {
            **methods_by_name,
            **self._resident_calls.methods(),
            "GetServerInfo": UnaryMethod(pb.GetServerInfoRequest, self.get_server_info),
        }

    def run(
        self, operation: Operation, request: Envelope[Message], call: CallContext
    ) -> Envelope[Message]:
        """Serve an operation's RPC."""
        if request.message.HasField("telemetry"):
            note_telemetry(request.message, call)
        parsed = parse_request(operation, request.message, request.data)
        call.is_small = parsed.is_small
        if not call.is_small:
            call.note_long()
        with CallTensors(
            request.message, parsed, self._lender, self._residents, call
        ) as call_tensors:
            call_tensors.take_operands(request)
            parsed.check_response_size(self._max_message_bytes, call.sendable_bytes)
            engine, operands, places = call_tensors.prepare()
            sent = engine.run(
                operation,
                parsed.problem,
                operands,
                places,
                parsed.options,
                call,
                brought_bytes=call_tensors.brought_bytes,
                sent_bytes=parsed.sent_bytes,
            )
            return call_tensors.answer(sent)

    def get_server_info(
        self, request: Envelope[pb.GetServerInfoRequest], call: CallContext
    ) -> Envelope[pb.GetServerInfoResponse]:
        """Serve GetServerInfo."""
        residents = self._residents
        tenant = residents.sessions.tenant(request.message.session, call.identity)
        info = pb.GetServerInfoResponse(
            version=deconvd.__version__,
            devices=[
                _device_message(engine, residents.registry.cache_states(engine, tenant))
                for engine in residents.engines.all
            ],
            element_types=[element_type_number(dtype) for dtype in ELEMENT_TYPES],
            limits=pb.Limits(message_bytes=self._max_message_bytes),
            features=(*_FEATURES, WIDE_SUMS) if residents.engines.have_wide_sums else _FEATURES,
            counts=self._counts(call.identity).to_message(),
            workers=self._workers(),
            worker_name=WORKERS.name,
            home=WORKERS.request_home() if request.message.wants_home else "",
        )
        info.MergeFrom(self._endpoints)
        return Envelope(info, {})

    def _workers(self) -> Iterator[pb.Worker]:
        """Yield the entries of all processes that serve as one; what this process has to do is as of now."""
        for worker in WORKERS.workers:
            if worker.name != WORKERS.name:
                yield worker
                continue
            own = pb.Worker()
            own.CopyFrom(worker)
            own.active_connections_count = self._count_active()
            yield own


def _device_message(engine: Engine, kept: Sequence[CacheState]) -> pb.Device:
    info, load = engine.info, engine.load
    return pb.Device(
        id=info.id,
        name=info.name,
        memory_bytes=info.memory_bytes,
        threads_count=info.threads_count,
        budget_bytes=info.budget_bytes,
        used_bytes=load.used_bytes,
        running_calls_count=load.running_count,
        waiting_calls_count=load.waiting_count,
        busy_us=engine.busy_us,
        caches=[cache.to_message() for cache in (*engine.caches, *kept)],
    )
