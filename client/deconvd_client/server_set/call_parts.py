"""Splits a large call along its samples, and joins the results of its parts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.operation import spec_of_field
from deconvd.model.problem import TensorSpec, problem_of
from deconvd.wire.tensor import message_from_spec
from deconvd_client.residents import Call, Resident

__all__ = ["CallPart", "ResultJoiner", "call_size_bytes", "split_call", "widen_sums"]

_MIN_PART_BYTES: Final = 8 << 20
"""The least size of a part's samples, operands and results together. What is smaller is faster in one piece."""

_MAX_CONSTANT_PART: Final = 0.25
"""How large W and gW may be, compared with the samples of a part: each part has all of them."""


@dataclass(frozen=True, slots=True)
class CallPart:
    """A call for some of the samples of another.

    Attributes:
        number: Its number, from 0.
        samples: Which samples it has.
        call: The call.
    """

    number: int
    samples: slice
    call: Call


def call_size_bytes(call: Call) -> int:
    """Return the size of all tensors of a call."""
    size_bytes = sum(spec.nbytes for spec in call.results.values())
    for operand in call.operands.values():
        size_bytes += (operand.spec if isinstance(operand, Resident) else operand).nbytes
    return size_bytes


def split_call(call: Call, servers_count: int) -> list[CallPart]:
    """Return the parts of a call for some servers; only one if it should not be split.

    The parts depend on the call and on `servers_count` alone, so that the same call is always added up in the same way.

    Args:
        call: Its operands are arrays of numpy's, and its results are not kept.
    """
    count = _parts_count(call, servers_count)
    if count < 2:
        return [CallPart(0, slice(0, call.problem.n), call)]
    bounds = [call.problem.n * number // count for number in range(count + 1)]
    return [
        CallPart(number, slice(begin, end), _part_of(call, slice(begin, end)))
        for number, (begin, end) in enumerate(pairwise(bounds))
    ]


def _parts_count(call: Call, servers_count: int) -> int:
    operation = call.operation
    sampled_names = (*operation.batched_operands, *operation.results)
    specs: dict[str, Array | Resident | TensorSpec] = {**call.operands, **call.results}
    sampled_bytes = constant_bytes = 0
    for name, spec in specs.items():
        if isinstance(spec, Resident):
            return 1
        if name in sampled_names:
            sampled_bytes += spec.nbytes
        else:
            constant_bytes += spec.nbytes
    part_bytes = max(_MIN_PART_BYTES, int(constant_bytes / _MAX_CONSTANT_PART))
    return min(servers_count, call.problem.n, sampled_bytes // part_bytes)


def _part_of(call: Call, samples: slice) -> Call:
    """Return the call for some of the samples. Its operands refer to the same memory."""
    whole, operation = call.problem, call.operation
    x = TensorSpec((samples.stop - samples.start, *whole.x.shape[1:]), whole.x.dtype)
    problem = problem_of(x, whole.W, whole.geometry)
    request: Any = type(call.request)()
    request.CopyFrom(call.request)
    for name in operation.batched_operands:
        getattr(request, name).CopyFrom(message_from_spec(spec_of_field(problem, name)))
    operands: dict[str, Array | Resident] = {}
    for name, operand in call.operands.items():
        assert not isinstance(operand, Resident)
        operands[name] = operand[samples] if name in operation.batched_operands else operand
    return replace(
        call,
        request=request,
        problem=problem,
        operands=operands,
        results={name: spec_of_field(problem, name) for name in call.results},
    )


def widen_sums(call: Call) -> Call | None:
    """Return the call whose sums over samples come in the compute type; None if they do so already."""
    compute_type = call.problem.compute_type
    narrow = [
        name
        for name, spec in call.results.items()
        if name in call.operation.reduced_results and spec.dtype != compute_type
    ]
    if not narrow:
        return None
    request: Any = type(call.request)()
    request.CopyFrom(call.request)
    request.wide_sums = True
    wide = {name: TensorSpec(call.results[name].shape, compute_type) for name in narrow}
    return replace(call, request=request, results={**call.results, **wide})


class ResultJoiner:
    """Joins the results of the parts of a call. Parts can be added in any order, by several threads.

    Sums over all samples are added in the order of the parts, whichever comes first, and in the compute type of the
    call: they are rounded to the type of the result once, at the end.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._sampled = {
            name: np.empty(spec.shape, spec.dtype)
            for name, spec in call.results.items()
            if name in call.operation.results
        }
        self._sums: dict[int, dict[str, Array]] = {}

    def add(self, part: CallPart, results: Mapping[str, Array]) -> None:
        """Add the results of a part."""
        for name, whole in self._sampled.items():
            whole[part.samples] = results[name]
        self._sums[part.number] = {
            name: array for name, array in results.items() if name not in self._sampled
        }

    def results(self) -> dict[str, Array]:
        """Return the results of the call, once all parts have been added."""
        return {
            name: self._sampled[name] if name in self._sampled else self._total(name, spec)
            for name, spec in self._call.results.items()
        }

    def _total(self, name: str, spec: TensorSpec) -> Array:
        first, *others = self._ordered_sums(name)
        compute_type = self._call.problem.compute_type
        total = first.astype(compute_type)
        for array in others:
            total += array.astype(compute_type, copy=False)
        return total.astype(spec.dtype, copy=False)

    def _ordered_sums(self, name: str) -> Iterator[Array]:
        for number in sorted(self._sums):
            yield self._sums[number][name]
