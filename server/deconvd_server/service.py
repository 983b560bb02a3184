"""The service: takes operands out of requests, calls an engine, puts results into responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np

import deconvd
from deconvd.codec import Buffer, Envelope
from deconvd.dtypes import ELEMENT_TYPES
from deconvd.errors import ExhaustedError
from deconvd.gradients import Wanted
from deconvd.parts import EARLY_BYTES, PartReader
from deconvd.problem import TensorSpec
from deconvd.tensor import element_type_number, elements_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.admission import Admission
from deconvd_server.arrivals import Arrivals
from deconvd_server.behaviours import Behaviour, Parts, Stream, Unary
from deconvd_server.call import Call
from deconvd_server.device import GradientPlaces, Operand
from deconvd_server.engine import Engine
from deconvd_server.exchange import Exchange
from deconvd_server.requests import Deconvolution, Differentiation
from deconvd_server.resident_calls import ResidentCalls
from deconvd_server.residents import Residents
from deconvd_server.shared_memory import Lender
from deconvd_server.streaming import SlicedProblem, Slices

__all__ = ["DeconvolutionService"]

_AskedT = TypeVar("_AskedT", Deconvolution, Differentiation)

_FEATURES = ("resident_tensors",)

_FRAMING_BYTES = 1024
"""More than the fields of a response take beside its tensors' elements."""


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
        return {
            "Deconvolve": Unary(pb.DeconvolveRequest, self.deconvolve),
            "DeconvolveGrad": Unary(pb.DeconvolveGradRequest, self.deconvolve_grad),
            "DeconvolveStream": Stream(pb.DeconvolveStreamRequest, self.deconvolve_stream),
            "DeconvolveGradStream": Stream(
                pb.DeconvolveGradStreamRequest, self.deconvolve_grad_stream
            ),
            **resident_calls.behaviours(),
            "GetServerInfo": Unary(pb.GetServerInfoRequest, self.get_server_info),
        }

    def deconvolve(
        self, request: Envelope[pb.DeconvolveRequest], call: Call
    ) -> Envelope[pb.DeconvolveResponse]:
        """Serve Deconvolve."""
        asked = Deconvolution.from_message(request.message)
        with self._exchange(request.message, asked, call) as exchange:
            exchange.take(request.raw)
            self._check_result_size(asked.sent)
            engine = exchange.settle(self._residents.engines)
            if call.writing is not None:
                call.writing.total_bytes = asked.shared_bytes
            if not asked.keep.isdisjoint(asked.operands):
                call.wait_until_written()
            x, W = exchange.operand("x"), exchange.operand("w")
            b = exchange.operand("b") if asked.with_b else None
            out = exchange.place("y")
            y = engine.deconvolve(asked.problem, x, W, b, asked.options, call, out)
            exchange.commit()
            return Envelope(_response(asked, exchange), _sent(asked, {"y": y}))

    def deconvolve_grad(
        self, request: Envelope[pb.DeconvolveGradRequest], call: Call
    ) -> Envelope[pb.DeconvolveGradResponse]:
        """Serve DeconvolveGrad."""
        asked = Differentiation.from_message(request.message)
        with self._exchange(request.message, asked, call) as exchange:
            exchange.take(request.raw)
            self._check_result_size(asked.sent)
            engine = exchange.settle(self._residents.engines)
            if call.writing is not None:
                call.writing.total_bytes = asked.shared_bytes
            x = exchange.operand("x") if asked.wanted.gW else None
            W = exchange.operand("w") if asked.wanted.gx else None
            gy = exchange.operand("gy")
            out = GradientPlaces(*map(exchange.place, ("gx", "gw", "gb")))
            gradients = engine.gradients(
                asked.problem, x, W, gy, asked.wanted, asked.options, call, out
            )
            exchange.commit()
            results = {"gx": gradients.gx, "gw": gradients.gW, "gb": gradients.gb}
            return Envelope(_grad_response(asked, exchange), _sent(asked, results))

    def deconvolve_stream(
        self, reader: PartReader[pb.DeconvolveStreamRequest], call: Call
    ) -> Parts:
        """Serve DeconvolveStream."""
        header = reader.header().header
        asked = _streamed(Deconvolution.from_message(header.request))
        sliced = SlicedProblem(asked.problem, header.slice_samples_count)
        with self._exchange(header.request, asked, call) as exchange:
            missing = exchange.find()
            with self._admitted(sliced, None, missing, call):
                engine = exchange.settle(self._residents.engines)
                operands = Arrivals(exchange, reader, engine, call)
                if missing:
                    yield pb.DeconvolveStreamResponse(missing=pb.Missing(fields=missing))
                    operands.take_missing(missing)
                operands.prepare()
                yield pb.DeconvolveStreamResponse(header=_response(asked, exchange))
                slices = Slices(
                    sliced, asked.options, engine, operands, exchange, self._executor, call
                )
                yield from slices.y(with_b=asked.with_b)
            exchange.commit()

    def deconvolve_grad_stream(
        self, reader: PartReader[pb.DeconvolveGradStreamRequest], call: Call
    ) -> Parts:
        """Serve DeconvolveGradStream."""
        header = reader.header().header
        asked = _streamed(Differentiation.from_message(header.request))
        sliced = SlicedProblem(asked.problem, header.slice_samples_count)
        with self._exchange(header.request, asked, call) as exchange:
            missing = exchange.find()
            with self._admitted(sliced, asked.wanted, missing, call):
                engine = exchange.settle(self._residents.engines)
                operands = Arrivals(exchange, reader, engine, call)
                if missing:
                    yield pb.DeconvolveGradStreamResponse(missing=pb.Missing(fields=missing))
                    operands.take_missing(missing)
                operands.prepare()
                yield pb.DeconvolveGradStreamResponse(header=_grad_response(asked, exchange))
                slices = Slices(
                    sliced, asked.options, engine, operands, exchange, self._executor, call
                )
                yield from slices.gradients(asked.wanted)
            exchange.commit()

    def _exchange(
        self,
        message: pb.DeconvolveRequest | pb.DeconvolveGradRequest,
        asked: Deconvolution | Differentiation,
        call: Call,
    ) -> Exchange:
        return Exchange(message, asked, self._lender, self._residents, call)

    @contextmanager
    def _admitted(
        self,
        sliced: SlicedProblem,
        wanted: Wanted | None,
        missing: Mapping[str, TensorSpec],
        call: Call,
    ) -> Iterator[None]:
        """Give the block a place among the streams."""
        sliced.check_slice(self._max_message_bytes)
        footprint_bytes = sliced.footprint_bytes(wanted)
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

    def _check_result_size(self, sent: Mapping[str, TensorSpec]) -> None:
        """Refuse results that could not be sent, before they are computed."""
        result_bytes = sum([spec.nbytes for spec in sent.values()])
        if result_bytes + _FRAMING_BYTES > self._max_message_bytes:
            raise ExhaustedError(
                f"the result would have {result_bytes} bytes, and the server sends messages of at "
                f"most {self._max_message_bytes}: send fewer samples at a time, or start it with a "
                "larger --max-message-bytes"
            )


def _streamed(asked: _AskedT) -> _AskedT:
    """Return what a stream asks for: its results are behind its headers, wherever else they might be put."""
    return replace(asked, slices={})


def _response(asked: Deconvolution, exchange: Exchange) -> pb.DeconvolveResponse:
    """Return the response to a call, without elements: not to be changed."""
    if not asked.keep:
        return asked.response
    return pb.DeconvolveResponse(y=exchange.described("y"), kept=exchange.kept_operands())


def _grad_response(asked: Differentiation, exchange: Exchange) -> pb.DeconvolveGradResponse:
    """Return the response to a call for gradients, in the manner of `_response`."""
    if not asked.keep:
        return asked.response
    return pb.DeconvolveGradResponse(
        **{field: exchange.described(field) for field in asked.results}
    )


def _sent(
    asked: Deconvolution | Differentiation, results: Mapping[str, Operand | None]
) -> dict[str, Buffer]:
    """Return the elements of those results that the response carries, by the names of their fields."""
    return {
        field: elements_of(result)
        for field in asked.sent
        if isinstance(result := results[field], np.ndarray)
    }


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
