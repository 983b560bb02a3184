"""The tensors that devices compute with, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec

__all__ = ["DeviceTensor", "LentMemory", "Tensor", "refuse_growth"]


def refuse_growth(_size_bytes: int) -> bool:
    """Let no tensor grow."""
    return False


class DeviceTensor(Protocol):
    """A tensor in a device's own memory: C-contiguous, in native byte order. Made by `Device.empty`.

    It is of use to calls of that device alone: others raise ValueError, as all do for a tensor that
    is freed already. Its owner must see that no call reads it while another writes it, and that none
    is under way with it, or a view of it, when it is freed.

    Attributes:
        may_grow: Asked, with a number of bytes, whether the device may keep so much more with the
            tensor: what it has made of it, so as not to make it again, and frees with it. The
            answer True counts them; what comes to nothing is given back as a negative number. At
            first it is never allowed.
    """

    may_grow: Callable[[int], bool]

    @property
    def spec(self) -> TensorSpec:
        """Its shape and element type."""

    @property
    def device_id(self) -> str:
        """The `DeviceInfo.id` of its device."""

    def samples(self, start: int, stop: int) -> DeviceTensor:
        """Return a view of ``tensor[start:stop]``; bounds as ``0 <= start <= stop <= shape[0]``.

        A view is never freed itself, and is of no use once the tensor is.
        """


class LentMemory(Protocol):
    """A card's memory that another process may open too. Made by `Device.lend`.

    The other process may change it at any time.
    """

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def handle(self) -> bytes:
        """What the other process opens it by: a ``cudaIpcMemHandle_t``."""

    def tensor(self, spec: TensorSpec, offset_bytes: int) -> DeviceTensor:
        """Return a part of it as a tensor, which is never freed itself."""

    def free(self) -> None:
        """Give it back, once. No call may be under way with a part of it, and no other process have it open."""


Tensor: TypeAlias = Array | DeviceTensor
"""What a device reads or writes: an array in host memory, or a tensor in its own."""
