"""What plans have made of a tensor that stays, to be used in its place. Needs no CUDA."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from deconvd_server.device.cuda.api.memory import Lease

__all__ = ["PrepackedForms"]

_USES_COUNT = 2
"""The use of a form by which it is made: what comes once is not worth the memory."""


class PrepackedForms:
    """The forms of one tensor, each known by a key. Thread-safe.

        wanted once --> wanted again, being made --put--> there
                                                 --give_up--> wanted once

    Whoever uses the tensor may use its forms: they are freed with it.
    """

    __slots__ = ("_leases", "_lock", "_uses")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[Hashable, int] = {}
        self._leases: dict[Hashable, Lease | None] = {}

    def get(self, key: Hashable) -> Lease | None:
        """Return a form's memory if it is there."""
        with self._lock:
            return self._leases.get(key)

    def claim_making(self, key: Hashable) -> bool:
        """Count a use of a form that is not there; return whether the caller is to `put` it, or `give_up`.

        That is asked of one caller at a time.
        """
        with self._lock:
            self._uses[key] = self._uses.get(key, 0) + 1
            if key in self._leases or self._uses[key] < _USES_COUNT:
                return False
            self._leases[key] = None
            return True

    def put(self, key: Hashable, lease: Lease) -> None:
        """Let a form be there that was made: the card is done with its making."""
        with self._lock:
            self._leases[key] = lease

    def give_up(self, key: Hashable) -> None:
        """Note that a form could not be made."""
        with self._lock:
            del self._leases[key]
            self._uses[key] = 0

    def free(self) -> None:
        """Free all forms. No call may be under way with the tensor."""
        with self._lock:
            leases, self._leases = self._leases, {}
        for lease in leases.values():
            if lease is not None:
                lease.free()
