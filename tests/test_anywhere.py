"""The client against a server made from the schema alone: on every system, also where ours does not run.

`tests.elsewhere` runs this without conftest.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import deconvd_client
from deconvd.errors import InvalidArgumentError, UnavailableError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from tests import definition

X, W = np.ones((1, 2, 4, 3), np.float32), np.ones((2, 3, 2, 2), np.float32)
PROBLEM = Problem(TensorSpec(X.shape, X.dtype), TensorSpec(W.shape, W.dtype), Geometry((2, 1)))


class FromTheSchema:
    """Serves two of the schema's methods: knows float32, and computes by the definition."""

    def deconvolve(
        self, request: pb.DeconvolveRequest, context: grpc.ServicerContext
    ) -> pb.DeconvolveResponse:
        x, w = array(request.x), array(request.w)
        if w.shape[2:] != (2, 2):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "it takes filters of 2 pixels")
        stride = request.geometry.stride
        geometry = Geometry((stride.h, stride.w))
        problem = Problem(TensorSpec(x.shape, x.dtype), TensorSpec(w.shape, w.dtype), geometry)
        return pb.DeconvolveResponse(y=tensor(definition.deconvolve(problem, x, w)))

    def get_server_info(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        limits = pb.Limits(message_bytes=1 << 20)
        return pb.GetServerInfoResponse(version="from the schema", limits=limits)


def array(tensor: pb.Tensor) -> Array:
    assert tensor.element_type == pb.ELEMENT_TYPE_FLOAT32
    return np.frombuffer(tensor.raw, np.float32).reshape(tensor.shape)


def tensor(array: Array) -> pb.Tensor:
    raw = array.astype(np.float32).tobytes()
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape, raw=raw)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Where the schema's server listens."""
    with ThreadPoolExecutor(2) as handlers:
        server = grpc.server(handlers)
        service = FromTheSchema()
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Deconvolve": grpc.unary_unary_rpc_method_handler(
                service.deconvolve,
                pb.DeconvolveRequest.FromString,
                pb.DeconvolveResponse.SerializeToString,
            ),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(
                service.get_server_info,
                pb.GetServerInfoRequest.FromString,
                pb.GetServerInfoResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("deconvd.v1.DeconvolutionService", methods),)
        )
        states = health.HealthServicer()
        states.set("deconvd.v1.DeconvolutionService", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(states, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_a_call_returns_what_such_a_server_computes(target: str, transport: str) -> None:
    with deconvd_client.connect(target, transport=transport) as F:
        y = F.deconvolution_2d(X, W, stride=(2, 1))

    assert (y == definition.deconvolve(PROBLEM, X, W)).all()


def test_the_servers_refusal_is_raised(target: str) -> None:
    with (
        deconvd_client.connect(target) as F,
        pytest.raises(InvalidArgumentError, match="it takes filters of 2 pixels"),
    ):
        F.deconvolution_2d(X, np.ones((2, 3, 1, 1), np.float32))


def test_a_pickled_connection_connects_anew(target: str) -> None:
    with deconvd_client.connect(target) as F, pickle.loads(pickle.dumps(F)) as copy:
        assert copy.server_info().version == "from the schema"


def test_shared_memory_is_refused_where_such_a_server_lends_none(target: str) -> None:
    with (
        deconvd_client.connect(target, transport="shared_memory") as F,
        pytest.raises(UnavailableError, match=r"shared_memory.* the server lends none"),
    ):
        F.deconvolution_2d(np.ones((8, 2, 64, 64), np.float32), W)


def test_the_command_shows_the_server(target: str) -> None:
    command = [sys.executable, "-m", "deconvd_client.cli", "status", "--target", target]

    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert "from the schema" in shown.stdout
