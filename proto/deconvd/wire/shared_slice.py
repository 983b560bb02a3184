"""Where a tensor lies in memory that a server lends, as messages say it."""

from __future__ import annotations

from typing import NamedTuple

from deconvd.errors import InvalidArgumentError
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["SharedSlice"]


class SharedSlice(NamedTuple):
    """Where a tensor begins in lent memory.

    Attributes:
        region: The region's name.
        offset_bytes: From its begin.
    """

    region: bytes
    offset_bytes: int

    @classmethod
    def from_message(cls, message: pb.SharedSlice) -> SharedSlice:
        """Return what a message says."""
        return cls(message.region, message.offset_bytes)

    def write_to(self, message: pb.SharedSlice) -> None:
        """Have a message say this."""
        message.region, message.offset_bytes = self

    def check(self, name: str, spec: TensorSpec, size_bytes: int) -> None:
        """Raise InvalidArgumentError unless a tensor may lie here, in a region of some size.

        Args:
            name: Name of the argument, for errors.
        """
        if not 0 <= self.offset_bytes <= size_bytes - spec.nbytes:
            raise InvalidArgumentError(
                f"{name} must lie in its region of {size_bytes} bytes, got {spec.nbytes} bytes at "
                f"offset {self.offset_bytes}",
                argument=name,
            )
        if self.offset_bytes % spec.dtype.itemsize:
            raise InvalidArgumentError(
                f"{name} must lie at a multiple of its elements' {spec.dtype.itemsize} bytes, got "
                f"offset {self.offset_bytes}",
                argument=name,
            )
