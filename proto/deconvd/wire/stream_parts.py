"""The parts of a stream: a message with the header first, then elements, cut anywhere.

gRPC carries them as messages (`deconvd.wire.chunks`), a direct connection as frames (`deconvd.direct.frame_stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.packed_elements import MAX_UNPACKED_BYTES, pack
from deconvd.wire.tensor import elements_of, is_raw

__all__ = [
    "ElementsPart",
    "Part",
    "PartReader",
    "PartSource",
    "PendingElements",
    "Uint8Array",
    "elements_part",
    "elements_parts",
    "packed_parts",
    "parse_part",
    "slices",
    "takes_packed",
]

_COPY_BLOCK_BYTES: Final = 8 << 20
"""How much is copied at a time from an array whose layout is not that of `Tensor.raw`."""

Uint8Array: TypeAlias = npt.NDArray[np.uint8]

_PartT = TypeVar("_PartT", bound=Message)


@dataclass(frozen=True, slots=True)
class ElementsPart:
    """Elements to send in a stream.

    Attributes:
        data: The elements, as in `Tensor.raw`.
        is_packed: Whether the data is packed (`deconvd.wire.packed_elements`).
    """

    data: memoryview
    is_packed: bool = False

    def pieces(self, size_bytes: int) -> list[ElementsPart]:
        """Return views of the elements in pieces of `size_bytes`. The last may be smaller. Packed data stays whole."""
        if len(self.data) <= size_bytes or self.is_packed:
            return [self] if self.data else []
        starts = range(0, len(self.data), size_bytes)
        return [ElementsPart(self.data[i : i + size_bytes]) for i in starts]


Part: TypeAlias = Message | ElementsPart
"""A message is the header."""


@dataclass(frozen=True, slots=True)
class PendingElements:
    """Elements that come next in a stream. They must be read before the next part.

    Attributes:
        is_packed: Whether they come packed. A `PartSource` unpacks them: there `size_bytes` is their plain size.
    """

    size_bytes: int
    is_packed: bool = False


class PartSource(Protocol):
    """The received parts of a stream, in order.

    Attributes:
        is_buffered: Whether elements are pending only once all of them have arrived.
    """

    is_buffered: bool

    def next(self) -> Message | PendingElements | None:
        """Return the next part. None at the end.

        Raises:
            InvalidArgumentError: The part is malformed.
        """

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements. It must not be larger than they are."""


def elements_part(array: Array) -> ElementsPart:
    """Return one part with all elements of an array."""
    return ElementsPart(elements_of(array))


def elements_parts(array: Array) -> Iterator[ElementsPart]:
    """Yield parts with the elements of an array.

    An array whose layout is not that of `Tensor.raw` must be copied. It is copied block by block, each only when its
    part is requested.
    """
    if is_raw(array):
        yield ElementsPart(elements_of(array))
        return
    for block in _blocks(array):
        yield ElementsPart(elements_of(block))


def takes_packed(part_type: type[Message]) -> bool:
    """Return whether elements may be packed in a stream of such messages."""
    return "packed_chunk" in part_type.DESCRIPTOR.fields_by_name


def packed_parts(parts: Iterable[ElementsPart], element_bytes: int) -> Iterator[ElementsPart]:
    """Yield the same elements, packed where that makes them much smaller.

    Args:
        parts: Parts with whole elements.
        element_bytes: The size of an element.
    """
    for part in parts:
        for piece in part.pieces(MAX_UNPACKED_BYTES):
            packed = pack(piece.data, element_bytes)
            yield piece if packed is None else ElementsPart(packed, is_packed=True)


def _blocks(array: Array) -> Iterator[Array]:
    """Yield small views that together cover an array, in row-major order."""
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
    """Yield slices that together cover `count` samples, each of `step` samples. The last may have fewer."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def parse_part(part_type: type[_PartT], data: bytes) -> _PartT:
    """Parse a message of a stream. Raises InvalidArgumentError if the bytes are not a valid message."""
    try:
        return part_type.FromString(data)
    except DecodeError:
        name = part_type.DESCRIPTOR.full_name
        raise InvalidArgumentError(f"each part of the stream must be a valid {name}") from None


def _empty_array(spec: TensorSpec) -> Array:
    """Return an array with arbitrary elements."""
    return np.empty(spec.shape, spec.dtype)


class PartReader(Generic[_PartT]):
    """Assembles the parts of a stream into messages and arrays, and checks their order.

    Args:
        source: The received parts.
        part_type: The type of the stream's messages.
        empty: Allocates an array for a tensor.

    Attributes:
        empty: The same. It may be set when the header, or a later part, tells where the tensors are needed.
    """

    def __init__(
        self,
        source: PartSource,
        part_type: type[_PartT],
        empty: Callable[[TensorSpec], Array] = _empty_array,
    ) -> None:
        self._source = source
        self._part_type = part_type
        self.empty = empty
        self._pending_bytes = 0  # pending elements of the source that were not read yet

    def read_header(self) -> _PartT:
        """Return the stream's header, which must come next.

        Raises:
            InvalidArgumentError: The stream has something else, or has ended.
        """
        part = self._source.next()
        if not isinstance(part, self._part_type) or part.WhichOneof("part") != "header":
            raise InvalidArgumentError("a stream must begin with a header")
        return part

    def read(self, name: str, spec: TensorSpec) -> Array:
        """Return the next tensor. Its memory is written only as its elements arrive.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: The stream ends before the tensor is complete, or has something else.
        """
        array = self.empty(spec.raw)
        self._fill(name, array.reshape(-1).view(np.uint8))
        return array.astype(spec.dtype, copy=False)

    def expect_end(self) -> None:
        """Raise InvalidArgumentError unless the stream has ended."""
        if self._pending_bytes or self._source.next() is not None:
            raise InvalidArgumentError(
                "a stream must end with its last tensor, got more elements or messages"
            )

    def _fill(self, name: str, target: Uint8Array) -> None:
        """Fill `target` with elements as they arrive."""
        filled = 0
        while filled < len(target):
            if not self._pending_bytes:
                self._pending_bytes = self._advance_to_elements(name, len(target) - filled)
            taken_bytes = min(self._pending_bytes, len(target) - filled)
            self._source.read_into(target[filled : filled + taken_bytes])
            self._pending_bytes -= taken_bytes
            filled += taken_bytes

    def _advance_to_elements(self, name: str, lacking_bytes: int) -> int:
        """Wait for the next elements, and return their size in bytes."""
        part = self._source.next()
        if part is None:
            raise InvalidArgumentError(
                f"the stream ends {lacking_bytes} bytes before {name} is complete",
                argument=name,
            )
        if not isinstance(part, PendingElements):
            raise InvalidArgumentError("a stream must have only chunks after its header")
        if not part.size_bytes:
            raise InvalidArgumentError(
                f"each chunk must have at least one byte, got an empty one in {name}",
                argument=name,
            )
        return part.size_bytes
