"""Tensors of any size as the chunks of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from deconvd.codec import (
    Buffer,
    chunk_from_bytes,
    chunk_to_bytes,
    missing_chunk_from_bytes,
    missing_chunk_to_bytes,
)
from deconvd.errors import InvalidArgumentError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, elements_of

__all__ = ["EARLY_BYTES", "ChunkReader", "chunks_of", "missing_chunks_of", "slices"]

_CHUNK_BYTES: Final = 1 << 20
"""The size at which a gRPC stream is fastest: larger messages cost more than their bytes."""

EARLY_BYTES: Final = 64 << 20
"""Elements that may come before those that were said to be missing."""

_FROM_BYTES: Final = {"chunk": chunk_from_bytes, "missing_chunk": missing_chunk_from_bytes}
"""By the name of the part's field."""

_PartT = TypeVar("_PartT", bound=Message)


def _new_array(spec: TensorSpec) -> Array:
    """Return an array with any elements."""
    return np.empty(spec.shape, spec.dtype)


class ChunkReader(Generic[_PartT]):
    """The elements that follow a stream's header, as arrays; chunks may end anywhere.

    Args:
        parts: The stream's messages, as bytes.
        part_type: Their type.
        empty: Returns new memory for a tensor.
    """

    def __init__(
        self,
        parts: Iterator[bytes],
        part_type: type[_PartT],
        empty: Callable[[TensorSpec], Array] = _new_array,
    ) -> None:
        self._parts = parts
        self._part_type = part_type
        self._empty = empty
        self._rest = np.empty(0, np.uint8)
        self._peeked: _PartT | None = None
        self._early: deque[npt.NDArray[np.uint8]] = deque()

    def header(self) -> _PartT:
        """Return the stream's first message.

        Raises:
            InvalidArgumentError: It is none, or no header.
        """
        part = self._peek()
        self._peeked = None
        if part is None or part.WhichOneof("part") != "header":
            raise InvalidArgumentError("a stream must begin with a header")
        return part

    def missing(self) -> Sequence[str]:
        """Return the fields that a response's first message says are missing; none if it is a header.

        Raises:
            InvalidArgumentError: It is no message of such a stream.
        """
        part = self._peek()
        if part is None or part.WhichOneof("part") != "missing":
            return ()
        self._peeked = None
        fields: Sequence[str] = part.missing.fields  # type: ignore[attr-defined]  # as above
        return fields

    def _peek(self) -> _PartT | None:
        """Return the stream's first message, and again until `_peeked` is set to None."""
        if self._peeked is None:
            data = next(self._parts, None)
            self._peeked = None if data is None else self._parsed(data)
        return self._peeked

    def read(self, name: str, spec: TensorSpec) -> Array:
        """Return the next tensor. Its memory is touched only as its elements arrive.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: The stream ends before it is whole, or is no stream of chunks.
        """
        array = self._empty(TensorSpec(spec.shape, spec.dtype.newbyteorder("<")))
        self.read_into(name, array)
        return array.astype(spec.dtype, copy=False)

    def read_into(self, name: str, array: Array) -> None:
        """Set the elements of a C-contiguous little-endian array, in the manner of `read`."""
        self._rest = _fill(array, self._rest, partial(self._next_chunk, name))

    def read_missing(self, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """Return the tensors that were said to be missing. What comes before them is kept for `read`.

        Args:
            specs: By the names of the arguments, in the order in which they come.

        Raises:
            InvalidArgumentError: As `read` does; or too much comes before them.
        """
        arrays: dict[str, Array] = {}
        rest = np.empty(0, np.uint8)
        for name, spec in specs.items():
            array = np.empty(spec.shape, spec.dtype.newbyteorder("<"))
            rest = _fill(array, rest, partial(self._next_missing_chunk, name))
            arrays[name] = array.astype(spec.dtype, copy=False)
        if len(rest):
            raise InvalidArgumentError(
                "a stream must have no more missing chunks than were missing"
            )
        return arrays

    def expect_end(self) -> None:
        """Raise InvalidArgumentError if there is more."""
        if len(self._rest) or self._early or next(self._parts, None) is not None:
            raise InvalidArgumentError("a stream must end with its last tensor, and this has more")

    def _next_chunk(self, name: str, missing_bytes: int) -> npt.NDArray[np.uint8]:
        if self._early:
            return self._early.popleft()
        kind, chunk = self._next_part(name, missing_bytes)
        if kind != "chunk":
            raise InvalidArgumentError("a stream must have nothing but chunks after its header")
        return chunk

    def _next_missing_chunk(self, name: str, missing_bytes: int) -> npt.NDArray[np.uint8]:
        early_bytes = sum(map(len, self._early))
        while early_bytes <= EARLY_BYTES:
            kind, chunk = self._next_part(name, missing_bytes)
            if kind == "missing_chunk":
                return chunk
            self._early.append(chunk)
            early_bytes += len(chunk)
        raise InvalidArgumentError(
            f"a stream must have at most {EARLY_BYTES} bytes of chunks before {name}, which is "
            "missing",
            argument=name,
        )

    def _next_part(self, name: str, missing_bytes: int) -> tuple[str, npt.NDArray[np.uint8]]:
        """Return which kind of chunk comes next, and the chunk."""
        data = next(self._parts, None)
        if data is None:
            raise InvalidArgumentError(
                f"the stream ends {missing_bytes} bytes before {name} is whole", argument=name
            )
        for kind, from_bytes in _FROM_BYTES.items():
            chunk = from_bytes(data)
            if chunk is not None:
                return kind, np.frombuffer(chunk, np.uint8)
        part = self._parsed(data)
        unusual = part.WhichOneof("part")
        if unusual not in _FROM_BYTES:
            raise InvalidArgumentError("a stream must have nothing but chunks after its header")
        return unusual, np.frombuffer(getattr(part, unusual), np.uint8)

    def _parsed(self, data: bytes) -> _PartT:
        try:
            return self._part_type.FromString(data)
        except DecodeError:
            name = self._part_type.DESCRIPTOR.full_name
            raise InvalidArgumentError(f"a part of the stream is not a valid {name}") from None


def _fill(
    array: Array,
    rest: npt.NDArray[np.uint8],
    next_chunk: Callable[[int], npt.NDArray[np.uint8]],
) -> npt.NDArray[np.uint8]:
    """Set the elements of an array from chunks, and return what is left of the last.

    Args:
        rest: What was left of the chunk before.
        next_chunk: Returns one more, when so many bytes are missing.
    """
    target = array.reshape(-1).view(np.uint8)
    filled = 0
    while filled < len(target):
        if not len(rest):
            rest = next_chunk(len(target) - filled)
        taken = rest[: len(target) - filled]
        target[filled : filled + len(taken)] = taken
        filled += len(taken)
        rest = rest[len(taken) :]
    return rest


def chunks_of(array: Array) -> Iterator[bytes]:
    """Yield the messages that carry an array's elements."""
    return _cut(array, chunk_to_bytes)


def missing_chunks_of(array: Array) -> Iterator[bytes]:
    """Yield the messages that carry the elements of an array that the server has found missing."""
    return _cut(array, missing_chunk_to_bytes)


def _cut(array: Array, to_bytes: Callable[[Buffer], bytes]) -> Iterator[bytes]:
    elements = elements_of(array)
    for start in range(0, len(elements), _CHUNK_BYTES):
        yield to_bytes(elements[start : start + _CHUNK_BYTES])


def slices(count: int, step: int) -> Iterator[slice]:
    """Yield the slices of so many samples, `step` at a time."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
