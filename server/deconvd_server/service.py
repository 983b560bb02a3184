"""The service: takes operands out of requests, calls an engine, puts results into responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from google.protobuf.message import Message

import deconvd
from deconvd.codec import Envelope
from deconvd.dtypes import ELEMENT_TYPES
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

__all__ = ["DeconvolutionService"]

_FEATURES = ("resident_tensors",)


class DeconvolutionService:
    """Serves `deconvd.v1.DeconvolutionService`.

    Args:
        residents: What computes, and what stays there.
        lender: Lends memory to clients on this host; None if no one does.
        ways: How the server is reached: the instance id, sockets and port that GetServerInfo tells.
        max_message_bytes: The largest request and the largest response.
        streams: Who may stream: what streams hold of host memory.
        executor: Computes the slices of streams; has a thread for each slice that streams may have
            in flight.
    """

    def __init__(
        self,
        residents: Residents,
        lender: Lender | None,
        ways: pb.GetServerInfoResponse,
        *,
        max_message_bytes: int,
        streams: Admission,
        executor: Executor,
    ) -> None:
        self._residents = residents
        self._lender = lender
        self._ways = ways
        self._max_message_bytes = max_message_bytes
        self._streams = streams
        self._executor = executor

    def behaviours(self) -> dict[str, Behaviour]:
        """Return what serves each method, by its name."""
        resident_calls = ResidentCalls(self._residents, self._lender, self._streams)
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
        parsed = parse_request(operation, request.message, request.data)
        with Exchange(request.message, parsed, self._lender, self._residents, call) as exchange:
            exchange.take(request)
            parsed.check_sent(self._max_message_bytes)
            engine, operands, places = exchange.prepare()
            engine.run(operation, parsed.problem, operands, places, parsed.options, call)
            return exchange.answer()

    def stream(self, operation: Operation, reader: PartReader[Any], call: Call) -> Parts:
        """Serve an operation's RPC in a stream."""
        header = reader.header().header
        # its results are behind its headers, wherever else they might be put
        parsed = replace(parse_request(operation, header.request), slices={})
        sliced = SlicedProblem(parsed.problem, header.slice_samples_count)
        response = messages_for(operation).stream_response
        with Exchange(header.request, parsed, self._lender, self._residents, call) as exchange:
            missing = exchange.find()
            with self._admitted(sliced, parsed, missing, call):
                engine = exchange.choose_engine()
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
        residents = self._residents
        info = pb.GetServerInfoResponse(
            version=deconvd.__version__,
            devices=[_device_message(engine, residents) for engine in residents.engines.all],
            element_types=[element_type_number(dtype) for dtype in ELEMENT_TYPES],
            limits=pb.Limits(message_bytes=self._max_message_bytes),
            features=_FEATURES,
        )
        info.MergeFrom(self._ways)
        return Envelope(info, {})


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
