"""What is timed of operators, and the table that comes of it. Needs no card."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from deconvd.model.dtypes import BFLOAT16, DType

__all__ = ["HEADER", "PRECISIONS", "OperatorRow", "Precision", "mean_lines"]


@dataclass(frozen=True)
class Precision:
    """An element type and how its products are taken.

    Attributes:
        flops_per_s: What matrix products reach on one H200, as measured.
        tolerance: The relative error of norms that two right results may differ by.
    """

    name: str
    dtype: DType
    flops_per_s: float
    tolerance: float
    allow_tf32: bool = False


PRECISIONS = (
    Precision("float16", np.dtype(np.float16), 790e12, 2e-3),
    Precision("bfloat16", BFLOAT16, 790e12, 1.6e-2),
    Precision("float32", np.dtype(np.float32), 50e12, 1e-5),
    Precision("tf32", np.dtype(np.float32), 375e12, 2e-3, allow_tf32=True),
)


@dataclass(frozen=True)
class OperatorRow:
    """A line of the table; its fields are those of the JSON file."""

    layer: str
    dtype: str
    op: str
    ours_ms: float
    peers: dict[str, float]
    floor_ms: float
    plans: list[str]
    error: float

    def __str__(self) -> str:
        nchw, nhwc = self.peers["torch_nchw"], self.peers["torch_nhwc"]
        return (
            f"{self.layer:30} {self.dtype:8} {self.op:4} {self.ours_ms:8.4f} {nchw:8.4f} {nhwc:8.4f} "
            f"{self.floor_ms:8.4f} {self.ours_ms / nchw:6.2f} {self.ours_ms / min(nchw, nhwc):6.2f} "
            f"{self.ours_ms / self.floor_ms:6.1f}  {', '.join(self.plans)}"
        )


HEADER = (
    f"{'layer':30} {'type':8} {'op':4} {'ours':>8} {'NCHW':>8} {'NHWC':>8} {'floor':>8} "
    f"{'/NCHW':>6} {'/best':>6} {'/floor':>6}  plans"
)


def mean_lines(rows: list[OperatorRow]) -> list[str]:
    """Return a line for each type and operation: geometric means of ratios."""
    lines = []
    for kind in PRECISIONS:
        for op in ("y", "grad"):
            some = [row for row in rows if (row.dtype, row.op) == (kind.name, op)]
            if some:
                nchw = _geometric_mean([row.ours_ms / row.peers["torch_nchw"] for row in some])
                best = _geometric_mean([row.ours_ms / min(row.peers.values()) for row in some])
                floor = _geometric_mean([row.ours_ms / row.floor_ms for row in some])
                slower = sum(row.ours_ms > 1.05 * row.peers["torch_nchw"] for row in some)
                lines.append(
                    f"{kind.name:8} {op:4} geometric mean of ours: {nchw:.2f} of PyTorch's NCHW, "
                    f"{best:.2f} of its best, {floor:.1f} floors; {slower} of {len(some)} rows slower"
                )
    return lines


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
