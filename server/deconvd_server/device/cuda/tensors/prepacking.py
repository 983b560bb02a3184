"""The prepacked forms that are kept with a tensor, and which of them are made. Needs no CUDA."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from deconvd_server.device.cuda.api.memory import Lease

__all__ = ["PrepackedForms"]

_USES_COUNT = 2
"""The use at which a form is made: for one use it is not worth the memory."""


class PrepackedForms:
    """The forms of one tensor, by key. Thread-safe.

    The states of a form:

        not made --second claim_making--> being made --put------> kept
                                                     --give_up--> not made

    A call that may use the tensor may use its forms: they are freed with it.
    """

    __slots__ = ("_leases", "_lock", "_uses")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[Hashable, int] = {}
        self._leases: dict[Hashable, Lease | None] = {}

    def get(self, key: Hashable) -> Lease | None:
        """Return the memory of a form that is kept; else None."""
        with self._lock:
            return self._leases.get(key)

    def claim_making(self, key: Hashable) -> bool:
        """Count a use of a form that is not kept. Return whether the caller must make it, and then `put` or `give_up`.

        Only one caller at a time makes a form. Meanwhile the others use the tensor itself.
        """
        with self._lock:
            self._uses[key] = self._uses.get(key, 0) + 1
            if key in self._leases or self._uses[key] < _USES_COUNT:
                return False
            self._leases[key] = None  # being made
            return True

    def put(self, key: Hashable, lease: Lease) -> None:
        """Keep a form that was made. The card must be done with it."""
        with self._lock:
            self._leases[key] = lease

    def give_up(self, key: Hashable) -> None:
        """Note that a form could not be made. Its uses are counted from zero again."""
        with self._lock:
            del self._leases[key]
            self._uses[key] = 0

    def free(self) -> None:
        """Free all forms. No call may be using the tensor."""
        with self._lock:
            leases, self._leases = self._leases, {}
        for lease in leases.values():
            if lease is not None:
                lease.free()
