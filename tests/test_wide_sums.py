"""Gradients that are sums over samples can come in the type in which they are summed, and are rounded once then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.errors import UnimplementedError
from deconvd.model.dtypes import BFLOAT16, Array
from deconvd.model.geometry import Geometry
from deconvd_client import Connection
from deconvd_client.arguments import CallBuilder
from deconvd_client.config import Config
from deconvd_client.residents import Call
from deconvd_client.server_set.call_parts import widen_sums
from tests.servers import ServerProcess, only_server, server_process

GEOMETRY = Geometry.from_arguments(1, 0, None, 1, 1)
WIDE = ("gw", "gb")


@pytest.fixture(params=["shared_memory", "unix", "grpc"])
def through(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Connection]:
    with deconvd_client.connect(server.target, transport=request.param) as connection:
        yield connection


def differentiation(F: Connection, n: int, x_dtype: object, W_dtype: object) -> Call:
    random = np.random.default_rng(n)
    x, gy = (random.random((n, 1, 64, 64)).astype(x_dtype) for _ in range(2))  # type: ignore[call-overload]  # any
    W, b = np.ones((1, 1, 1, 1)).astype(W_dtype), np.zeros(1).astype(x_dtype)  # type: ignore[call-overload]  # any
    builder = CallBuilder(only_server(F).residents, Config())
    return builder.differentiation(x, W, b, gy, GEOMETRY, ("gx", "gW", "gb"))


def exact_sums(call: Call) -> dict[str, Array]:
    x, gy = (np.asarray(call.operands[name]).astype(np.float64) for name in ("x", "gy"))
    return {"gw": (x * gy).sum(), "gb": gy.sum()}


@pytest.mark.parametrize("n", [8, 512], ids=["small", "large"])
@pytest.mark.parametrize(
    ("x_dtype", "W_dtype"),
    [
        (np.float16, np.float16),
        (BFLOAT16, BFLOAT16),
        (np.float32, np.float16),
        (np.float16, np.float64),
    ],
)
def test_sums_are_not_rounded_to_the_types_of_the_operands(
    through: Connection, n: int, x_dtype: object, W_dtype: object
) -> None:
    call = differentiation(through, n, x_dtype, W_dtype)
    wide = widen_sums(call)
    assert wide is not None

    results = only_server(through).execute(wide)

    compute_type = call.problem.compute_type
    assert results["gx"].dtype == call.problem.x.dtype
    for name, exact in exact_sums(call).items():
        assert results[name].dtype == compute_type
        np.testing.assert_allclose(results[name].item(), exact, rtol=1e-4)


def test_what_is_summed_in_its_own_type_is_not_asked_for(F: Connection) -> None:
    assert widen_sums(differentiation(F, 2, np.float32, np.float32)) is None
    assert widen_sums(differentiation(F, 2, np.float64, np.float64)) is None


def test_sums_that_stay_on_the_server_can_be_wide(F: Connection) -> None:
    call = differentiation(F, 8, np.float16, np.float16)
    wide = widen_sums(call)
    assert wide is not None

    kept = only_server(F).execute_and_keep(replace(wide, keep_results=True))

    array = only_server(F).residents.get(kept["gw"])
    np.testing.assert_allclose(array.item(), exact_sums(call)["gw"], rtol=1e-4)


def test_a_device_that_cannot_says_so(tmp_path: Path) -> None:
    prelude = "from deconvd_server.engine.engine import Engines; Engines.have_wide_sums = False"
    with (
        server_process(tmp_path, prelude=prelude) as server,
        deconvd_client.connect(server.target) as F,
    ):
        wide = widen_sums(differentiation(F, 8, np.float16, np.float16))
        assert wide is not None
        assert "wide_sums" not in F.server_info().features
        with pytest.raises(UnimplementedError, match="no wide_sums"):
            only_server(F).execute(wide)
