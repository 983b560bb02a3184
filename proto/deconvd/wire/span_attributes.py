"""What spans of OpenTelemetry say about a call, in the client and on the server, by its conventions for RPCs."""

from __future__ import annotations

from typing import Any, Final

from google.rpc import code_pb2

from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["STATUS_CODE", "call_attributes", "problem_attributes", "span_name", "status_number"]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name

STATUS_CODE: Final = "rpc.grpc.status_code"


def span_name(method: str) -> str:
    """Return the name of a call's span."""
    return f"{_SERVICE}/{method}"


def call_attributes(method: str) -> dict[str, Any]:
    """Return what is known of any call. Direct connections carry the methods and statuses of gRPC, too."""
    return {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}


def status_number(status: str) -> int:
    """Return the number of a gRPC status."""
    number: int = code_pb2.Code.Value(status)
    return number


def problem_attributes(problem: Problem) -> dict[str, Any]:
    """Return the shapes and element types of x, W and y."""
    found: dict[str, Any] = {}
    tensors: tuple[tuple[str, TensorSpec], ...] = (
        ("x", problem.x),
        ("w", problem.W),
        ("y", problem.y),
    )
    for name, spec in tensors:
        found[f"deconvd.{name}.shape"] = spec.shape
        found[f"deconvd.{name}.dtype"] = spec.dtype.name
    return found
