"""The position of a tensor in memory that a server lends."""

from __future__ import annotations

from typing import NamedTuple

from deconvd.errors import InvalidArgumentError
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["SharedSlice"]


class SharedSlice(NamedTuple):
    """The start of a tensor in lent memory.

    Attributes:
        region: The region's name.
        offset_bytes: Offset from the start of the region.
    """

    region: bytes
    offset_bytes: int

    @classmethod
    def from_message(cls, message: pb.SharedSlice) -> SharedSlice:
        """Return the slice in a message."""
        return cls(message.region, message.offset_bytes)

    def write_to(self, message: pb.SharedSlice) -> None:
        """Set a message to this slice."""
        message.region, message.offset_bytes = self

    def check(self, name: str, spec: TensorSpec, size_bytes: int) -> None:
        """Raise InvalidArgumentError unless a tensor can be at this position.

        Args:
            name: Name of the argument, for errors.
            size_bytes: Size of the region.
        """
        if not 0 <= self.offset_bytes <= size_bytes - spec.nbytes:
            raise InvalidArgumentError(
                f"{name} must be inside its region of {size_bytes} bytes, got {spec.nbytes} bytes at "
                f"offset {self.offset_bytes}",
                argument=name,
            )
        if self.offset_bytes % spec.dtype.itemsize:
            raise InvalidArgumentError(
                f"{name} must start at a multiple of its element size of {spec.dtype.itemsize} bytes, got "
                f"offset {self.offset_bytes}",
                argument=name,
            )
