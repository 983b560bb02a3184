"""What requests ask for, checked: nothing here touches a tensor's elements, or allocates for one.

Most requests are made again and again, with other elements: what they ask for is remembered by their other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.gradients import Wanted
from deconvd.messages import geometry_from_message, options_from_message
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec, problem_of
from deconvd.tensor import spec_from_message
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["Deconvolution", "Differentiation"]

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Message)

_REMEMBERED_COUNT: Final = 1024
_REMEMBERED_BYTES: Final = 1024
"""More than any request has beside elements: what is longer is read anew each time."""


def _remembered(
    message_type: type[_Request],
) -> Callable[[Callable[[_Request], _T]], Callable[[_Request], _T]]:
    """Make a function of a message remember what it returned for an equal one."""

    def decorate(read: Callable[[_Request], _T]) -> Callable[[_Request], _T]:
        @lru_cache(_REMEMBERED_COUNT)
        def read_bytes(data: bytes) -> _T:
            return read(message_type.FromString(data))

        def wrapper(message: _Request) -> _T:
            is_usual = message.ByteSize() <= _REMEMBERED_BYTES
            return read_bytes(message.SerializeToString()) if is_usual else read(message)

        return wraps(read)(wrapper)

    return decorate


@dataclass(frozen=True, slots=True)
class Deconvolution:
    """What a DeconvolveRequest asks for."""

    problem: Problem
    with_b: bool
    options: Options

    @staticmethod
    @_remembered(pb.DeconvolveRequest)
    def from_message(message: pb.DeconvolveRequest) -> Deconvolution:
        """Return what a message asks for.

        Raises:
            InvalidArgumentError: It asks for what cannot be.
        """
        problem = _problem(message)
        with_b = message.HasField("b")
        if with_b:
            problem.check_b(spec_from_message("b", message.b))
        return Deconvolution(problem, with_b, options_from_message(message.options))

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

    @staticmethod
    @_remembered(pb.DeconvolveGradRequest)
    def from_message(message: pb.DeconvolveGradRequest) -> Differentiation:
        """Return what a message asks for.

        Raises:
            InvalidArgumentError: It asks for what cannot be.
        """
        mask = message.wanted
        wanted = Wanted(gx=mask.gx, gW=mask.gw, gb=mask.gb)
        problem = _problem(message)
        problem.check_gy(spec_from_message("gy", message.gy))
        return Differentiation(problem, wanted, options_from_message(message.options))

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
