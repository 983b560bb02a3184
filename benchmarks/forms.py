"""What kept forms of W save: ``python -m benchmarks.forms --device cuda --json FILE``.

Many plans begin by transposing, packing or casting W. Where W stays on a card, the form that they make of it may stay
with it. Two tensors hold the same W: one keeps its forms, the other may not grow, so every call prepares W anew. Calls
with each take turns on one device in this process, without client and transport. Times are medians; the ratio is how
many times as long a call takes without the form.

Rows are of those layers and results whose plan makes something of W: y from x, and gx from gy. Each is timed twice:
with the other tensors on the card, where only the kernels count, and in plain memory of the host. Needs an NVIDIA card.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from benchmarks.commit import commit
from benchmarks.layers import LAYERS, Layer
from deconvd.errors import DeconvdError
from deconvd.model.dtypes import BFLOAT16, Array, DType
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import Tensor
from deconvd_server.device.cuda import open_device
from deconvd_server.device.cuda.plan import PRODUCTS, Plan, Prepacking, prepacking_of
from deconvd_server.device.faults import DeviceUnavailableError

if TYPE_CHECKING:
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.tensors.tensor import CudaTensor

_OPERATIONS = {"y": (DECONVOLVE, "x"), "gx": (DECONVOLVE_GRAD, "gy")}
"""The operation that gives each result, and the operand beside W that it is computed from."""

_BATCHES = (1, 8, 64)
_WARM_UPS = 4
"""A form is made when it is wanted for the second time, and the call's graph is captured after that."""

_DRAWN_COUNT = (1 << 20) - 3
"""Elements that are drawn; larger arrays repeat them."""

_LEAST_CALLS = 5
_MOST_CALLS = 2000


@dataclass(frozen=True)
class Row:
    """One layer, batch size, element type and result; its fields are those of the JSON file.

    Attributes:
        n: Batch size.
        result: What is computed: y or gx.
        where: Where the tensors beside W are: on the card, or in memory of the host.
        tuned: Whether the plan was found by timing all that there are.
        plan: Its name.
        W_bytes, form_bytes: What W takes, and the form that is kept beside it.
        kept_ms: What a call takes with the form.
        anew_ms: What it takes without.
        ratio: How many times as long that is.
    """

    layer: str
    n: int
    dtype: str
    result: str
    where: str
    tuned: bool
    plan: str
    W_bytes: int
    form_bytes: int
    kept_ms: float
    anew_ms: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.layer:32} n {self.n:3} {self.dtype:8} {self.result:2} {self.where:4} "
            f"kept {self.kept_ms:8.3f} ms, anew {self.anew_ms:8.3f} ms, ratio {self.ratio:.3f}  "
            f"W {self.W_bytes / 1e6:.2f} MB + {self.form_bytes / 1e6:.2f}  {self.plan}"
        )


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option(
    "--layer", "layers", type=click.Choice([layer.name for layer in LAYERS]), multiple=True
)
@click.option("-n", "batches", type=click.IntRange(min=1), multiple=True, default=_BATCHES)
@click.option(
    "--type",
    "dtypes",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    multiple=True,
    default=("float16", "float32"),
)
@click.option("--tuned", is_flag=True, help="Let plans be found by timing: up to 5 s for each.")
@click.option("--max-mib", default=1024, show_default=True, help="Leave larger problems out.")
@click.option("--time-s", default=0.5, show_default=True, help="How long each row is timed.")
def main(
    device: str,
    json_file: Path | None,
    layers: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    tuned: bool,
    max_mib: int,
    time_s: float,
) -> None:
    """Time calls whose W stays on a card with its forms kept, against the same calls without."""
    ordinal = _ordinal(device)
    try:
        card = open_device(ordinal)
    except (DeviceUnavailableError, ImportError) as error:
        raise click.ClickException(f"{device} cannot be used: {error}") from None
    chosen = [layer for layer in LAYERS if not layers or layer.name in layers]
    rows: list[Row] = []
    bench = _Bench(card, Options(autotune=tuned), time_s)
    try:
        for layer in chosen:
            for n in batches:
                for name in dtypes:
                    case = _Case(replace(layer, n=n), _dtype(name))
                    if case.nbytes > max_mib << 20:
                        print(f"{layer.name:32} n {n:3} {name:8} left out: too large", flush=True)
                        continue
                    for row in _rows_or_reason(bench, case):
                        rows.append(row)
                        print(row, flush=True)
                        _write(json_file, card, rows)  # what is measured stays, whatever follows
    finally:
        card.close()
    _print_summary(rows)


def _ordinal(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise click.BadParameter(
            f"{device!r} keeps no forms of W: only cards do, cuda or cuda:N",
            param_hint="'--device'",
        )
    return int(number or 0)


def _dtype(name: str) -> DType:
    return BFLOAT16 if name == BFLOAT16.name else np.dtype(name)


class _NoFormError(Exception):
    """What was to be timed did not happen: the card had no room for a form, say."""


@dataclass(frozen=True)
class _Case:
    """A layer of some batch size, for an element type."""

    layer: Layer
    dtype: DType

    @property
    def problem(self) -> Problem:
        """It as a problem."""
        return self.layer.problem(self.dtype)

    @property
    def nbytes(self) -> int:
        """Size of x, W and y together."""
        return self.layer.nbytes(self.dtype)


@dataclass(frozen=True)
class _Bench:
    """A card, and how it is timed."""

    device: CudaDevice
    options: Options
    time_s: float

    def plan(self, result: str, problem: Problem) -> Plan:
        """Return the plan for a result."""
        with self.device.activate():
            key = self.device.plan_key(PRODUCTS[result], problem, self.options)
            return self.device.plans.get(key, lambda: None)

    def rows(self, case: _Case) -> Iterator[Row]:
        """Yield a row for each result of a case whose plan makes something of W, and for each place of tensors."""
        for result in _OPERATIONS:
            plan = self.plan(result, case.problem)
            prepacking = prepacking_of(plan)
            if prepacking is not None:
                for where in ("card", "host"):
                    yield self._row(case, result, where, plan, prepacking)

    def _row(self, case: _Case, result: str, where: str, plan: Plan, prepacking: Prepacking) -> Row:
        problem = case.problem
        with ExitStack() as stack:
            W_array = _random(problem.W, 0)
            kept, anew = (self._put(W_array, stack) for _ in range(2))
            kept.may_grow = lambda _: True
            other, place = self._others(problem, result, where, stack)
            times_ms = _times_ms(
                lambda: self._call(problem, result, kept, other, place),
                lambda: self._call(problem, result, anew, other, place),
                self.time_s,
            )
            if kept.prepacked is None or kept.prepacked.get(prepacking.key) is None:
                raise _NoFormError(f"no form of {plan.name} was kept: both sides were the same")
        return Row(
            layer=case.layer.name,
            n=case.layer.n,
            dtype=case.dtype.name,
            result=result,
            where=where,
            tuned=self.options.autotune,
            plan=plan.name,
            W_bytes=problem.W.nbytes,
            form_bytes=prepacking.size_bytes,
            kept_ms=times_ms[0],
            anew_ms=times_ms[1],
            ratio=times_ms[1] / times_ms[0],
        )

    def _others(
        self, problem: Problem, result: str, where: str, stack: ExitStack
    ) -> tuple[Tensor, Tensor]:
        """Return the operand beside W, and the place of the result."""
        _, operand = _OPERATIONS[result]
        array = _random(spec_of_field(problem, operand), 1)
        spec = spec_of_field(problem, result)
        out: Array = np.zeros(spec.shape, spec.dtype)
        if where == "host":
            return array, out
        return self._put(array, stack), self._put(out, stack)

    def _put(self, array: Array, stack: ExitStack) -> CudaTensor:
        tensor = self.device.empty(TensorSpec(array.shape, array.dtype))
        stack.callback(self.device.free, tensor)
        self.device.write(tensor, array, CallContext())
        return tensor

    def _call(
        self, problem: Problem, result: str, W: CudaTensor, other: Tensor, place: Tensor
    ) -> None:
        operation, operand = _OPERATIONS[result]
        operands = {"w": W, operand: other}
        self.device.run(operation, problem, operands, {result: place}, self.options, CallContext())


def _rows_or_reason(bench: _Bench, case: _Case) -> Iterator[Row]:
    """Yield a case's rows; if it cannot be timed, for want of memory, say, print why and go on."""
    try:
        yield from bench.rows(case)
    except (DeconvdError, MemoryError, _NoFormError) as error:
        name, n, dtype = case.layer.name, case.layer.n, case.dtype.name
        print(f"{name:32} n {n:3} {dtype:8} left out: {error}", flush=True)


def _random(spec: TensorSpec, seed: int) -> Array:
    some = np.random.default_rng(seed).standard_normal(_DRAWN_COUNT, np.float32).astype(spec.dtype)
    return np.resize(some, spec.shape)


def _times_ms(
    first: Callable[[], object], second: Callable[[], object], time_s: float
) -> tuple[float, float]:
    """Return the median times of two kinds of calls, which take turns so that both meet the same noise."""
    for _ in range(_WARM_UPS):
        first()
        second()
    calls = [(first, list[float]()), (second, list[float]())]
    end_s = time.perf_counter() + time_s
    count = 0
    while count < _LEAST_CALLS or (time.perf_counter() < end_s and count < _MOST_CALLS):
        for call, times in calls:
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
        calls.reverse()  # so that neither always comes behind the other
        count += 1
    by_call = dict(calls)
    return statistics.median(by_call[first]) * 1e3, statistics.median(by_call[second]) * 1e3


def _write(json_file: Path | None, card: CudaDevice, rows: Sequence[Row]) -> None:
    if json_file is None:
        return
    about = {
        "card": card.info.name,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows_json = [asdict(row) for row in rows]
    json_file.write_text(json.dumps(about | {"rows": rows_json}, indent=1) + "\n")


def _print_summary(rows: Sequence[Row]) -> None:
    """Print for each place and batch size how many times as long calls take without forms."""
    if not rows:
        print("no plan makes anything of W")
    for where in ("card", "host"):
        for n in sorted({row.n for row in rows}):
            ratios = [row.ratio for row in rows if (row.where, row.n) == (where, n)]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(
                    f"{where} n {n:3}: {mean:.3f} times as long without forms in the geometric mean "
                    f"of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}"
                )


if __name__ == "__main__":
    main()
