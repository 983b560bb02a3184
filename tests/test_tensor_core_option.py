"""`use_cudnn_tensor_core`: what 'never' keeps out on a card, and that no server ignores it."""

from __future__ import annotations

import numpy as np
import pytest

import deconvd_client
from deconvd.errors import UnimplementedError
from deconvd.model.dtypes import ELEMENT_TYPES, DType
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import USE_CUDNN_TENSOR_CORE
from deconvd_client.transports import stub as stub_module
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.kernels.blas import ComputeMode, Gemm
from deconvd_server.device.cuda.kernels.steps import StepPlan
from deconvd_server.device.cuda.plan import Plan, Product
from tests.servers import ServerProcess

NEVER = Options(use_cudnn_tensor_core=UseCudnnTensorCore.NEVER, allow_tf32=True)
ONES = np.ones((1, 2, 3, 3), np.float32)
EVERY_PRODUCT = pytest.mark.parametrize("product", Product)
EVERY_DTYPE = pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)


def problem_of(dtype: DType, groups: int = 1) -> Problem:
    x, W = TensorSpec((2, 16, 12, 12), dtype), TensorSpec((16, 16 // groups, 4, 4), dtype)
    return Problem(x, W, Geometry((2, 2), (1, 1), groups=groups))


def modes_of(plan: Plan) -> set[ComputeMode]:
    assert isinstance(plan, StepPlan)
    return {step.mode for step in plan.steps if isinstance(step, Gemm)}


@EVERY_PRODUCT
@EVERY_DTYPE
def test_the_products_of_columns_are_computed_in_the_mode_that_keeps_tensor_cores_out(
    product: Product, dtype: DType
) -> None:
    modes = modes_of(kernels.fallback(product, problem_of(dtype), NEVER, 132))

    is_double = dtype == np.float64
    assert modes == {ComputeMode.PLAIN_FLOAT64 if is_double else ComputeMode.PLAIN_FLOAT32}
    assert modes.isdisjoint(
        modes_of(kernels.fallback(product, problem_of(dtype), Options(allow_tf32=True), 132))
    )


@EVERY_PRODUCT
def test_our_kernels_for_tensor_cores_are_no_candidates(product: Product) -> None:
    problem = problem_of(np.dtype(np.float16))

    assert [plan.name for plan in kernels.candidates(product, problem, Options(), 132)] == [
        "tensor cores"
    ]
    assert kernels.candidates(product, problem, NEVER, 132) == []


@EVERY_PRODUCT
def test_kernels_without_tensor_cores_stay_candidates(product: Product) -> None:
    problem = problem_of(np.dtype(np.float16), groups=16)

    names = [plan.name for plan in kernels.candidates(product, problem, NEVER, 132)]

    assert names
    assert all("depthwise" in name for name in names)


@pytest.mark.parametrize("value", UseCudnnTensorCore)
def test_on_the_processor_it_changes_nothing(F: deconvd_client.Connection, value: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 16, 5, 5)).astype(np.float16)
    W = np.random.default_rng(1).standard_normal((16, 8, 3, 3)).astype(np.float16)
    with F.using_config("use_cudnn_tensor_core", value):
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), F.deconvolution_2d(x, W))


def forget_feature(patch: pytest.MonkeyPatch) -> None:
    """Have servers seem to be older than the option."""
    parse = pb.GetServerInfoResponse.FromString

    def parse_old(data: bytes) -> pb.GetServerInfoResponse:
        info = parse(data)
        info.features.remove(USE_CUDNN_TENSOR_CORE)
        return info

    patch.setattr(pb.GetServerInfoResponse, "FromString", parse_old)


@pytest.mark.parametrize("transport", ["auto", "unix", "grpc"])
def test_a_server_that_would_ignore_never_is_not_asked(
    server: ServerProcess, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_feature(monkeypatch)
    with deconvd_client.connect(server.target, transport=transport) as F:
        with F.using_config("use_cudnn_tensor_core", "never"):
            with pytest.raises(UnimplementedError, match="has no use_cudnn_tensor_core: update it"):
                F.deconvolution_2d(ONES, ONES.reshape(2, 1, 3, 3))
            with pytest.raises(UnimplementedError, match="use_cudnn_tensor_core"):
                F.remote.deconvolution_2d(ONES, ONES.reshape(2, 1, 3, 3))
        with F.using_config("use_cudnn_tensor_core", "always"):
            assert F.deconvolution_2d(ONES, ONES.reshape(2, 1, 3, 3)).sum() == 2 * 9 * 9


def test_an_older_server_that_comes_in_its_place_is_noticed(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub_module, "_FEATURES_AGE_S", -1.0)
    with (
        deconvd_client.connect(server.target, transport="grpc") as F,
        F.using_config("use_cudnn_tensor_core", "never"),
    ):
        assert F.deconvolution_2d(ONES, ONES.reshape(2, 1, 3, 3)).sum() == 2 * 9 * 9
        forget_feature(monkeypatch)
        with pytest.raises(UnimplementedError):
            F.deconvolution_2d(ONES, ONES.reshape(2, 1, 3, 3))
