"""The service: takes operands out of requests, calls an engine, puts results into responses."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from google.protobuf.message import Message

import deconvd
from deconvd.codec import Envelope
from deconvd.dtypes import ELEMENT_TYPES
from deconvd.errors import ExhaustedError, UnavailableError
from deconvd.messages import messages_for
from deconvd.operation import OPERATIONS, Operation
from deconvd.parts import EARLY_BYTES, PartReader
from deconvd.problem import TensorSpec
from deconvd.tensor import element_type_number
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.admission import Admission
from deconvd_server.arrivals import Arrivals
from deconvd_server.behaviours import Behaviour, Parts, Stream, Unary
from deconvd_server.call import Call
from deconvd_server.engine import Engine
from deconvd_server.exchange import Exchange
from deconvd_server.requests import ParsedRequest, parse_request
from deconvd_server.resident_calls import ResidentCalls
from deconvd_server.residents import Residents
from deconvd_server.shared_memory import Lender
from deconvd_server.streaming import SlicedProblem, Slices

__all__ = ["SERVICE_NAME", "DeconvolutionService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name

_FEATURES = ("resident_tensors",)

_STARTING_RETRY_S = 0.2
"""When a client may try again whether the devices are ready."""

_FRAMING_BYTES = 1024
"""More than the fields of a response take beside its tensors' elements."""


class DeconvolutionService:
    """Serves `deconvd.v1.DeconvolutionService`. Until it has engines it answers UNAVAILABLE.

    Attributes:
        residents: What computes, and what stays there; None until the devices are ready.
        instance_id: As GetServerInfo tells it.
        unix_sockets: Absolute paths of the sockets that it is served on.
        side_sockets: What listens beside each of them.
        memory_socket: Absolute path of one where memory is lent; empty if none is.
        direct_port: The TCP port for direct calls; 0 if there is none.
        lender: Lends memory to clients on this host; None if no one does.

    Args:
        max_message_bytes: The largest request and the largest response.
        streams: Who may stream: what streams hold of host memory.
        executor: Computes the slices of streams; has a thread for each slice that streams may have
            in flight.
    """

    def __init__(self, max_message_bytes: int, *, streams: Admission, executor: Executor) -> None:
        self._max_message_bytes = max_message_bytes
        self._streams = streams
        self._executor = executor
        self.instance_id = secrets.token_hex(16)
        self.residents: Residents | None = None
        self.unix_sockets: Sequence[str] = ()
        self.side_sockets: Sequence[pb.SideSockets] = ()
        self.memory_socket = ""
        self.direct_port = 0
        self.lender: Lender | None = None

    def behaviours(self) -> dict[str, Behaviour]:
        """Return what serves each method, by its name."""
        resident_calls = ResidentCalls(self._ready, lambda: self.lender, self._streams)
        behaviours: dict[str, Behaviour] = {}
        for operation in OPERATIONS:
            messages = messages_for(operation)
            behaviours[operation.name] = Unary(messages.request, partial(self.run, operation))
            behaviours[operation.stream_name] = Stream(
                messages.stream_request, partial(self.stream, operation)
            )
        return {
            **behaviours,
            **resident_calls.behaviours(),
            "GetServerInfo": Unary(pb.GetServerInfoRequest, self.get_server_info),
        }

    def run(
        self, operation: Operation, request: Envelope[Message], call: Call
    ) -> Envelope[Message]:
        """Serve an operation's RPC."""
        parsed = parse_request(operation, request.message)
        with self._exchange(request.message, parsed, call) as exchange:
            exchange.take(request)
            self._check_result_size(parsed.sent_bytes)
            engine = exchange.choose_engine(self._ready().engines)
            operands = exchange.bring_operands(engine)
            places = exchange.make_places(engine)
            engine.run(operation, parsed.problem, operands, places, parsed.options, call)
            exchange.commit()
            return exchange.answer()

    def stream(self, operation: Operation, reader: PartReader[Any], call: Call) -> Parts:
        """Serve an operation's RPC in a stream."""
        header = reader.header().header
        # its results are behind its headers, wherever else they might be put
        parsed = replace(parse_request(operation, header.request), slices={})
        sliced = SlicedProblem(parsed.problem, header.slice_samples_count)
        response = messages_for(operation).stream_response
        with self._exchange(header.request, parsed, call) as exchange:
            missing = exchange.find()
            with self._admitted(sliced, parsed, missing, call):
                engine = exchange.choose_engine(self._ready().engines)
                kept = exchange.make_kept(parsed.results, engine)
                operands = Arrivals(exchange, reader, engine, call)
                if missing:
                    yield response(missing=pb.Missing(fields=missing))
                    operands.take_missing(missing)
                operands.prepare()
                yield response(header=exchange.response())
                slices = Slices(parsed, sliced, engine, operands, kept, self._executor, call)
                yield from slices.results()
            exchange.commit()

    def _exchange(self, message: Message, parsed: ParsedRequest, call: Call) -> Exchange:
        return Exchange(message, parsed, self.lender, self._ready(), call)

    @contextmanager
    def _admitted(
        self,
        sliced: SlicedProblem,
        parsed: ParsedRequest,
        missing: Mapping[str, TensorSpec],
        call: Call,
    ) -> Iterator[None]:
        """Give the block a place among the streams."""
        sliced.check_slice(self._max_message_bytes)
        footprint_bytes = sliced.footprint_bytes(parsed)
        if missing:
            footprint_bytes += EARLY_BYTES + sum(spec.nbytes for spec in missing.values())
        with self._streams.admitted(footprint_bytes, call):
            yield

    def get_server_info(
        self, _request: Envelope[pb.GetServerInfoRequest], _call: Call
    ) -> Envelope[pb.GetServerInfoResponse]:
        """Serve GetServerInfo."""
        residents = self._ready()
        info = pb.GetServerInfoResponse(
            version=deconvd.__version__,
            devices=[_device_message(engine, residents) for engine in residents.engines.all],
            element_types=[element_type_number(dtype) for dtype in ELEMENT_TYPES],
            limits=pb.Limits(message_bytes=self._max_message_bytes),
            features=_FEATURES,
            instance_id=self.instance_id,
            unix_sockets=self.unix_sockets,
            direct_port=self.direct_port,
            shared_memory_socket=self.memory_socket,
            side_sockets=self.side_sockets,
        )
        return Envelope(info, {})

    def _ready(self) -> Residents:
        if self.residents is None:
            raise UnavailableError(
                "the server is starting: its device is not ready yet",
                retry_after_s=_STARTING_RETRY_S,
            )
        return self.residents

    def _check_result_size(self, result_bytes: int) -> None:
        """Refuse results that could not be sent, before they are computed."""
        if result_bytes + _FRAMING_BYTES > self._max_message_bytes:
            raise ExhaustedError(
                f"the result would have {result_bytes} bytes, and the server sends messages of at "
                f"most {self._max_message_bytes}: send fewer samples at a time, or start it with a "
                "larger --max-message-bytes"
            )


def _device_message(engine: Engine, residents: Residents) -> pb.Device:
    info, load = engine.info, engine.load
    caches = [*engine.caches, *residents.keeper.states(engine)]
    return pb.Device(
        id=info.id,
        name=info.name,
        memory_bytes=info.memory_bytes,
        threads_count=info.threads_count,
        budget_bytes=info.budget_bytes,
        used_bytes=load.used_bytes,
        running_calls_count=load.running_count,
        waiting_calls_count=load.waiting_count,
        caches=[cache.as_message() for cache in caches],
    )
