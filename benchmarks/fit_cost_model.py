"""Fits the cost model to measured plans: ``python -m benchmarks.fit_cost_model``.

The plans are those of results/plans.json. ``--measured FILE``, once for each file of `benchmarks.model` with its
problems from 1000 on, makes that anew, with the candidates of each problem that a server might try without
``autotune``. Coefficients are shared as far as the data are few: each is the sum of one for all plans of a family, one
for the product and one for the arithmetic, and large ones cost (ridge regression, robust against outliers). Prints how
good the picks are: of problems that the coefficients were not fitted to (ten-fold cross-validation), and of all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

import deconvd_server
from benchmarks.random_problems import TYPES
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans.cost_model import (
    CostModel,
    Family,
    arithmetic_of,
    features_of,
    order_families,
    worth_trying,
)

__all__ = ["MEASURED_FILE", "MeasuredProblem", "load_problems", "picks"]

MEASURED_FILE: Final = Path(__file__).parent / "results" / "plans.json"
_MODEL_FILE: Final = (
    Path(deconvd_server.__file__).parent / "device" / "cuda" / "plans" / "cost_model.json"
)

_KEPT_COUNT: Final = 3
"""cuDNN's proposals that are kept of each list, and tried by a server."""

_ARITHMETICS: Final = ("half", "float32", "tf32", "float64")
_FOLDS_COUNT: Final = 10
_RIDGE: Final = 8.0
_ARITHMETIC_FEATURES_COUNT: Final = 14
"""The first features, whose coefficients depend on the arithmetic."""

_OUTLIER: Final = 0.4
"""Errors of logarithms above that count less."""

_ROUNDS_COUNT: Final = 6

_ROUGH_MS: Final = 0.4
"""A shorter plan that was given up, as others were several times faster, has only a rough time: that of the host."""

_Coefficients = dict[str, dict[str, dict[str, list[float]]]]


class MeasuredProblem:
    """A problem with the times of its plans.

    Args:
        row: Of the file.

    Attributes:
        tuned_ms: The fastest of all plans.
        times_ms: By family, the plans in the order in which a server tries them.
        is_rough: The families whose times are rough.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        fields = row["problem"]
        dtype = TYPES[row["dtype"]]
        geometry = Geometry(
            stride=tuple(fields["stride"]),
            pad=tuple(fields["pad"]),
            outsize=tuple(fields["y"][2:]),
            dilate=tuple(fields["dilate"]),
            groups=fields["groups"],
        )
        self.product = Product(row["op"])
        self.problem = Problem(
            TensorSpec(tuple(fields["x"]), dtype), TensorSpec(tuple(fields["W"]), dtype), geometry
        )
        self.options = Options(allow_tf32=row["dtype"] == "tf32")
        self.arithmetic = arithmetic_of(self.problem, self.options)
        self.features = features_of(self.product, self.problem, self.arithmetic)
        self.tuned_ms: float = row["tuned_ms"]
        self.times_ms: dict[Family, list[float]] = {}
        self.is_rough: set[Family] = set()
        best_ms = float("inf")
        lists: dict[str, list[float]] = {}
        for candidate in row["candidates"]:
            source, ms = candidate["source"], candidate["ms"]
            if source in ("own", "fallback"):
                family = Family(candidate["name"])
                self.times_ms[family] = [ms]
                if max(6 * best_ms, 0.1) < ms < _ROUGH_MS:
                    self.is_rough.add(family)
            else:
                lists.setdefault(source, []).append(ms)
            best_ms = min(best_ms, ms)
        proposed = lists.get("nchw A") or lists.get("nchw FALLBACK")
        if proposed:
            self.times_ms[Family.CUDNN] = proposed


@click.command(help=__doc__)
@click.option("--measured", "files", type=click.Path(path_type=Path, exists=True), multiple=True)
def main(files: Sequence[Path]) -> None:
    """Fit, write the coefficients, and print how good they are."""
    if files:
        MEASURED_FILE.write_text(_kept(files))
    problems = load_problems()
    folds = np.random.default_rng(1).permutation(len(problems)) % _FOLDS_COUNT
    ratios: dict[str, list[float]] = {}
    for fold in range(_FOLDS_COUNT):
        fitted = [problem for problem, of in zip(problems, folds, strict=True) if of != fold]
        left_out = [problem for problem, of in zip(problems, folds, strict=True) if of == fold]
        model = CostModel(fit(fitted))
        for problem in left_out:
            for name, ms in picks(model, problem).items():
                ratios.setdefault(name, []).append(ms / problem.tuned_ms)
    print(
        f"{len(problems)} problems, each predicted from the others; over the fastest of all plans:"
    )
    _print_ratios(ratios)
    coefficients = fit(problems)
    _MODEL_FILE.write_text(json.dumps({"coefficients": coefficients}) + "\n")
    model = CostModel(coefficients)
    ratios = {}
    for problem in problems:
        for name, ms in picks(model, problem).items():
            ratios.setdefault(name, []).append(ms / problem.tuned_ms)
    print("all, each predicted from all:")
    _print_ratios(ratios)


def load_problems() -> list[MeasuredProblem]:
    """Return the problems that were measured."""
    return [MeasuredProblem(row) for row in json.loads(MEASURED_FILE.read_text())["rows"]]


def picks(model: CostModel, problem: MeasuredProblem) -> dict[str, float]:
    """Return the milliseconds of the plans that are picked: without any timing, and if those worth a try are timed.

    Beside them what would be picked without a model: cuDNN's first proposal, and the fastest of all families.
    """
    times_ms = problem.times_ms
    predicted_ms = model.predict_ms(problem.product, problem.problem, problem.options, times_ms)
    tried = worth_trying(predicted_ms)
    cudnn_ms = times_ms.get(Family.CUDNN, times_ms[Family.FALLBACK])
    return {
        "one, untimed": times_ms[order_families(predicted_ms)[0]][0],
        "those worth a try": min(min(times_ms[family][:_KEPT_COUNT]) for family in tried),
        "cuDNN's first": cudnn_ms[0],
        "two of cuDNN, all of ours": min(min(times[:2]) for times in times_ms.values()),
    }


def fit(problems: Sequence[MeasuredProblem]) -> _Coefficients:
    """Return the coefficients of the families."""
    coefficients: _Coefficients = {}
    for family in Family:
        if family is Family.DEPTHWISE:
            continue  # too few
        some = [
            problem
            for problem in problems
            if family in problem.times_ms and family not in problem.is_rough
        ]
        rows = np.array([_shared(p.features, p.product, p.arithmetic) for p in some])
        times = np.log2([problem.times_ms[family][0] for problem in some])
        found = _regress(rows, times)
        count = len(some[0].features)
        coefficients[family] = {
            product: {
                arithmetic: [
                    round(float(_shared(unit, product, arithmetic) @ found), 6)
                    for unit in np.eye(count)
                ]
                for arithmetic in _ARITHMETICS
            }
            for product in Product
        }
    return coefficients


def _shared(features: Sequence[float] | Array, product: Product, arithmetic: str) -> Array:
    """Return features for all plans of a family, then once for each product, then for each arithmetic."""
    own = np.asarray(features)
    few = own[:_ARITHMETIC_FEATURES_COUNT]
    parts = [own, *(own * (product is one) for one in Product)]
    parts += [few * (arithmetic == one) for one in _ARITHMETICS]
    return np.concatenate(parts)


def _regress(rows: Array, values: Array) -> Array:
    """Return the coefficients of a ridge regression, in which outliers count less."""
    scale = rows.std(axis=0)
    scale[scale < 1e-9] = np.inf  # constant: the first feature has the constant part
    scale[0] = 1.0
    scaled = rows / scale
    penalty = _RIDGE * np.eye(rows.shape[1])
    penalty[0, 0] = 0.0
    weights = np.ones(len(values))
    for _ in range(_ROUNDS_COUNT):
        weighted = scaled * weights[:, None]
        found = np.linalg.solve(weighted.T @ scaled + penalty, weighted.T @ values)
        weights = 1 / np.maximum(np.abs(values - scaled @ found), _OUTLIER)
        weights /= weights.mean()
    result: Array = found / scale
    return result


def _print_ratios(ratios: Mapping[str, Sequence[float]]) -> None:
    for name, of in ratios.items():
        values = np.array(of)
        print(
            f"    {name:26} geometric mean {np.exp(np.log(values).mean()):.3f}, "
            f"within 1.3 {(values <= 1.3).mean():.1%}, over 2 {(values > 2).mean():.1%}, worst {values.max():.1f}"
        )


def _kept(files: Sequence[Path]) -> str:
    """Return what is kept of measured files, as text with a line for each problem."""
    reports = [json.loads(file.read_text()) for file in files]
    lines = []
    for report in reports:
        for row in report["rows"]:
            kept = {name: row[name] for name in ("problem", "dtype", "op", "tuned_ms")}
            kept["candidates"] = [
                {
                    name: candidate[name]
                    for name in ("source", "rank", "name", "deterministic", "ms")
                }
                for candidate in row["candidates"]
                if _is_kept(candidate)
            ]
            lines.append(json.dumps(kept))
    head = json.dumps({name: reports[0][name] for name in ("card", "commit", "date")})
    rows = ",\n".join(lines)
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def _is_kept(candidate: Mapping[str, Any]) -> bool:
    if candidate["source"] == "fallback":
        return True
    can_run = candidate["allowed"] and candidate["ms"] < float("inf")
    sources = ("own", "nchw A", "nchw FALLBACK")
    return can_run and candidate["source"] in sources and candidate["rank"] < _KEPT_COUNT + 1


if __name__ == "__main__":
    main()
