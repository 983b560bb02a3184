"""Arrays to Tensor messages, and back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.problem import MAX_DIMENSIONS, TensorSpec, check_extents, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Buffer

__all__ = [
    "array_from_message",
    "array_of_expected_spec",
    "array_of_spec",
    "check_described",
    "element_type_from_number",
    "element_type_number",
    "elements_of",
    "is_raw",
    "message_from_array",
    "message_from_spec",
    "spec_from_message",
]

_NUMBER_BY_DTYPE: dict[DType, pb.ElementType.ValueType] = {
    dtype: pb.ElementType.Value(f"ELEMENT_TYPE_{dtype.name.upper()}") for dtype in ELEMENT_TYPES
}
_DTYPE_BY_NUMBER: dict[int, DType] = {number: dtype for dtype, number in _NUMBER_BY_DTYPE.items()}


def element_type_number(dtype: DType) -> pb.ElementType.ValueType:
    """Return the number of one of `ELEMENT_TYPES` on the wire."""
    return _NUMBER_BY_DTYPE[dtype]


def element_type_from_number(number: int) -> DType | None:
    """Return the element type of a number on the wire. None for an unknown number."""
    return _DTYPE_BY_NUMBER.get(number)


def is_raw(array: Array) -> bool:
    """Return whether an array's layout is that of `Tensor.raw`."""
    return array.flags.c_contiguous and array.dtype == array.dtype.newbyteorder("<")


def elements_of(array: Array) -> memoryview:
    """Return an array's elements in the layout of `Tensor.raw`: a view if the array has it, otherwise a copy."""
    little_endian = array.dtype.newbyteorder("<")
    if not array.flags.c_contiguous or array.dtype != little_endian:
        array = np.asarray(array, little_endian, order="C")
    return array.reshape(-1).view(np.uint8).data


def message_from_array(array: Array) -> pb.Tensor:
    """Return a message with the array's elements. The array may have any layout and byte order."""
    message = message_from_spec(spec_of(array))
    message.raw = bytes(elements_of(array))
    return message


def message_from_spec(spec: TensorSpec) -> pb.Tensor:
    """Return a message that describes a tensor without its elements."""
    return pb.Tensor(element_type=element_type_number(spec.dtype), shape=spec.shape)


def spec_from_message(name: str, message: pb.Tensor) -> TensorSpec:
    """Return the shape and element type in a message. Nothing is allocated for the elements.

    Args:
        name: Name of the argument, for errors.

    Raises:
        InvalidArgumentError: The element type is unknown, or no array can have the shape.
    """
    if len(message.shape) > MAX_DIMENSIONS:  # before the shape is read
        raise InvalidArgumentError(
            f"{name} must have at most {MAX_DIMENSIONS} dimensions, got {len(message.shape)}",
            argument=name,
        )
    return _spec(name, message.element_type, tuple(message.shape))


@lru_cache(maxsize=1024)
def _spec(name: str, element_type: int, shape: tuple[int, ...]) -> TensorSpec:
    dtype = element_type_from_number(element_type)
    if dtype is None:
        allowed = ", ".join(pb.ElementType.Name(n) for n in _NUMBER_BY_DTYPE.values())
        raise InvalidArgumentError(
            f"{name} must have one of the element types {allowed}, got number {element_type}",
            argument=name,
        )
    spec = TensorSpec(shape, dtype)
    check_extents(name, spec)
    return spec


def array_from_message(name: str, message: pb.Tensor, raw: Buffer | None = None) -> Array:
    """Return the tensor in a message, as a read-only view of the message's bytes.

    Args:
        name: Name of the argument, for errors.
        raw: The elements, if `deconvd.wire.codec` has moved them out of the message.

    Raises:
        InvalidArgumentError: The message does not describe a valid tensor. Or its payload is missing, unknown, or
            has another length than the shape requires.
    """
    return array_of_spec(name, spec_from_message(name, message), message, raw)


def array_of_expected_spec(
    name: str, spec: TensorSpec, message: pb.Tensor, raw: Buffer | None
) -> Array:
    """Return the tensor in a message that must have a spec. See `array_from_message`."""
    described = spec_from_message(name, message)
    if described != spec:  # not by `check_described`: small calls notice each function
        raise _other_spec_error(name, spec, described)
    return array_of_spec(name, spec, message, raw)


def check_described(name: str, spec: TensorSpec, message: pb.Tensor) -> None:
    """Raise InvalidArgumentError unless a message describes a tensor of a spec."""
    described = spec_from_message(name, message)
    if described != spec:
        raise _other_spec_error(name, spec, described)


def _other_spec_error(name: str, wanted: TensorSpec, given: TensorSpec) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} must be {wanted}, got {given}", argument=name)


def array_of_spec(name: str, spec: TensorSpec, message: pb.Tensor, raw: Buffer | None) -> Array:
    """Return the tensor in a message whose spec is already known. See `array_from_message`."""
    if raw is None and message.WhichOneof("payload") == "raw":
        raw = message.raw  # protobuf copies it at each access, so it is read only once
    if raw is None:
        raise InvalidArgumentError(
            f"{name} must have its elements as raw bytes, got no payload or an unknown one",
            argument=name,
        )
    if len(raw) != spec.nbytes:
        raise InvalidArgumentError(
            f"{name} must have {spec.nbytes} bytes of elements for {spec}, got {len(raw)}",
            argument=name,
        )
    little_endian: Array = np.ndarray(spec.shape, spec.dtype.newbyteorder("<"), raw)
    return little_endian.astype(spec.dtype, copy=False)
