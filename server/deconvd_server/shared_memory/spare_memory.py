"""Memory that is mapped before a client asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from deconvd_server.shared_memory.memory import SealedMemory

__all__ = ["SpareMemory"]

_log = logging.getLogger(__name__)


class SpareMemory:
    """One region, ready to be lent. Not thread-safe.

    A card has to pin each page of a region before it can be used. That takes 40 ms for the first region of a client,
    and was most of what its first call waited for.

    Args:
        size_bytes: The size of the region that is kept; 0 to keep none.
        make: Returns new memory of a size. Raises OSError, or what the card raises, if there is none.
    """

    def __init__(self, size_bytes: int, make: Callable[[int], SealedMemory]) -> None:
        self._size_bytes = size_bytes
        self._make = make
        self._memory: SealedMemory | None = None

    def take(self, size_bytes: int) -> SealedMemory:
        """Return memory of a size: the spare region if it has that size, else a new one. Raises as `make` does."""
        memory = self._memory
        if memory is None or size_bytes != memory.size_bytes:
            return self._make(size_bytes)
        self._memory = None
        return memory

    def prepare(self) -> None:
        """Make the spare region if there is none. A failure is only logged: the next client waits, as without it."""
        if self._memory is not None or not self._size_bytes:
            return
        try:
            self._memory = self._make(self._size_bytes)
        except Exception as error:  # noqa: BLE001 - logged: whatever a device raises, nobody has asked for this memory
            _log.info("no shared memory is kept ready: %s", error)

    def close(self) -> None:
        """Give the spare region back, and keep none from now on."""
        memory, self._memory, self._size_bytes = self._memory, None, 0
        if memory is not None:
            memory.close_descriptor()
            memory.unmap()
