"""The pace: what a problem takes at least is less than what it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice, pace
from deconvd_server.device.cpu.pace import Roofline, links_count

LARGE_COUNT = pace._LARGE_COUNT
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.fixture(scope="module")
def device() -> Iterator[CpuDevice]:
    """A device that knows of small problems, too, what they take at least."""
    device = CpuDevice()
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(pace, "_LARGE_COUNT", 1)
        yield device
    device.close()


def problem_of(
    x: tuple[int, ...], W: tuple[int, ...], geometry: Geometry, dtype: np.dtype[np.generic] = F32
) -> Problem:
    return Problem(TensorSpec(x, dtype), TensorSpec(W, dtype), geometry)


KINDS = {
    "deep": problem_of((2, 512, 16, 16), (512, 256, 3, 3), Geometry()),
    "deep and wide": problem_of((1, 2048, 32, 32), (2048, 512, 1, 1), Geometry()),
    "a large kernel": problem_of((1, 1, 64, 64), (1, 1, 64, 64), Geometry(pad=(32, 32))),
    "rows": problem_of((1, 1, 1, 6_000), (1, 1, 1, 10_000), Geometry(pad=(0, 5_000))),
    "in groups": problem_of((1, 256, 64, 64), (256, 4, 5, 5), Geometry(groups=256)),
    "doubles": problem_of((2, 256, 16, 16), (256, 128, 4, 4), Geometry(), F64),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("result", ["y", "gx", "gw"])
def test_no_problem_takes_less_than_it_takes_at_least(
    device: CpuDevice, name: str, result: str
) -> None:
    problem = KINDS[name]
    operands = {f: np.ones(spec_of_field(problem, f).shape, F32) for f in ("x", "w", "gy")}
    operands = {f: a.astype(problem.x.dtype) for f, a in operands.items()}
    places = {result: np.empty(spec_of_field(problem, result).shape, problem.x.dtype)}
    operation = DECONVOLVE if result == "y" else DECONVOLVE_GRAD

    least_s = device.min_duration_s(problem, [result])
    begin_s = time.monotonic()
    device.run(operation, problem, operands, places, Options(), CallContext())

    assert 0 < least_s < time.monotonic() - begin_s


def test_nothing_is_known_of_what_is_done_in_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_LARGE_COUNT", LARGE_COUNT)
    problem = problem_of((1, 4, 8, 8), (4, 4, 3, 3), Geometry())

    assert Roofline(2).min_duration_s(problem, ["y"]) == 0


def test_each_gradient_with_products_counts(device: CpuDevice) -> None:
    problem = KINDS["deep"]

    assert (
        device.min_duration_s(problem, ["gx", "gw"])
        == 2 * device.min_duration_s(problem, ["y"])
        > 0
    )
    assert device.min_duration_s(problem, ["gb"]) == 0


def test_what_a_huge_description_takes_is_known_at_once() -> None:
    k = 1 << 28
    problem = problem_of((1, 1, 1, 1), (1, 1, k, k), Geometry(pad=(k // 2 - 1, k // 2 - 1)))

    begin_s = time.monotonic()
    assert Roofline(2).min_duration_s(problem, ["gw"]) < 1e-6  # of 2^56 taps four reach a pixel
    assert time.monotonic() - begin_s < 1


@given(
    st.tuples(*[st.integers(1, 12)] * 2),
    st.tuples(*[st.integers(1, 9)] * 2),
    st.tuples(*[st.integers(1, 5)] * 4),
    st.tuples(*[st.integers(0, 4)] * 2),
)
def test_links_are_counted_as_they_are(
    image: tuple[int, int],
    kernel: tuple[int, int],
    steps: tuple[int, int, int, int],
    pad: tuple[int, int],
) -> None:
    s, d = steps[:2], steps[2:]
    smaller = [(s[i] * (image[i] - 1) + d[i] * (kernel[i] - 1)) // 2 for i in range(2)]
    p = (min(pad[0], smaller[0]), min(pad[1], smaller[1]))
    problem = problem_of((1, 1, *image), (1, 1, *kernel), Geometry(stride=s, pad=p, dilate=d))

    for axis in range(2):
        links = [
            (i, k)
            for i in range(image[axis])
            for k in range(kernel[axis])
            if 0 <= s[axis] * i + d[axis] * k - p[axis] < problem.output[axis]
        ]
        assert links_count(problem, axis) == len(links)
