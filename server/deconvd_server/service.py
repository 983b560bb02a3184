"""The gRPC boundary: takes operands out of requests, calls an engine, puts results into responses."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import grpc

import deconvd
from deconvd.chunks import ChunkReader
from deconvd.codec import Buffer, Envelope
from deconvd.dtypes import ELEMENT_TYPES
from deconvd.errors import ExhaustedError, UnavailableError
from deconvd.gradients import Wanted
from deconvd.options import Options
from deconvd.problem import TensorSpec
from deconvd.tensor import (
    Array,
    element_type_number,
    elements_of,
    message_from_spec,
    spec_of,
)
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.admission import Admission
from deconvd_server.call import Call
from deconvd_server.device import GradientPlaces
from deconvd_server.engine import Engine, Engines
from deconvd_server.requests import Deconvolution, Differentiation
from deconvd_server.rpc import stream_handler, unary_handler
from deconvd_server.shared_memory import CallTensors, Lender
from deconvd_server.streaming import SlicedProblem, Slices

__all__ = ["SERVICE_NAME", "DeconvolutionService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name

_FRAMING_BYTES = 1024
"""More than the fields of a response take beside its tensors' elements."""


class DeconvolutionService:
    """Serves `deconvd.v1.DeconvolutionService`. Until it has engines it answers UNAVAILABLE.

    Attributes:
        engines: What computes; None until the devices are ready.
        unix_sockets: Absolute paths of the sockets that it is served on.
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
        self._instance_id = secrets.token_hex(16)
        self.engines: Engines | None = None
        self.unix_sockets: Sequence[str] = ()
        self.lender: Lender | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server needs to serve this."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Deconvolve": unary_handler(pb.DeconvolveRequest, self.deconvolve),
                "DeconvolveGrad": unary_handler(pb.DeconvolveGradRequest, self.deconvolve_grad),
                "DeconvolveStream": stream_handler(
                    pb.DeconvolveStreamRequest, self.deconvolve_stream
                ),
                "DeconvolveGradStream": stream_handler(
                    pb.DeconvolveGradStreamRequest, self.deconvolve_grad_stream
                ),
                "GetServerInfo": unary_handler(pb.GetServerInfoRequest, self.get_server_info),
            },
        )

    def deconvolve(
        self, request: Envelope[pb.DeconvolveRequest], call: Call
    ) -> Envelope[pb.DeconvolveResponse]:
        """Serve Deconvolve."""
        message, raw = request.message, request.raw
        asked = Deconvolution.from_message(message)
        with CallTensors(self.lender) as tensors:
            x = tensors.operand("x", message.x, raw.get("x"))
            W = tensors.operand("W", message.w, raw.get("w"))
            b = tensors.operand("b", message.b, raw.get("b")) if asked.with_b else None
            places = tensors.places(message, asked.results)
            self._check_result_size(asked.results, places)
            engine = self._ready_engines().least_loaded()
            out = places.get("y")
            y = engine.deconvolve(asked.problem, x, W, b, asked.options, call, out)
            described, sent = _delivered(message, {"y": y}, places)
        return Envelope(pb.DeconvolveResponse(y=described["y"]), sent)

    def deconvolve_grad(
        self, request: Envelope[pb.DeconvolveGradRequest], call: Call
    ) -> Envelope[pb.DeconvolveGradResponse]:
        """Serve DeconvolveGrad."""
        message, raw = request.message, request.raw
        asked = Differentiation.from_message(message)
        with CallTensors(self.lender) as tensors:
            x = tensors.operand("x", message.x, raw.get("x")) if asked.wanted.gW else None
            W = tensors.operand("W", message.w, raw.get("w")) if asked.wanted.gx else None
            gy = tensors.operand("gy", message.gy, raw.get("gy"))
            places = tensors.places(message, asked.results)
            self._check_result_size(asked.results, places)
            engine = self._ready_engines().least_loaded()
            out = GradientPlaces(places.get("gx"), places.get("gw"), places.get("gb"))
            gradients = engine.gradients(
                asked.problem, x, W, gy, asked.wanted, asked.options, call, out
            )
            results = {"gx": gradients.gx, "gw": gradients.gW, "gb": gradients.gb}
            described, sent = _delivered(message, results, places)
        return Envelope(pb.DeconvolveGradResponse(**described), sent)

    def deconvolve_stream(
        self, reader: ChunkReader[pb.DeconvolveStreamRequest], call: Call
    ) -> Iterator[bytes]:
        """Serve DeconvolveStream."""
        header = reader.header().header
        asked = Deconvolution.from_message(header.request)
        described = pb.DeconvolveResponse(y=message_from_spec(asked.problem.y))
        sliced = SlicedProblem(asked.problem, header.slice_samples_count)
        with self._admitted(sliced, None, asked.options, call) as slices:
            yield pb.DeconvolveStreamResponse(header=described).SerializeToString()
            yield from slices.y(reader, with_b=asked.with_b)

    def deconvolve_grad_stream(
        self, reader: ChunkReader[pb.DeconvolveGradStreamRequest], call: Call
    ) -> Iterator[bytes]:
        """Serve DeconvolveGradStream."""
        header = reader.header().header
        asked = Differentiation.from_message(header.request)
        results = {field: message_from_spec(spec) for field, spec in asked.results.items()}
        described = pb.DeconvolveGradResponse(**results)
        sliced = SlicedProblem(asked.problem, header.slice_samples_count)
        with self._admitted(sliced, asked.wanted, asked.options, call) as slices:
            yield pb.DeconvolveGradStreamResponse(header=described).SerializeToString()
            yield from slices.gradients(reader, asked.wanted)

    @contextmanager
    def _admitted(
        self, sliced: SlicedProblem, wanted: Wanted | None, options: Options, call: Call
    ) -> Iterator[Slices]:
        """Give the block a place among the streams, and an engine for its slices."""
        sliced.check_slice(self._max_message_bytes)
        engine = self._ready_engines().least_loaded()
        with self._streams.admitted(sliced.footprint_bytes(wanted), call):
            yield Slices(sliced, options, engine, self._executor, call)

    def get_server_info(
        self, _request: Envelope[pb.GetServerInfoRequest], _call: Call
    ) -> Envelope[pb.GetServerInfoResponse]:
        """Serve GetServerInfo."""
        info = pb.GetServerInfoResponse(
            version=deconvd.__version__,
            devices=[_device_message(engine) for engine in self._ready_engines().all],
            element_types=[element_type_number(dtype) for dtype in ELEMENT_TYPES],
            limits=pb.Limits(message_bytes=self._max_message_bytes),
            instance_id=self._instance_id,
            unix_sockets=self.unix_sockets,
            shared_memory_socket="" if self.lender is None else str(self.lender.path),
        )
        return Envelope(info, {})

    def _ready_engines(self) -> Engines:
        if self.engines is None:
            raise UnavailableError("the server is starting: its device is not ready yet")
        return self.engines

    def _check_result_size(
        self, results: Mapping[str, TensorSpec], places: Mapping[str, Array]
    ) -> None:
        """Refuse results that could not be sent, before they are computed."""
        result_bytes = sum(spec.nbytes for field, spec in results.items() if field not in places)
        if result_bytes + _FRAMING_BYTES > self._max_message_bytes:
            raise ExhaustedError(
                f"the result would have {result_bytes} bytes, and the server sends messages of at "
                f"most {self._max_message_bytes}: send fewer samples at a time, or start it with a "
                "larger --max-message-bytes"
            )


def _description(array: Array) -> pb.Tensor:
    return message_from_spec(spec_of(array))


def _delivered(
    request: pb.DeconvolveRequest | pb.DeconvolveGradRequest,
    results: Mapping[str, Array | None],
    places: Mapping[str, Array],
) -> tuple[dict[str, pb.Tensor], dict[str, Buffer]]:
    """Return the messages of results, and the elements of those that are not in their places."""
    described: dict[str, pb.Tensor] = {}
    sent: dict[str, Buffer] = {}
    for field, array in results.items():
        if array is None:
            continue
        described[field] = _description(array)
        if field in places:
            described[field].shared.CopyFrom(getattr(request, f"{field}_place"))
        else:
            sent[field] = elements_of(array)
    return described, sent


def _device_message(engine: Engine) -> pb.Device:
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
        caches=[cache.as_message() for cache in engine.caches],
    )
