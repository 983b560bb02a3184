"""A descriptor of cuDNN's graph API: attributes are set, then it is finalized, then it is used."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from deconvd_server.device.cuda.cudnn.enums import Attribute, AttributeType, DescriptorType
from deconvd_server.device.cuda.cudnn.library import Cudnn

__all__ = ["Descriptor", "DescriptorScope"]

_C_TYPES: dict[AttributeType, Any] = {
    AttributeType.INT64: ctypes.c_int64,
    AttributeType.FLOAT: ctypes.c_float,
    AttributeType.DOUBLE: ctypes.c_double,
}
"""C types of numbers. Attributes of all other types are pointers, see below, or enumerations, which are ints."""

_POINTERS = (AttributeType.HANDLE, AttributeType.VOID_PTR, AttributeType.BACKEND_DESCRIPTOR)


class Descriptor:
    """A descriptor, which its owner must close. Methods raise `CudnnError`.

    It is not closed when it is collected: at the interpreter's exit cuDNN may be unloaded already.
    """

    def __init__(self, cudnn: Cudnn, kind: DescriptorType) -> None:
        self._cudnn = cudnn
        self._pointer = ctypes.c_void_p()
        cudnn.call("cudnnBackendCreateDescriptor", ctypes.c_int(kind), ctypes.byref(self._pointer))

    @property
    def address(self) -> int:
        """Its `cudnnBackendDescriptor_t`."""
        return self._pointer.value or 0

    def set(self, attribute: Attribute, kind: AttributeType, *values: float) -> None:
        """Set an attribute to numbers, addresses, or members of an enumeration."""
        self._set(attribute, kind, len(values), _array(kind, values))

    def set_text(self, attribute: Attribute, text: bytes) -> None:
        """Set an attribute to characters."""
        self._set(
            attribute, AttributeType.CHAR, len(text), ctypes.create_string_buffer(text, len(text))
        )

    def finalize(self) -> None:
        """Check the attributes and build the object that they describe, which may take long."""
        self._cudnn.call("cudnnBackendFinalize", self._pointer)

    def get(self, attribute: Attribute, kind: AttributeType, limit: int = 1) -> list[int]:
        """Return the numbers of an attribute, at most `limit`."""
        values = _array(kind, (0,) * limit)
        count = self._get(attribute, kind, limit, values)
        return [int(value) for value in values[:count]]

    def get_into(self, attribute: Attribute, others: Sequence[Descriptor]) -> int:
        """Fill other descriptors from an attribute. Return how many of them were filled."""
        pointers = _array(AttributeType.BACKEND_DESCRIPTOR, [other.address for other in others])
        return self._get(attribute, AttributeType.BACKEND_DESCRIPTOR, len(others), pointers)

    def get_text(self, attribute: Attribute) -> bytes:
        """Return the characters of an attribute."""
        size = self.count(attribute, AttributeType.CHAR)
        buffer = ctypes.create_string_buffer(size)
        count = self._get(attribute, AttributeType.CHAR, size, buffer)
        return buffer.raw[:count]

    def count(self, attribute: Attribute, kind: AttributeType) -> int:
        """Return the number of elements of an attribute."""
        return self._get(attribute, kind, 0, None)

    def close(self) -> None:
        """Free the descriptor. Closing twice is harmless."""
        if self._pointer:
            self._cudnn.call("cudnnBackendDestroyDescriptor", self._pointer)
            self._pointer = ctypes.c_void_p()

    def _set(self, attribute: Attribute, kind: AttributeType, count: int, values: object) -> None:
        self._cudnn.call(
            "cudnnBackendSetAttribute",
            self._pointer,
            ctypes.c_int(attribute),
            ctypes.c_int(kind),
            ctypes.c_int64(count),
            values,
        )

    def _get(self, attribute: Attribute, kind: AttributeType, limit: int, values: object) -> int:
        count = ctypes.c_int64()
        self._cudnn.call(
            "cudnnBackendGetAttribute",
            self._pointer,
            ctypes.c_int(attribute),
            ctypes.c_int(kind),
            ctypes.c_int64(limit),
            ctypes.byref(count),
            values,
        )
        return count.value


class DescriptorScope:
    """Closes the descriptors that it makes at the end of a with-block."""

    def __init__(self, cudnn: Cudnn) -> None:
        self._cudnn = cudnn
        self._stack = ExitStack()

    def __enter__(self) -> DescriptorScope:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def new(self, kind: DescriptorType) -> Descriptor:
        """Return a new descriptor that is closed with the block."""
        descriptor = Descriptor(self._cudnn, kind)
        self._stack.callback(descriptor.close)
        return descriptor


def _array(kind: AttributeType, values: Sequence[float]) -> Any:
    # Any: ctypes' types have no common supertype that mypy could follow
    element: Any = ctypes.c_void_p if kind in _POINTERS else _C_TYPES.get(kind, ctypes.c_int)
    return (element * len(values))(*values)
