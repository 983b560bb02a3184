"""Tensors of any size as the parts of a stream: a header's message first, then elements, cut anywhere.

They cross as gRPC's messages (`deconvd.wire.chunks`), or as frames (`deconvd.direct.frame_stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.tensor import elements_of, is_raw

__all__ = [
    "MAX_UNREQUESTED_BYTES",
    "ElementsPart",
    "Part",
    "PartReader",
    "PartSource",
    "PendingElements",
    "Uint8Array",
    "elements_part",
    "elements_parts",
    "parse_part",
    "slices",
]

MAX_UNREQUESTED_BYTES: Final = 64 << 20
"""Elements that may come before those that were said to be missing."""

_COPY_BLOCK_BYTES: Final = 8 << 20
"""What is copied at once for it to be sent."""

Uint8Array: TypeAlias = npt.NDArray[np.uint8]

_PartT = TypeVar("_PartT", bound=Message)


@dataclass(frozen=True, slots=True)
class ElementsPart:
    """The next elements of a stream.

    Attributes:
        data: As in `Tensor.raw`.
        is_missing: Whether they are of what the server has found missing.
    """

    data: memoryview
    is_missing: bool = False

    def pieces(self, size_bytes: int) -> list[ElementsPart]:
        """Return them in pieces of a size, which are views; the last may have less."""
        if 0 < len(self.data) <= size_bytes:
            return [self]
        starts = range(0, len(self.data), size_bytes)
        return [ElementsPart(self.data[i : i + size_bytes], self.is_missing) for i in starts]


Part: TypeAlias = Message | ElementsPart
"""A message is the header, or what comes in its place."""


@dataclass(frozen=True, slots=True)
class PendingElements:
    """Elements that come next, and are to be read."""

    size_bytes: int
    is_missing: bool = False


class PartSource(Protocol):
    """Where the parts of a stream come from, in their order."""

    def next(self) -> Message | PendingElements | None:
        """Return the next part; None at the end.

        Raises:
            InvalidArgumentError: It is none.
        """

    def read_into(self, target: Uint8Array) -> None:
        """Read the next of the elements ahead. No more is asked for than there are."""


def elements_part(array: Array, *, is_missing: bool = False) -> ElementsPart:
    """Return the part that carries an array's elements."""
    return ElementsPart(elements_of(array), is_missing)


def elements_parts(array: Array, *, is_missing: bool = False) -> Iterator[ElementsPart]:
    """Yield parts that carry an array's elements.

    What must be copied first, since it is not laid out as in `Tensor.raw`, is copied piece by piece: the next
    only when it is asked for.
    """
    if is_raw(array):
        yield elements_part(array, is_missing=is_missing)
        return
    for block in _blocks(array):
        yield elements_part(block, is_missing=is_missing)


def _blocks(array: Array) -> Iterator[Array]:
    """Yield views of an array that have few elements and lie one behind the other in row-major order."""
    if array.nbytes <= _COPY_BLOCK_BYTES:
        yield array
        return
    row_bytes = array[:1].nbytes
    if row_bytes > _COPY_BLOCK_BYTES:
        for row in array:
            yield from _blocks(row)
    else:
        for rows in slices(len(array), _COPY_BLOCK_BYTES // row_bytes):
            yield array[rows]


def slices(count: int, step: int) -> Iterator[slice]:
    """Yield the slices of so many samples, `step` at a time."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def parse_part(part_type: type[_PartT], data: bytes) -> _PartT:
    """Return the message of a stream that bytes hold. Raises InvalidArgumentError if they hold none."""
    try:
        return part_type.FromString(data)
    except DecodeError:
        name = part_type.DESCRIPTOR.full_name
        raise InvalidArgumentError(f"a part of the stream is not a valid {name}") from None


def _empty_array(spec: TensorSpec) -> Array:
    """Return an array with any elements."""
    return np.empty(spec.shape, spec.dtype)


class PartReader(Generic[_PartT]):
    """The parts of a stream as messages and arrays.

    Args:
        source: Where they come from.
        part_type: The type of its messages.
        empty: Returns new memory for a tensor.
    """

    def __init__(
        self,
        source: PartSource,
        part_type: type[_PartT],
        empty: Callable[[TensorSpec], Array] = _empty_array,
    ) -> None:
        self._source = source
        self._part_type = part_type
        self._empty = empty
        self._peeked: _PartT | None = None
        self._pending_bytes = 0  # of the elements that the source is at
        self._unrequested = bytearray()  # one for all: many small chunks take what their bytes take
        self._unrequested_taken_bytes = 0

    def read_header(self) -> _PartT:
        """Return the stream's first message.

        Raises:
            InvalidArgumentError: It is none, or no header.
        """
        part = self._peek_message()
        self._peeked = None
        if part is None or part.WhichOneof("part") != "header":
            raise InvalidArgumentError("a stream must begin with a header")
        return part

    def read_missing_fields(self) -> Sequence[str]:
        """Return the fields that a response's first message says are missing; none if it is a header.

        Raises:
            InvalidArgumentError: It is no message of such a stream.
        """
        part = self._peek_message()
        if part is None or part.WhichOneof("part") != "missing":
            return ()
        self._peeked = None
        fields: Sequence[str] = part.missing.fields  # type: ignore[attr-defined]  # whose field it is
        return fields

    def _peek_message(self) -> _PartT | None:
        """Return the stream's first message, and again until `_peeked` is set to None."""
        if self._peeked is None:
            part = self._source.next()
            self._peeked = part if isinstance(part, self._part_type) else None
        return self._peeked

    def read(self, name: str, spec: TensorSpec) -> Array:
        """Return the next tensor. Its memory is touched only as its elements arrive.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: The stream ends before it is whole, or has something else.
        """
        array = self._empty(spec.raw)
        target = array.reshape(-1).view(np.uint8)
        if self._unrequested:
            target = target[self._fill_from_unrequested(target) :]
        self._fill(name, target, is_missing=False)
        return array.astype(spec.dtype, copy=False)

    def read_missing(self, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """Return the tensors that were said to be missing. What comes before them is kept for `read`.

        Args:
            specs: By the names of the arguments, in the order in which they come.

        Raises:
            InvalidArgumentError: As `read` does; or too much comes before them.
        """
        arrays: dict[str, Array] = {}
        for name, spec in specs.items():
            array = self._empty(spec.raw)
            self._fill(name, array.reshape(-1).view(np.uint8), is_missing=True)
            arrays[name] = array.astype(spec.dtype, copy=False)
        if self._pending_bytes:
            raise InvalidArgumentError(
                "a stream must have no more missing chunks than were missing"
            )
        return arrays

    def expect_end(self) -> None:
        """Raise InvalidArgumentError if there is more."""
        has_early = self._unrequested_taken_bytes < len(self._unrequested)
        if self._pending_bytes or has_early or self._source.next() is not None:
            raise InvalidArgumentError("a stream must end with its last tensor, and this has more")

    def _fill_from_unrequested(self, target: Uint8Array) -> int:
        """Set bytes from elements that came early, and return how many."""
        begin = self._unrequested_taken_bytes
        count = min(len(target), len(self._unrequested) - begin)
        if count:
            target[:count] = np.frombuffer(self._unrequested, np.uint8, count, begin)
            self._unrequested_taken_bytes += count
        if count and self._unrequested_taken_bytes == len(self._unrequested):
            self._unrequested, self._unrequested_taken_bytes = bytearray(), 0
        return count

    def _fill(self, name: str, target: Uint8Array, *, is_missing: bool) -> None:
        """Set bytes from the elements that come."""
        filled = 0
        while filled < len(target):
            if not self._pending_bytes:
                self._pending_bytes = self._advance_to_elements(
                    name, len(target) - filled, is_missing=is_missing
                )
            taken_bytes = min(self._pending_bytes, len(target) - filled)
            self._source.read_into(target[filled : filled + taken_bytes])
            self._pending_bytes -= taken_bytes
            filled += taken_bytes

    def _advance_to_elements(self, name: str, lacking_bytes: int, *, is_missing: bool) -> int:
        """Go to the next elements of a kind, and return how many bytes they have."""
        while True:
            part = self._source.next()
            if part is None:
                raise InvalidArgumentError(
                    f"the stream ends {lacking_bytes} bytes before {name} is whole", argument=name
                )
            if not isinstance(part, PendingElements) or (part.is_missing and not is_missing):
                raise InvalidArgumentError("a stream must have nothing but chunks after its header")
            if not part.size_bytes:
                raise InvalidArgumentError(
                    f"a chunk must not be empty, and one with elements of {name} is", argument=name
                )
            if part.is_missing == is_missing:
                return part.size_bytes
            self._buffer_unrequested(name, part.size_bytes)

    def _buffer_unrequested(self, name: str, size_bytes: int) -> None:
        """Keep elements that have come before what is missing."""
        if len(self._unrequested) + size_bytes > MAX_UNREQUESTED_BYTES:
            raise InvalidArgumentError(
                f"a stream must have at most {MAX_UNREQUESTED_BYTES} bytes of chunks before {name}, which is "
                "missing",
                argument=name,
            )
        elements = np.empty(size_bytes, np.uint8)
        self._source.read_into(elements)
        self._unrequested += elements.data
