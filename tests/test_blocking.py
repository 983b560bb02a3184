"""Blocking: the blocks of a problem cover it once, fit the cache and are enough for all threads."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cpu.blocking import Blocking, Ranges

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


def all_of(blocking: Blocking) -> list[Ranges]:
    return [getattr(blocking, field.name) for field in dataclasses.fields(blocking)]


@given(st.integers(0, 50), st.integers(1, 60), st.integers(-5, 60), st.integers(-5, 60))
def test_ranges_that_touch_a_span_are_those_that_have_anything_of_it(
    length: int, step: int, first: int, last: int
) -> None:
    ranges = Ranges(length, step)

    touching = [s for s in ranges if set(range(s.start, s.stop)) & set(range(first, last))]

    assert [*ranges.cover(first, last)] == touching


@given(st.integers(0, 50), st.integers(-3, 60))
def test_ranges_cover_a_length_once_in_steps(length: int, step: int) -> None:
    ranges = Ranges(length, step)
    slices = list(ranges)

    assert_covered_once(slices, length)
    assert [ranges[i] for i in range(len(ranges))] == slices
    assert all(s.stop - s.start == max(step, 1) for s in slices[:-1])


@given(large_problems(), st.integers(1, 200), st.booleans())
def test_blocks_cover_samples_groups_channels_and_taps_once(
    problem: Problem, threads_count: int, sums_samples: bool
) -> None:
    blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=sums_samples)

    assert_covered_once(list(blocking.samples), problem.n)
    assert_covered_once(list(blocking.groups), problem.groups)
    assert_covered_once(list(blocking.channels), problem.W.shape[1])
    assert_covered_once(list(blocking.h_taps), problem.kernel[0])
    assert_covered_once(list(blocking.w_taps), problem.kernel[1])


@given(large_problems())
def test_image_blocks_cover_the_image_once(problem: Problem) -> None:
    covered = np.zeros(problem.image, np.uint8)

    for image in Blocking.of(problem, threads_count=1).images():
        assert image.size == covered[image.h, image.w].shape
        covered[image.h, image.w] += 1

    assert (covered == 1).all()


@given(large_problems(), st.integers(1, 200), st.booleans())
def test_the_columns_of_a_block_fit_the_cache_whatever_the_problem(
    problem: Problem, threads_count: int, sums_samples: bool
) -> None:
    blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=sums_samples)

    counts = [max(s.stop - s.start for s in ranges) for ranges in all_of(blocking)]

    assert math.prod(counts) <= CACHE_ELEMENTS


@given(large_problems())
def test_a_block_of_several_rows_of_taps_has_whole_rows(problem: Problem) -> None:
    blocking = Blocking.of(problem, threads_count=1)

    assert blocking.h_taps[0].stop == 1 or len(blocking.w_taps) == 1


def test_a_block_has_few_products_however_many_channels_there_are() -> None:
    float32 = np.dtype(np.float32)
    problem = Problem(
        TensorSpec((8, 1 << 20, 16, 16), float32),
        TensorSpec((1 << 20, 64, 3, 3), float32),
        Geometry(),
    )

    blocking = Blocking.of(problem, threads_count=2)

    counts = [max(s.stop - s.start for s in ranges) for ranges in all_of(blocking)]
    assert math.prod(counts) * problem.c_I <= 2**29


def test_a_problem_of_any_number_of_blocks_takes_no_memory_for_them() -> None:
    float16 = np.dtype(np.float16)
    k = 600  # of one pixel: each sample is a block of its own
    problem = Problem(
        TensorSpec((2**31 - 1, 1, 1, 1), float16),
        TensorSpec((1, 1, k, k), float16),
        Geometry(pad=(k // 2 - 1, k // 2 - 1)),
    )

    tracemalloc.start()
    blocking = Blocking.of(problem, threads_count=2)
    first, last = blocking.samples[0], blocking.samples[len(blocking.samples) - 1]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (first, last) == (slice(0, 1), slice(2**31 - 2, 2**31 - 1))
    assert peak_bytes < 1 << 16


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

    assert [len(ranges) for ranges in all_of(blocking)] == [1] * 7
    assert [image.size for image in blocking.images()] == [(16, 16)]
