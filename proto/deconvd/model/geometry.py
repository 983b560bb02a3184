"""How a filter moves over an image: stride, pad, dilate, groups and outsize, and the output sizes that follow. Pure."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, SupportsIndex

from deconvd.errors import InvalidArgumentError

__all__ = [
    "MAX_EXTENT",
    "Geometry",
    "IntOrPair",
    "OutputSize",
    "Pair",
    "parse_sizes",
    "shorten",
]

Pair = tuple[int, int]
"""A value for each axis of an image: (along the height, along the width)."""

OutputSize = tuple[int | None, int | None]
"""The size of the output image, (h_O, w_O), in pixels. None: the axis has its natural size."""

IntOrPair = SupportsIndex | Sequence[SupportsIndex]

MAX_EXTENT = 2**31 - 1
"""The largest extent, stride, pad or dilate: cuDNN's integers have 32 bits."""

_MAX_SHOWN_BITS = 256
"""Larger integers are not written in errors: Python refuses to convert very long ones to text."""

_AXES = ("Height", "Width")

_NOT_SEQUENCES = (Set, Mapping, bytes, bytearray)
"""Types of values that can be iterated over, and are no sequences of numbers: some have no order."""

_MAX_SHOWN_LETTERS = 200

_MAX_SIZES_COUNT = 64
"""How many dimensions an array of numpy's can have."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the filter moves, in normal form: one value for each axis, (height, width).

    Attributes:
        stride: Steps of the filter over the output, in pixels, each at least 1.
        pad: Pixels cut from the output at both ends of each axis, each at least 0.
        outsize: Size of the output image, each None or at least 1.
        dilate: Distance between neighbouring taps of the filter, in pixels, each at least 1.
        groups: Number of groups that the channels are split into, at least 1.

    Raises:
        InvalidArgumentError: A value is out of its range.
    """

    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    outsize: OutputSize = (None, None)
    dilate: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.dilate) < 1:
            raise _dilate_error(self.dilate)
        _check_range("stride", self.stride, at_least=1)
        _check_range("pad", self.pad, at_least=0)
        _check_range("dilate", self.dilate, at_least=1)
        _check_range("groups", (self.groups,), at_least=1)
        _check_range("outsize", tuple(o for o in self.outsize if o is not None), at_least=1)

    @classmethod
    def from_arguments(
        cls,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> Geometry:
        """Return the geometry for arguments in the forms that `deconvolution_2d` accepts.

        Args:
            stride, pad, dilate: An int for both axes, or a sequence of two.
            outsize: None, or a sequence of two, each an int or None.
            groups: An int.

        Raises:
            InvalidArgumentError: An argument has another type, or is out of its range.
        """
        dilate_pair = _pair("dilate", dilate)
        if min(dilate_pair) < 1:
            raise _dilate_error(dilate)  # Chainer's message echoes the argument as it was given
        return _geometry(
            _pair("stride", stride),
            _pair("pad", pad),
            (None, None) if outsize is None else _outsize(outsize),
            dilate_pair,
            _integer("groups", groups, "an int"),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments with which `deconvolution_2d` and the other functions have this geometry."""
        return {
            "stride": self.stride,
            "pad": self.pad,
            "outsize": self.outsize,
            "dilate": self.dilate,
            "groups": self.groups,
        }

    def output_size(self, image: Pair, kernel: Pair) -> Pair:
        """Return the size ``(h_O, w_O)`` of the output image, in pixels.

        Args:
            image: Size ``(h_I, w_I)`` of the input image.
            kernel: Size ``(h_K, w_K)`` of the filter.

        Raises:
            InvalidArgumentError: The output would be empty, or `outsize` differs from the natural size by a stride or
                more.

        Along each axis the natural size is ``s (i - 1) + d (k - 1) + 1 - 2 p``, as in Chainer's
        ``get_deconv_outsize`` (v7.8, ``cover_all=False``).
        """
        natural = self.natural_size(image, kernel)
        return (self._axis_size(0, natural[0]), self._axis_size(1, natural[1]))

    def natural_size(self, image: Pair, kernel: Pair) -> Pair:
        """Return the output size for an `outsize` of None. It may be zero or negative, which `output_size` rejects."""
        h, w = (
            s * (i - 1) + d * (k - 1) + 1 - 2 * p
            for i, k, s, p, d in zip(image, kernel, self.stride, self.pad, self.dilate, strict=True)
        )
        return h, w

    def _axis_size(self, axis: int, natural: int) -> int:
        given = self.outsize[axis]
        if given is None:
            if not 0 < natural <= MAX_EXTENT:
                allowed = "positive" if natural < 1 else f"at most {MAX_EXTENT}"
                raise InvalidArgumentError(
                    f"{_AXES[axis]} in the output must be {allowed}. It would be {natural}: "
                    "change the sizes of x and W, stride, pad or dilate, or give outsize.",
                )
            return natural
        spare = self.stride[axis] - 1
        if abs(given - natural) > spare:
            raise InvalidArgumentError(
                f"outsize: {_AXES[axis].lower()} must be from {max(natural - spare, 1)} to "
                f"{natural + spare} (the natural size is {natural}; outsize may differ from it by at most "
                f"stride - 1), got {given}",
                argument="outsize",
            )
        return given


_geometry = lru_cache(maxsize=1024)(Geometry)
"""A cache, because most calls are repeated with the same geometry."""


def _dilate_error(dilate: object) -> InvalidArgumentError:
    message = f"Dilate should be positive, but {dilate} is supplied."
    return InvalidArgumentError(message, argument="dilate")


def _check_range(name: str, values: Sequence[int], *, at_least: int) -> None:
    if any(not at_least <= value <= MAX_EXTENT for value in values):
        given = values[0] if len(values) == 1 else tuple(values)
        raise InvalidArgumentError(
            f"{name} must be from {at_least} to {MAX_EXTENT}, got {given}", argument=name
        )


def _pair(name: str, value: IntOrPair) -> Pair:
    allowed = "an int or a pair of ints"
    try:
        integer = operator.index(value)  # type: ignore[arg-type]  # the try finds out whether it is an integer
    except TypeError:
        first, second = _split_pair(name, value, allowed)
        return _integer(name, first, allowed), _integer(name, second, allowed)
    if integer.bit_length() > _MAX_SHOWN_BITS:
        raise _length_error(name, integer)
    return integer, integer


def _integer(name: str, value: object, allowed: str) -> int:
    try:
        integer = operator.index(value)  # type: ignore[arg-type]  # the try finds out whether it is an integer
    except TypeError:
        raise _kind_error(name, value, allowed) from None
    if integer.bit_length() > _MAX_SHOWN_BITS:
        raise _length_error(name, integer)
    return integer


def _outsize(value: Sequence[SupportsIndex | None]) -> OutputSize:
    allowed = "None or a pair, each an int or None"
    h, w = _split_pair("outsize", value, allowed)
    return (
        None if h is None else _integer("outsize", h, allowed),
        None if w is None else _integer("outsize", w, allowed),
    )


def _split_pair(name: str, value: object, allowed: str) -> tuple[object, object]:
    if isinstance(value, Iterable) and not isinstance(value, _NOT_SEQUENCES):
        with suppress(
            TypeError
        ):  # an array without dimensions has __iter__, but cannot be iterated over
            elements = tuple(islice(value, 3))  # it may be long, or have no end
            if len(elements) == 2:
                return elements[0], elements[1]
    raise _kind_error(name, value, allowed)


def parse_sizes(shape: object) -> tuple[int, ...] | None:
    """Return the sizes in a sequence of integers, which is no longer than numpy allows; None if it is anything else."""
    if not isinstance(shape, Iterable) or isinstance(shape, _NOT_SEQUENCES):
        return None
    try:
        sizes = tuple(map(operator.index, islice(shape, _MAX_SIZES_COUNT + 1)))
    except TypeError:
        return None
    return sizes if len(sizes) <= _MAX_SIZES_COUNT else None


def _length_error(name: str, integer: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} must be at most {MAX_EXTENT}, got an int of {integer.bit_length()} bits",
        argument=name,
    )


def shorten(value: object) -> str:
    """Return how an error shows a value that is of a wrong type. It can be anything, also a long list."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of whatever class it is; and Python refuses to convert very long integers
        text = f"a value of type {type(value).__qualname__}"
    return text if len(text) <= _MAX_SHOWN_LETTERS else f"{text[:_MAX_SHOWN_LETTERS]}..."


def _kind_error(name: str, value: object, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} must be {allowed}, got {shorten(value)}", argument=name)
