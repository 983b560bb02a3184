"""Gives clients that begin their homes: the workers to which they will keep. See `deconvd.model.home_choice`.

A client claims a home, and opens a connection there a moment later. Until that has come, the claim counts in its place:
so clients that begin at the same moment see each other, and get workers in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from deconvd.model.home_choice import rank_homes
from deconvd_server.resources.worker_table import ConnectionLoad

__all__ = ["HomeClaims"]

_CLAIM_S: Final = 10.0
"""How long a claim counts whose connection does not come: its client has ended, or cannot reach its home."""

_MOST_CLAIMS_COUNT: Final = 1024
"""How many claims count at a time. Whoever asks for more chooses for itself."""


_NO_LOAD: Final = ConnectionLoad(0, 0)


@dataclass(slots=True)
class _Home:
    """What is known of a worker: the connections it has told of, and when homes were claimed that it has not seen."""

    load: ConnectionLoad = _NO_LOAD
    claimed_s: deque[float] = field(default_factory=deque)


class HomeClaims:
    """Knows what each worker has, and will soon have. It does no I/O, and knows no clock. Not thread-safe.

    Nobody says which connection a claim was for: each that begins stands for the oldest claim. If another client has
    opened it, one client is not counted until its own has come, too.
    """

    def __init__(self) -> None:
        self._homes: dict[str, _Home] = {}  # that whose turn was longest ago first

    def note_load(self, name: str, load: ConnectionLoad) -> None:
        """Note what a worker has told of its connections. As many claims have come as connections have begun since."""
        home = self._homes.setdefault(name, _Home())
        for _ in range(min(load.begun_count - home.load.begun_count, len(home.claimed_s))):
            home.claimed_s.popleft()
        home.load = load

    def forget(self, name: str) -> None:
        """Forget what a process had that has ended, and the claims to it: their clients make others."""
        self._homes.pop(name, None)

    def claim(self, devices: Mapping[str, str], now_s: float) -> str:
        """Return the home of a client that begins; empty if it must choose itself.

        Args:
            devices: The devices of the workers that serve, by their names.
            now_s: A time that only grows.
        """
        for home in self._homes.values():
            while home.claimed_s and home.claimed_s[0] < now_s - _CLAIM_S:
                home.claimed_s.popleft()
        is_full = sum(len(home.claimed_s) for home in self._homes.values()) >= _MOST_CLAIMS_COUNT
        if is_full or not devices:
            return ""
        for name in devices:
            self._homes.setdefault(name, _Home())
        loads = {
            name: home.load.recent_count + len(home.claimed_s)
            for name, home in self._homes.items()
            if name in devices
        }
        name = rank_homes(loads, devices)[0]
        home = self._homes.pop(name)
        home.claimed_s.append(now_s)
        self._homes[name] = home  # as the last
        return name
