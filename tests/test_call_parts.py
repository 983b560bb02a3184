"""A large call is split along its samples, in the same way each time, and its parts are joined without a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd_client.arguments import CallBuilder
from deconvd_client.config import Config
from deconvd_client.residents import Call, Resident, ResidentStore
from deconvd_client.server_set.call_parts import ResultJoiner, split_call

N = 12
LARGE = np.zeros((N, 1, 512, 512), np.float32)  # 12 MiB, as y
W = np.ones((1, 1, 1, 1), np.float32)
GEOMETRY = Geometry.from_arguments(1, 0, None, 1, 1)


class NoResidents(ResidentStore):
    """The residents of a connection that has none."""

    def put(self, array: Array) -> Resident:
        raise AssertionError

    def get(self, resident: Resident) -> Array:
        raise AssertionError


def deconvolution(x: Array, W: Array = W) -> Call:
    return CallBuilder(NoResidents(), Config()).deconvolution(x, W, None, GEOMETRY)


def differentiation(x: Array, W: Array, gy: Array, b: Array) -> Call:
    builder = CallBuilder(NoResidents(), Config())
    return builder.differentiation(x, W, b, gy, GEOMETRY, ("gx", "gW", "gb"))


@pytest.mark.parametrize(
    ("servers_count", "sizes"),
    [(1, [12]), (2, [6, 6]), (3, [4, 4, 4]), (5, [4, 4, 4]), (100, [4, 4, 4])],
)
def test_parts_are_as_many_as_servers_but_not_too_small(
    servers_count: int, sizes: list[int]
) -> None:
    parts = split_call(deconvolution(LARGE), servers_count)

    assert [part.call.problem.n for part in parts] == sizes
    assert [part.samples.stop - part.samples.start for part in parts] == sizes
    assert parts[0].samples.start == 0
    assert parts[-1].samples.stop == N


@pytest.mark.parametrize(
    "call",
    [
        deconvolution(LARGE[:7]),  # less than two parts of 8 MiB
        deconvolution(np.zeros((1, 1, 4096, 2048), np.float32)),  # one sample
        deconvolution(np.zeros((0, 1, 8, 8), np.float32)),
        deconvolution(  # each part would have all of a W that is larger than its samples
            np.zeros((64, 64, 16, 64), np.float32), np.zeros((64, 64, 32, 32), np.float32)
        ),
    ],
    ids=["small", "one sample", "no sample", "large W"],
)
def test_what_would_not_gain_is_not_split(call: Call) -> None:
    (part,) = split_call(call, 3)

    assert part.call is call


def test_parts_have_the_operands_and_requests_of_their_samples() -> None:
    x = np.arange(N * 512 * 512, dtype=np.float32).reshape(LARGE.shape)

    parts = split_call(deconvolution(x), 3)

    for part in parts:
        request: Any = part.call.request
        assert list(request.x.shape) == [4, 1, 512, 512]
        assert part.call.results["y"].shape == (4, 1, 512, 512)
        np.testing.assert_array_equal(part.call.operands["x"], x[part.samples])
        assert part.call.operands["w"] is W
        assert np.shares_memory(part.call.operands["x"], x)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_sums_are_added_in_the_order_of_the_parts_and_rounded_once(
    order: tuple[int, ...],
) -> None:
    half = W.astype(np.float16)
    x, b = LARGE.astype(np.float16).repeat(2, axis=0), np.zeros(1, np.float16)
    call = differentiation(x, half, x, b)
    parts = split_call(call, 3)
    assert len(parts) == 3
    sums = [
        1.0,
        2.0**-24,
        2.0**-24,
    ]  # float16 would lose each, and float32 another one in another order
    joiner = ResultJoiner(call)

    for number in order:
        part = parts[number]
        gx = np.full(part.call.problem.x.shape, number, np.float16)
        gw = np.full((1, 1, 1, 1), sums[number], np.float32)
        joiner.add(part, {"gx": gx, "gw": gw, "gb": gw.reshape(1)})
    results = joiner.results()

    expected = (np.float32(1.0) + np.float32(2.0**-24)) + np.float32(2.0**-24)
    assert results["gw"].dtype == np.float16
    assert results["gw"].item() == np.float16(expected)
    assert results["gb"].item() == np.float16(expected)
    np.testing.assert_array_equal(results["gx"][:, 0, 0, 0], np.repeat([0, 1, 2], 8))
