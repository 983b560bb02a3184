"""Finds the machine code of a module: it came with deconvd, or is in the cache on disk, or is compiled.

Needs no card.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from deconvd_server.device.cuda.api.nvrtc import compile_cubin, nvrtc_version
from deconvd_server.device.cuda.kernels.archive import digest_of, read_cubins
from deconvd_server.device.cuda.kernels.cubin_cache import CubinCache

__all__ = ["Cubins"]


class Cubins:
    """Finds machine code. Thread-safe: two threads that compile at once do not wait for each other.

    Attributes:
        cache: What was compiled before; None to keep nothing.
    """

    def __init__(self) -> None:
        self.cache: CubinCache | None = None
        self._lock = threading.Lock()
        self._shipped: dict[int, Mapping[str, bytes]] = {}

    def find(self, text: str, options: Sequence[str], capability: int) -> bytes:
        """Return the machine code of a text for cards of a capability.

        Raises:
            CompileError: It cannot be compiled.
        """
        digest = digest_of(text, options)
        cubin = self._read_shipped(capability).get(digest)
        return self._compile(digest, text, options, capability) if cubin is None else cubin

    def is_shipped(self, text: str, options: Sequence[str], capability: int) -> bool:
        """Return whether the machine code of a text for cards of a capability came with deconvd."""
        return digest_of(text, options) in self._read_shipped(capability)

    def _read_shipped(self, capability: int) -> Mapping[str, bytes]:
        with self._lock:
            if capability not in self._shipped:
                self._shipped[capability] = read_cubins(capability)
            return self._shipped[capability]

    def _compile(self, digest: str, text: str, options: Sequence[str], capability: int) -> bytes:
        cache = self.cache
        name = f"{digest}-sm_{capability}-nvrtc_{nvrtc_version()}"
        known = None if cache is None else cache.load(name)
        if known is not None:
            return known
        cubin = compile_cubin(text, options, capability)
        if cache is not None:
            cache.save(name, cubin)
        return cubin
