"""What requests ask for, checked: nothing here touches a tensor's elements, or allocates for one."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd.gradients import Wanted
from deconvd.messages import geometry_from_message, options_from_message
from deconvd.options import Options
from deconvd.problem import Problem
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
    def result_bytes(self) -> int:
        """Size of the result."""
        return self.problem.y.nbytes


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
    def result_bytes(self) -> int:
        """Size of the results together."""
        gx, gW, gb = self.problem.x.nbytes, self.problem.W.nbytes, self.problem.b.nbytes
        return self.wanted.gx * gx + self.wanted.gW * gW + self.wanted.gb * gb


def _problem(message: pb.DeconvolveRequest | pb.DeconvolveGradRequest) -> Problem:
    return Problem(
        spec_from_message("x", message.x),
        spec_from_message("W", message.w),
        geometry_from_message(message.geometry),
    )
