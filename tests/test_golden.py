"""Chainer's results, asked of a real server in another process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, spec_of
from deconvd_client import Connection, InvalidArgumentError
from tests import definition
from tests.golden import Array, GoldenCase, golden_cases, tolerance

ACCEPTED = [case for case in golden_cases() if not case.rejected]
REJECTED = [case for case in golden_cases() if case.rejected]
DIFFERENTIATED = [case for case in ACCEPTED if not case.gradients_fail]
NOT_DIFFERENTIATED = [case for case in ACCEPTED if case.gradients_fail]
TWICE_DIFFERENTIATED = [case for case in ACCEPTED if "d2x" in case.arrays]


def test_the_data_has_the_cases_that_it_claims() -> None:
    counts = [len(ACCEPTED), len(REJECTED), len(NOT_DIFFERENTIATED), len(TWICE_DIFFERENTIATED)]

    assert counts == [208, 32, 8, 47]


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_y_agrees_with_chainer(device_F: Connection, case: GoldenCase) -> None:
    a = case.arrays

    y = device_F.deconvolution_2d(a["x"], a["W"], a.get("b"), **case.params)

    assert_close(case, 0, {"y": y})


@pytest.mark.parametrize("case", REJECTED, ids=str)
def test_what_chainer_refuses_is_refused(device_F: Connection, case: GoldenCase) -> None:
    a = case.arrays

    with pytest.raises(InvalidArgumentError):
        device_F.deconvolution_2d(a["x"], a["W"], a.get("b"), **case.params)


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradients_agree_with_chainer(device_F: Connection, case: GoldenCase) -> None:
    a = case.arrays

    gx, gW, gb = device_F.deconvolution_2d_grad(a["x"], a["W"], a.get("b"), a["gy"], **case.params)

    assert_close(case, 1, {"gx": gx, "gW": gW, **({} if gb is None else {"gb": gb})})


@pytest.mark.parametrize("case", NOT_DIFFERENTIATED, ids=str)
def test_gradients_that_chainer_fails_at_agree_with_the_definition(
    device_F: Connection, case: GoldenCase
) -> None:
    a = case.arrays
    geometry = Geometry.from_arguments(**case.params)
    problem = Problem(spec_of(a["x"]), spec_of(a["W"]), geometry)

    gx, gW, gb = device_F.deconvolution_2d_grad(a["x"], a["W"], a.get("b"), a["gy"], **case.params)

    expected = definition.gradients(problem, a["x"], a["W"], a["gy"])
    for result, wide in zip((gx, gW, gb), expected, strict=True):
        if result is not None:
            np.testing.assert_allclose(result, wide, **vars(tolerance(case, 1)))


@pytest.mark.parametrize("case", TWICE_DIFFERENTIATED, ids=str)
def test_double_backward_agrees_with_chainer(device_F: Connection, case: GoldenCase) -> None:
    a = case.arrays
    operands = (a.get(name) for name in ("x", "W", "gy", "ggx", "ggW", "ggb"))

    double_grad: Any = device_F.deconvolution_2d_double_grad
    d2x, d2W, d2gy = double_grad(*operands, **case.params)

    assert_close(case, 2, {"d2x": d2x, "d2W": d2W, "d2gy": d2gy})


def assert_close(case: GoldenCase, order: int, results: Mapping[str, Array | Any]) -> None:
    for name, result in results.items():
        expected = case.arrays[name]
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, **vars(tolerance(case, order)), err_msg=name)
