"""Blocking: the blocks of a problem cover it once, fit the cache and are enough for all threads."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deconvd.geometry import Geometry
from deconvd.problem import Problem, TensorSpec
from deconvd_server.device.cpu.blocking import Blocking, ranges

CACHE_ELEMENTS = 2**18  # of float32, a mebibyte: what a core's second-level cache has at least


@st.composite
def large_problems(draw: st.DrawFn) -> Problem:
    """Draw a problem of any size; only its shapes exist."""
    groups, n, ins, outs = (draw(st.integers(1, most)) for most in (64, 8, 64, 512))
    h_I, w_I = (draw(st.integers(1, 3000)) for _ in range(2))
    h_K, w_K = (draw(st.integers(1, 600)) for _ in range(2))
    float32 = np.dtype(np.float32)
    return Problem(
        TensorSpec((n, groups * ins, h_I, w_I), float32),
        TensorSpec((groups * ins, outs, h_K, w_K), float32),
        Geometry(groups=groups),
    )


def assert_covered_once(slices: list[slice], length: int) -> None:
    ends = [0, *(s.stop for s in slices)]
    assert [s.start for s in slices] == ends[:-1]
    assert ends[-1] == length
    assert all(s.start < s.stop for s in slices)


@given(st.integers(0, 50), st.integers(-3, 60))
def test_ranges_cover_a_length_once_in_steps(length: int, step: int) -> None:
    slices = ranges(length, step)

    assert_covered_once(slices, length)
    assert all(s.stop - s.start == max(step, 1) for s in slices[:-1])


@given(large_problems(), st.integers(1, 200), st.booleans())
def test_blocks_cover_samples_groups_channels_and_taps_once(
    problem: Problem, threads_count: int, sums_samples: bool
) -> None:
    blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=sums_samples)

    assert_covered_once(blocking.samples, problem.n)
    assert_covered_once(blocking.groups, problem.groups)
    assert_covered_once(blocking.channels, problem.W.shape[1])
    assert_covered_once(blocking.taps, math.prod(problem.kernel))


@given(large_problems())
def test_image_blocks_cover_the_image_once(problem: Problem) -> None:
    covered = np.zeros(problem.image, np.uint8)

    for image in Blocking.of(problem, threads_count=1).images:
        assert image.size == covered[image.h, image.w].shape
        covered[image.h, image.w] += 1

    assert (covered == 1).all()


@given(large_problems(), st.integers(1, 200), st.booleans())
def test_the_columns_of_a_block_fit_the_cache_whatever_the_problem(
    problem: Problem, threads_count: int, sums_samples: bool
) -> None:
    blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=sums_samples)

    ranges_of_each = (blocking.samples, blocking.groups, blocking.channels, blocking.taps)
    counts = [max(s.stop - s.start for s in slices) for slices in ranges_of_each]
    pixels_count = max(math.prod(image.size) for image in blocking.images)

    assert math.prod(counts) * pixels_count <= CACHE_ELEMENTS


@given(large_problems(), st.integers(1, 200))
def test_where_samples_are_summed_the_channels_make_tasks_for_all_threads_if_they_can(
    problem: Problem, threads_count: int
) -> None:
    blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=True)

    tasks_count = len(blocking.groups) * len(blocking.channels)

    assert tasks_count >= min(threads_count, problem.c_O)


def test_a_small_problem_is_one_block() -> None:
    float32 = np.dtype(np.float32)
    problem = Problem(
        TensorSpec((2, 8, 16, 16), float32), TensorSpec((8, 4, 3, 3), float32), Geometry(groups=2)
    )

    blocking = Blocking.of(problem, threads_count=1)

    assert [
        len(part) for part in (blocking.samples, blocking.groups, blocking.channels, blocking.taps)
    ] == [1] * 4
    assert [image.size for image in blocking.images] == [(16, 16)]
