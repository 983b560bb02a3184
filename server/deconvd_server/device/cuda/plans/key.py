"""What tells one plan from another. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deconvd.model.options import Options, UseCudnn
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product

__all__ = ["PlanKey", "digest_of"]


@dataclass(frozen=True, slots=True)
class PlanKey:
    """A kind of request: all that decides which plan serves it on one card.

    Make it with `of`, so that requests which mean the same have the same key.

    Attributes:
        operation: What is computed.
        problem: Of what; its outsize is given.
        options: How.
        workspace_limit_bytes: What a plan may take beside its operands.
    """

    product: Product
    problem: Problem
    options: Options
    workspace_limit_bytes: int

    @classmethod
    def of(
        cls, operation: Product, problem: Problem, options: Options, workspace_limit_bytes: int
    ) -> PlanKey:
        """Return the key of a request."""
        geometry = replace(problem.geometry, outsize=problem.output)
        single = problem.x.dtype == problem.W.dtype == np.float32
        return cls(
            operation,
            Problem(problem.x, problem.W, geometry),
            replace(options, allow_tf32=options.allow_tf32 and single),
            workspace_limit_bytes,
        )

    def without_cudnn(self) -> PlanKey:
        """Return the key of the same request, where cuDNN may not be used."""
        return replace(self, options=replace(self.options, use_cudnn=UseCudnn.NEVER))

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        options = self.options
        return {
            **self.product_fields(),
            "cudnn_deterministic": options.cudnn_deterministic,
            "autotune": options.autotune,
            "use_cudnn": str(options.use_cudnn),
            "allow_tf32": options.allow_tf32,
            "workspace_limit_bytes": self.workspace_limit_bytes,
        }

    def product_fields(self) -> dict[str, Any]:
        """Return what is computed, and of what, as JSON has it."""
        geometry = self.problem.geometry
        return {
            "operation": str(self.product),
            "x": _tensor(self.problem.x),
            "W": _tensor(self.problem.W),
            "stride": list(geometry.stride),
            "pad": list(geometry.pad),
            "dilate": list(geometry.dilate),
            "groups": geometry.groups,
            "outsize": list(self.problem.output),
        }


def digest_of(fields: dict[str, Any]) -> str:
    """Return a name for what JSON has: different for whatever differs."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _tensor(spec: TensorSpec) -> list[Any]:
    return [spec.dtype.name, *spec.shape]
