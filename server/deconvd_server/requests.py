"""What requests ask for, checked: nothing here touches a tensor's elements, or allocates for one."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd.gradients import Wanted
from deconvd.messages import geometry_from_message, options_from_message
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec, problem_of
from deconvd.tensor import spec_from_message
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["Deconvolution", "Differentiation"]


@dataclass(frozen=True, slots=True)
class Deconvolution:
    """What a DeconvolveRequest asks for."""

    problem: Problem
    with_b: bool
    options: Options

    @classmethod
    def from_message(cls, message: pb.DeconvolveRequest) -> Deconvolution:
        """Return what a message asks for.

        Raises:
            InvalidArgumentError: It asks for what cannot be.
        """
        problem = _problem(message)
        if message.HasField("b"):
            problem.check_b(spec_from_message("b", message.b))
        return cls(problem, message.HasField("b"), options_from_message(message.options))

    @property
    def results(self) -> dict[str, TensorSpec]:
        """What its result will be, by the name of its field."""
        return {"y": self.problem.y}


@dataclass(frozen=True, slots=True)
class Differentiation:
    """What a DeconvolveGradRequest asks for."""

    problem: Problem
    wanted: Wanted
    options: Options

    @classmethod
    def from_message(cls, message: pb.DeconvolveGradRequest) -> Differentiation:
        """Return what a message asks for.

        Raises:
            InvalidArgumentError: It asks for what cannot be.
        """
        mask = message.wanted
        wanted = Wanted(gx=mask.gx, gW=mask.gw, gb=mask.gb)
        problem = _problem(message)
        problem.check_gy(spec_from_message("gy", message.gy))
        return cls(problem, wanted, options_from_message(message.options))

    @property
    def results(self) -> dict[str, TensorSpec]:
        """What its results will be, by the names of their fields."""
        problem, wanted = self.problem, self.wanted
        all_of_them = {"gx": problem.x, "gw": problem.W, "gb": problem.b}
        is_wanted = {"gx": wanted.gx, "gw": wanted.gW, "gb": wanted.gb}
        return {field: spec for field, spec in all_of_them.items() if is_wanted[field]}


def _problem(message: pb.DeconvolveRequest | pb.DeconvolveGradRequest) -> Problem:
    return problem_of(
        spec_from_message("x", message.x),
        spec_from_message("W", message.w),
        geometry_from_message(message.geometry),
    )
