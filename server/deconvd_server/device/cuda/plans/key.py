"""The key of a plan. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product

__all__ = ["PlanKey", "digest_of"]


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that decides which plan serves a request on one card.

    Make it with `of`, so that requests with the same meaning have the same key.

    Attributes:
        product: The product that the plan computes.
        problem: Its outsize is given, even if it is the natural one.
        options: The request's.
        workspace_limit_bytes: The largest workspace that a plan may have.
    """

    product: Product
    problem: Problem
    options: Options
    workspace_limit_bytes: int

    @classmethod
    def of(
        cls, product: Product, problem: Problem, options: Options, workspace_limit_bytes: int
    ) -> PlanKey:
        """Return the key of a request."""
        geometry = replace(problem.geometry, outsize=problem.output)
        is_float32 = problem.x.dtype == problem.W.dtype == np.float32  # TF32 is for no other type
        is_never = options.use_cudnn_tensor_core is UseCudnnTensorCore.NEVER
        # ALWAYS allows what AUTO allows; TF32 is of tensor cores alone
        used = UseCudnnTensorCore.NEVER if is_never else UseCudnnTensorCore.AUTO
        allow_tf32 = options.allow_tf32 and is_float32 and not is_never
        return cls(
            product,
            Problem(problem.x, problem.W, geometry),
            replace(options, allow_tf32=allow_tf32, use_cudnn_tensor_core=used),
            workspace_limit_bytes,
        )

    def without_cudnn(self) -> PlanKey:
        """Return the key of the same request, where cuDNN may not be used."""
        return replace(self, options=replace(self.options, use_cudnn=UseCudnn.NEVER))

    def fields(self) -> dict[str, Any]:
        """Return the key as an object of JSON."""
        options = self.options
        # named only if it is set: the files of a store that is older than this option keep their names
        is_never = options.use_cudnn_tensor_core is UseCudnnTensorCore.NEVER
        tensor_core = {"use_cudnn_tensor_core": "never"} if is_never else {}
        return {
            **self.product_fields(),
            "cudnn_deterministic": options.cudnn_deterministic,
            "autotune": options.autotune,
            "use_cudnn": str(options.use_cudnn),
            "allow_tf32": options.allow_tf32,
            "workspace_limit_bytes": self.workspace_limit_bytes,
            **tensor_core,
        }

    def product_fields(self) -> dict[str, Any]:
        """Return the product and the problem as an object of JSON."""
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
    """Return a name for an object of JSON: the SHA-256 of its text."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _tensor(spec: TensorSpec) -> list[Any]:
    return [spec.dtype.name, *spec.shape]
