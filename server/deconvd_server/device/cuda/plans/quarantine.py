"""What is not tried any more, since a process died while it was tried. Needs no CUDA."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deconvd.options import UseCudnn
from deconvd_server.device.cuda.plans.journal import Remnant, journal_in
from deconvd_server.device.cuda.plans.key import PlanKey, digest_of

__all__ = ["Quarantine"]

log = logging.getLogger(__name__)

_SUSPICION_S: Final = 24 * 3600.0
"""How long nothing is tried that a process died at without a crash: it may have been killed for another reason. What
crashes without a report takes a server away once a day at most."""

_MAX_CRASHES_COUNT: Final = 16
"""Searches that may crash before no new one is made: a client that looks for such problems ends no more servers. It is
well above the few that an honest one would come upon before its version is replaced."""


class Quarantine:
    """Keeps a search that a process died at from the processes after it. Thread-safe.

    A search is for one product of a problem, whatever the options: cuDNN's heuristics are asked the same. With cuDNN
    and without are two searches. After a crash none is made until cuDNN's version changes, or the card; after any
    other death, for a day.

    Args:
        folder: Where processes note what they search.
        origin: Versions and the card: all that a crash depends on beside the search.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str | int]) -> None:
        self._journal = journal_in(folder)
        self._origin = dict(origin)
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def holds(self, key: PlanKey) -> bool:
        """Return whether a plan for `key` is not to be searched. The first time for a search, the log says so."""
        search = _search(key)
        reason = self._reason(search)
        if reason is None:
            return False
        with self._lock:
            is_told = digest_of(search) in self._told
            self._told.add(digest_of(search))
        if not is_told:
            way = "with our most general kernels alone" if _is_own(key) else "without cuDNN"
            log.warning("computing %s of %s %s: %s", key.operation, key.problem, way, reason)
        return True

    @contextmanager
    def noted(self, key: PlanKey, is_lost: Callable[[], bool]) -> Iterator[None]:
        """Note that a plan for `key` is being searched, for the length of a with-block.

        Args:
            is_lost: Returns whether the card must be reset, and so the process ended; asked if the block raises a
                RuntimeError. The note stays then: that is a death, too.
        """
        work = {"origin": self._origin, "search": _search(key), "key": key.fields()}
        number = self._journal.begin(work)
        try:
            yield
        except RuntimeError:
            if is_lost():
                number = None
            raise
        finally:
            self._journal.end(number)

    def _reason(self, search: Mapping[str, Any]) -> str | None:
        """Return why a search is not to be made; None if it may be."""
        remnants = [
            remnant
            for remnant in self._journal.remnants()
            if remnant.fields.get("origin") == self._origin
        ]
        crashes = [remnant for remnant in remnants if remnant.crashed]
        for remnant in crashes:
            if remnant.fields.get("search") == search:
                return f"a server crashed while it tried that with this version of cuDNN, see {remnant.path}"
        for remnant in remnants:
            if remnant.fields.get("search") == search and _is_recent(remnant):
                return f"for a day, as a server was ended while it tried that, see {remnant.path}"
        if _searches_count(crashes, cudnn=search["cudnn"]) >= _MAX_CRASHES_COUNT:
            folder = crashes[0].path.parent
            return f"servers crashed at {_MAX_CRASHES_COUNT} other problems, see {folder}"
        return None


def _search(key: PlanKey) -> dict[str, Any]:
    return {"cudnn": not _is_own(key), **key.product_fields()}


def _is_own(key: PlanKey) -> bool:
    return key.options.use_cudnn is UseCudnn.NEVER


def _is_recent(remnant: Remnant) -> bool:
    return time.time() - remnant.ended_s < _SUSPICION_S


def _searches_count(crashes: list[Remnant], *, cudnn: bool) -> int:
    searches = [remnant.fields.get("search") for remnant in crashes]
    return len({digest_of(s) for s in searches if isinstance(s, dict) and s.get("cudnn") is cudnn})
