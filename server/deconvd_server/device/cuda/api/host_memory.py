"""Host memory that is registered with CUDA, so that cards read and write it by themselves. Needs no CUDA."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from deconvd.host.array_address import address_of
from deconvd.model.dtypes import Array
from deconvd_server.device.tensor import Tensor

__all__ = ["HostAddresses", "RegisteredMemory"]

_log = logging.getLogger(__name__)


class RegisteredMemory:
    """Ranges of host memory. Each is registered once for all cards, however many of them ask for it. Thread-safe.

    Attributes:
        generation: Counted up whenever a range is added or removed. As long as it is the same, an address means the
            same memory.

    Args:
        register: Registers memory for all cards, given its address and its size in bytes. Raises RuntimeError if it
            cannot.
        unregister: Undoes that, given the address.
    """

    def __init__(
        self, register: Callable[[int, int], None], unregister: Callable[[int], None]
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._lock = threading.Lock()
        self._users_count: dict[int, int] = {}
        # Begins and ends, in order. Readers take no lock: the tuple is replaced, never changed.
        self._ranges: tuple[list[int], list[int]] = [], []
        self._has_warned = False
        self.generation = 0

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Register memory that nobody uses yet. Return a function that undoes it, to call once.

        If CUDA refuses, the memory is treated like any other. The log says so once.
        """
        if address not in self._users_count:
            _prefault(address, size_bytes)  # without the lock: it takes longest
        with self._lock:
            if address not in self._users_count:
                try:
                    self._register(address, size_bytes)
                except RuntimeError as error:
                    self._warn_once(error)
                    return lambda: None
                self._users_count[address] = 0
                self.generation += 1
                begins, ends = self._ranges
                at = bisect_right(begins, address)
                self._ranges = (
                    [*begins[:at], address, *begins[at:]],
                    [*ends[:at], address + size_bytes, *ends[at:]],
                )
            self._users_count[address] += 1
        return lambda: self._release(address)

    def holds(self, array: Array) -> bool:
        """Return whether cards reach an array: it is in a range, C-contiguous and in native byte order."""
        return self._address(array) is not None

    def addresses(self, x: Tensor, y: Tensor) -> HostAddresses | None:
        """Return the addresses of two arrays; None if one is a device's tensor or cards do not reach it."""
        if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
            return None
        generation = (
            self.generation
        )  # read first: if a range changes now, the addresses are of an older generation
        x_begin, y_begin = self._address(x), self._address(y)
        if x_begin is None or y_begin is None:
            return None
        return HostAddresses(generation, (x_begin, y_begin), (x.nbytes, y.nbytes))

    def _address(self, array: Array) -> int | None:
        """Return an array's address; None if cards do not reach it."""
        begins, ends = self._ranges
        if not begins or not (array.flags.c_contiguous and array.dtype.isnative):
            return None
        begin = address_of(array)
        found = bisect_right(begins, begin)
        is_inside = found > 0 and begin + array.nbytes <= ends[found - 1]
        return begin if is_inside else None

    def _release(self, address: int) -> None:
        with self._lock:
            self._users_count[address] -= 1
            if not self._users_count[address]:
                del self._users_count[address]
                self.generation += 1
                begins, ends = self._ranges
                at = begins.index(address)
                self._ranges = begins[:at] + begins[at + 1 :], ends[:at] + ends[at + 1 :]
                self._unregister(
                    address
                )  # under the lock: another card may register it again at once

    def _warn_once(self, error: RuntimeError) -> None:
        if not self._has_warned:
            _log.warning(
                "CUDA refuses to register host memory, so it is copied to pinned memory first: %s",
                error,
            )
        self._has_warned = True


class HostAddresses(NamedTuple):
    """The addresses of arrays in registered memory.

    Attributes:
        generation: That of the `RegisteredMemory`. Two addresses of different generations may be of different memory.
        begins: The addresses.
        sizes_bytes: The sizes of the arrays.
    """

    generation: int
    begins: tuple[int, ...]
    sizes_bytes: tuple[int, ...]

    @classmethod
    def of(cls, generation: int, arrays: Sequence[Array]) -> HostAddresses:
        """Return the addresses of arrays, which must be in registered memory of a generation."""
        return cls(generation, tuple(map(address_of, arrays)), tuple([a.nbytes for a in arrays]))

    def with_arrays(self, arrays: Sequence[Array]) -> HostAddresses:
        """Return the addresses of other arrays, followed by these."""
        return HostAddresses(
            self.generation,
            (*map(address_of, arrays), *self.begins),
            (*[array.nbytes for array in arrays], *self.sizes_bytes),
        )

    @property
    def are_disjoint(self) -> bool:
        """Whether no two of the arrays overlap."""
        end = 0
        for begin, size_bytes in sorted(zip(self.begins, self.sizes_bytes, strict=True)):
            if begin < end:
                return False
            end = begin + size_bytes
        return True

    def find(self, address: int) -> tuple[int, int] | None:
        """Return the number of the array that has an address, and the offset in that array; None if no array has it."""
        for number, (begin, size_bytes) in enumerate(
            zip(self.begins, self.sizes_bytes, strict=True)
        ):
            if 0 <= address - begin < size_bytes:
                return number, address - begin
        return None


def _prefault(address: int, size_bytes: int) -> None:
    """Make the system allocate the memory's pages. CUDA would do it too, but block all its other callers meanwhile."""
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
    memory[:: mmap.PAGESIZE] = 0
