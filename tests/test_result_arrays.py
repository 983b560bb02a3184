"""The arrays that results are sent from."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from deconvd.errors import ExhaustedError
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE_GRAD, spec_of_field
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.engine.result_arrays import new_result

FILTER = TensorSpec((1, 1, 1, 1), np.dtype(np.float64))


def problem_of(*shape: int) -> Problem:
    return Problem(TensorSpec(shape, np.dtype(ml_dtypes.bfloat16)), FILTER, Geometry())


def test_results_are_new_arrays_as_messages_have_them() -> None:
    problem = problem_of(2, 1, 3, 5)
    specs = [spec_of_field(problem, field) for field in DECONVOLVE_GRAD.all_results]

    for spec in specs:
        array = new_result(problem, spec)
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        assert array.flags.c_contiguous
        assert array.dtype.isnative


def test_memory_of_a_large_result_is_used_again_once_it_was_dropped_and_not_before() -> None:
    problem = problem_of(1, 1, 1, 12345678)

    dropped = new_result(problem, problem.y).ctypes.data
    held = new_result(problem, problem.y)

    assert held.ctypes.data == dropped
    assert new_result(problem, problem.y).ctypes.data != dropped


def test_a_result_that_no_memory_can_hold_is_refused() -> None:
    problem = problem_of(1 << 24, 1, 1, 1 << 30)

    with pytest.raises(
        ExhaustedError, match=r"the server has no memory left for .* x .*, W .*, y "
    ):
        new_result(problem, problem.y)
