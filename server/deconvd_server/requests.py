"""What requests ask for, checked: nothing here touches a tensor's elements, or allocates for one.

Most requests are made again and again, with other elements: what they ask for is remembered by their other bytes, and
not to be changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.errors import InvalidArgumentError
from deconvd.gradients import Wanted
from deconvd.messages import geometry_from_message, options_from_message
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec, problem_of
from deconvd.shared_slice import SharedSlice
from deconvd.tensor import message_from_spec, spec_from_message
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


@dataclass(frozen=True, kw_only=True)
class _Asked(ABC):
    """What a request asks for.

    Attributes:
        keep: The fields of the operands and results that are to be kept.
        slices: Where those lie, or are to be put, that have their place in shared memory; by their fields.
    """

    problem: Problem
    options: Options
    keep: frozenset[str] = frozenset()
    slices: Mapping[str, SharedSlice] = field(default_factory=dict)

    @property
    @abstractmethod
    def operands(self) -> dict[str, TensorSpec]:
        """What it is computed from, by the names of the fields, in the order in which they stream."""

    @property
    @abstractmethod
    def results(self) -> dict[str, TensorSpec]:
        """What its results will be, by the names of their fields."""

    @cached_property
    def shared_bytes(self) -> int:
        """What the operands have that lie in shared memory, together."""
        return sum(spec.nbytes for name, spec in self.operands.items() if name in self.slices)

    @cached_property
    def sent(self) -> dict[str, TensorSpec]:
        """What goes into the response with its elements, of the results, by the names of their fields."""
        return {
            name: spec
            for name, spec in self.results.items()
            if name not in self.slices and name not in self.keep
        }

    @cached_property
    def described(self) -> dict[str, pb.Tensor]:
        """The messages of its results without elements, by the names of their fields: not to be changed."""
        described = {name: message_from_spec(spec) for name, spec in self.results.items()}
        for name, message in described.items():
            if name in self.slices:
                self.slices[name].write_to(message.shared)
        return described


@dataclass(frozen=True, kw_only=True)
class Deconvolution(_Asked):
    """What a DeconvolveRequest asks for. See `_Asked`."""

    with_b: bool

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
        keep = {name for name in ("x", "w", "b") if getattr(message.keep, name)}
        keep |= {"y"} if message.keep_y else set()
        _check_places(message, keep)
        return Deconvolution(
            problem=problem,
            with_b=with_b,
            options=options_from_message(message.options),
            keep=frozenset(keep),
            slices=_slices(message, ("w", "b", "x"), ("y",)),
        )

    @cached_property
    def operands(self) -> dict[str, TensorSpec]:
        """What it is computed from, by the names of the fields, in the order in which they stream."""
        problem = self.problem
        return {"w": problem.W, **({"b": problem.b} if self.with_b else {}), "x": problem.x}

    @cached_property
    def results(self) -> dict[str, TensorSpec]:
        """What its result will be, by the name of its field."""
        return {"y": self.problem.y}

    @cached_property
    def response(self) -> pb.DeconvolveResponse:
        """The response, without elements, where nothing is kept: not to be changed."""
        return pb.DeconvolveResponse(y=self.described["y"])


@dataclass(frozen=True, kw_only=True)
class Differentiation(_Asked):
    """What a DeconvolveGradRequest asks for; it keeps results alone. See `_Asked`."""

    wanted: Wanted

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
        keep = frozenset(
            name
            for name in ("gx", "gw", "gb")
            if getattr(mask, name) and getattr(message.keep, name)
        )
        _check_places(message, keep)
        return Differentiation(
            problem=problem,
            wanted=wanted,
            options=options_from_message(message.options),
            keep=keep,
            slices=_slices(message, ("w", "x", "gy"), ("gx", "gw", "gb")),
        )

    @cached_property
    def operands(self) -> dict[str, TensorSpec]:
        """What it is computed from, by the names of the fields, in the order in which they stream."""
        problem, wanted = self.problem, self.wanted
        w = {"w": problem.W} if wanted.gx else {}
        x = {"x": problem.x} if wanted.gW else {}
        return {**w, **x, "gy": problem.y}

    @cached_property
    def results(self) -> dict[str, TensorSpec]:
        """What its results will be, by the names of their fields."""
        problem, wanted = self.problem, self.wanted
        all_of_them = {"gx": problem.x, "gw": problem.W, "gb": problem.b}
        is_wanted = {"gx": wanted.gx, "gw": wanted.gW, "gb": wanted.gb}
        return {name: spec for name, spec in all_of_them.items() if is_wanted[name]}

    @cached_property
    def response(self) -> pb.DeconvolveGradResponse:
        """The response, without elements, where nothing is kept: not to be changed."""
        return pb.DeconvolveGradResponse(**self.described)


def _slices(
    message: pb.DeconvolveRequest | pb.DeconvolveGradRequest,
    operands: Iterable[str],
    results: Iterable[str],
) -> dict[str, SharedSlice]:
    """Return where tensors lie, or are to be put, in shared memory, by their fields."""
    slices = {}
    for name in operands:
        tensor: pb.Tensor = getattr(message, name)
        if tensor.HasField("shared"):
            slices[name] = SharedSlice.from_message(tensor.shared)
    for name in results:
        if message.HasField(f"{name}_place"):  # type: ignore[arg-type]
            slices[name] = SharedSlice.from_message(getattr(message, f"{name}_place"))
    return slices


def _check_places(
    message: pb.DeconvolveRequest | pb.DeconvolveGradRequest, keep: Iterable[str]
) -> None:
    for name in keep:
        place = f"{name}_place"
        if place in message.DESCRIPTOR.fields_by_name and message.HasField(place):  # type: ignore[arg-type]
            raise InvalidArgumentError(
                f"{place} must be left out where {name} is to be kept", argument=place
            )


def _problem(message: pb.DeconvolveRequest | pb.DeconvolveGradRequest) -> Problem:
    return problem_of(
        spec_from_message("x", message.x),
        spec_from_message("W", message.w),
        geometry_from_message(message.geometry),
    )
