"""Memory that two processes can map, and that neither can shrink under the other."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from deconvd.host.array_address import AddressedArray, address_of
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.shared_memory.memfd_watcher import MemfdWatcher

__all__ = ["OnMap", "SealedMemory", "Unmap"]

Unmap = Callable[[], None]
OnMap = Callable[[int, int], Unmap]
"""Told of memory that was mapped, by its address and its size in bytes; returns what to call before it is unmapped."""

_CACHED_TENSORS_COUNT: Final = 64

# Without it, a peer could cut the file and kill whoever touches what is gone with SIGBUS.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_NOEXEC_SEAL: Final = 8  # Linux 6.3; not yet in `os`


class SealedMemory:
    """A sealed memfd, mapped here: all zeros at first. It takes pages only as they are touched, be it by `on_map`.

    Args:
        size_bytes: A multiple of the page size.
        on_map: Told of the mapping; what it raises, this raises.
        ends: Watches the memfd.

    Raises:
        OSError: The system has none to give, or cannot watch it.

    Attributes:
        descriptor: The memfd, to be sent and then closed by `close_descriptor`; the mapping stays.
        bytes: The mapping. It is unmapped once `unmap` was called and the last view of it has gone.
    """

    def __init__(self, size_bytes: int, on_map: OnMap, ends: MemfdWatcher) -> None:
        self.size_bytes = size_bytes
        self._memfd_watcher = ends
        self._tensors: dict[tuple[TensorSpec, int, bool], Array] = {}
        self.descriptor = _make_sealed_memfd(size_bytes)
        try:
            mapping = mmap.mmap(self.descriptor, size_bytes)
            with suppress(OSError):  # where the system gives such memory no huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
            self._address = address_of(self.bytes)
            self._undo = on_map(self._address, size_bytes)
            self._watch = self._start_watch()
        except BaseException:
            self.close_descriptor()
            raise

    def tensor(
        self, name: str, spec: TensorSpec, lies_at: SharedSlice, *, is_writable: bool
    ) -> Array:
        """Return a part of it as an array of little-endian elements: remembered, since calls come again.

        Whoever has the other mapping may change its elements at any time.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: As `SharedSlice.check` does.
        """
        key = spec, lies_at.offset_bytes, is_writable
        tensor = self._tensors.get(key)
        if tensor is None:
            lies_at.check(name, spec, self.size_bytes)
            if len(self._tensors) >= _CACHED_TENSORS_COUNT:
                self._tensors.clear()
            tensor = self._tensors[key] = self._new_tensor(*key)
        return tensor

    def _new_tensor(self, spec: TensorSpec, offset_bytes: int, is_writable: bool) -> Array:
        tensor = AddressedArray(spec.shape, spec.dtype.newbyteorder("<"), self.bytes, offset_bytes)
        tensor.address = self._address + offset_bytes
        tensor.flags.writeable = is_writable
        return tensor

    def _start_watch(self) -> int:
        try:
            return self._memfd_watcher.watch(self.descriptor)
        except BaseException:
            self._undo()
            raise

    def close_descriptor(self) -> None:
        """Close the memfd, once it was sent."""
        os.close(self.descriptor)

    def unmap(self) -> None:
        """Let go of the mapping. To be called once, when no one uses it."""
        try:
            self._undo()
        finally:
            self.bytes = np.empty(0, np.uint8)
            self._tensors.clear()

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once no other process has it either: now, or later in another thread.

        To be called once, after `unmap`.
        """
        self._memfd_watcher.on_gone(self._watch, then)


def _make_sealed_memfd(size_bytes: int) -> int:
    descriptor = _make_memfd()
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make_memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("deconvd", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # an older kernel
        return os.memfd_create("deconvd", flags)
