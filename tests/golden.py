"""Chainer's own results: see data/README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GoldenCase", "Tolerance", "golden_cases", "tolerance"]

Array = npt.NDArray[Any]

_FILE = Path(__file__).parent / "data" / "chainer-7.8.1.npz"


@dataclass(frozen=True)
class GoldenCase:
    """One call of Chainer's function.

    Attributes:
        params: stride, pad, outsize, dilate and groups, as given.
        arrays: Operands and results by name.
        rejected: Whether Chainer refuses the call.
        gradients_fail: Whether Chainer accepts it, but fails to differentiate it.
    """

    index: int
    params: Mapping[str, Any]
    arrays: Mapping[str, Array]
    rejected: bool
    gradients_fail: bool

    def __str__(self) -> str:
        return str(self.index)


@dataclass(frozen=True)
class Tolerance:
    """How far results may be from Chainer's."""

    atol: float
    rtol: float


@cache
def golden_cases() -> tuple[GoldenCase, ...]:
    """Return all cases, in order."""
    with np.load(_FILE) as archive:
        manifest = json.loads(bytes(archive["manifest"]).decode())
        return tuple(
            GoldenCase(
                index=index,
                params=case["params"],
                arrays={name: archive[f"{index}/{name}"] for name in case["names"]},
                rejected="error" in case,
                gradients_fail="grad_error" in case,
            )
            for index, case in enumerate(manifest["cases"])
        )


def tolerance(case: GoldenCase, order: int) -> Tolerance:
    """Return the tolerance of Chainer's own tests.

    Args:
        order: 0 for y, 1 for gradients, 2 for double backward.
    """
    x, W = case.arrays["x"].dtype, case.arrays["W"].dtype
    if x == np.float16 or (np.float16 == W and order > 0):
        return Tolerance(5e-3, 5e-2)
    if x == W == np.float64:
        return Tolerance(1e-12, 1e-10)
    return Tolerance(1e-4, 1e-3) if order == 2 else Tolerance(1e-5, 1e-4)
