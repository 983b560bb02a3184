"""Memory that two processes can map, and that neither can shrink while the other uses it."""

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
"""Called with the address and the size in bytes of newly mapped memory; returns what to call before it is unmapped."""

_CACHED_TENSORS_COUNT: Final = 64

# Without these seals a client could truncate the file: the server would die of SIGBUS when it reads what is gone.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_NOEXEC_SEAL: Final = 8  # Linux 6.3; not yet in `os`


class SealedMemory:
    """A sealed memfd, mapped here. All bytes are zero at first. Pages are allocated when they are first touched.

    Args:
        size_bytes: A multiple of the page size.
        on_map: Called once the memory is mapped. What it raises, this raises.
        memfd_watcher: Watches the memfd.

    Raises:
        OSError: The system has no memory, descriptor or watch to give.

    Attributes:
        descriptor: The memfd, to be sent to the client and then closed by `close_descriptor`. The mapping stays.
        bytes: The mapping. It ends once `unmap` was called and the last view of it is gone.
    """

    def __init__(self, size_bytes: int, on_map: OnMap, memfd_watcher: MemfdWatcher) -> None:
        self.size_bytes = size_bytes
        self._memfd_watcher = memfd_watcher
        self._tensors: dict[tuple[TensorSpec, int, bool], Array] = {}
        self.descriptor = _make_sealed_memfd(size_bytes)
        try:
            mapping = mmap.mmap(self.descriptor, size_bytes)
            with suppress(OSError):  # the system may have no huge pages for memfds
                mapping.madvise(mmap.MADV_HUGEPAGE)
            self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
            self._address = address_of(self.bytes)
            self._undo = on_map(self._address, size_bytes)
            self._watch = self._start_watch()
        except BaseException:
            self.close_descriptor()
            raise

    def tensor(
        self, name: str, spec: TensorSpec, location: SharedSlice, *, is_writable: bool
    ) -> Array:
        """Return a part of it as an array of little-endian elements, the same object each time while it is cached.

        The client may change the elements at any time through its own mapping.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: As `SharedSlice.check` does.
        """
        key = spec, location.offset_bytes, is_writable
        tensor = self._tensors.get(key)
        if tensor is None:
            location.check(name, spec, self.size_bytes)
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
        """Close the memfd after it was sent."""
        os.close(self.descriptor)

    def unmap(self) -> None:
        """Unmap it. To be called once, when no call uses it."""
        try:
            self._undo()
        finally:
            # the mapping ends with the last array that refers to it
            self.bytes = np.empty(0, np.uint8)
            self._tensors.clear()

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once no other process has it: now, or later in another thread.

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
