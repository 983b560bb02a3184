"""What is not tried any more, since a process died while it was tried. Needs no CUDA."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deconvd.model.options import UseCudnn
from deconvd_server.device.cuda.plans.journal import UnfinishedWork, process_journal
from deconvd_server.device.cuda.plans.key import PlanKey, digest_of

__all__ = ["Quarantine"]

log = logging.getLogger(__name__)

_SUSPICION_S: Final = 24 * 3600.0
"""How long a search is not made that a process died at without a crash: it may have been killed for another reason. A
search that crashes without a report ends one server a day."""

_MAX_CRASHES_COUNT: Final = 16
"""Searches that may crash before no new one is made: a client that looks for such problems ends no more servers. Honest
clients come upon a few at most before cuDNN is replaced."""


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
        self._journal = process_journal(folder)
        self._origin = dict(origin)
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def holds(self, key: PlanKey) -> bool:
        """Return whether a plan for `key` is not to be searched. The log says so, once for each search."""
        search = _search(key)
        way = "with our most general kernels alone" if _is_own(key) else "without cuDNN"
        remnants = self._unfinished_searches()
        reason = _find_reason(remnants, search)
        if reason is not None:
            what = f"{key.product} of {key.problem}"
            self._warn_once(digest_of(search), "computing %s %s: %s", what, way, reason)
            return True
        crashes = [r for r in remnants if r.has_crashed and _is_own_search(r) == _is_own(key)]
        if len({digest_of(crash.fields["search"]) for crash in crashes}) < _MAX_CRASHES_COUNT:
            return False
        folder = crashes[0].path.parent
        self._warn_once(
            way, "computing all that is new %s: servers crash again and again, see %s", way, folder
        )
        return True

    @contextmanager
    def note_search(self, key: PlanKey, is_lost: Callable[[], bool]) -> Iterator[None]:
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

    def _unfinished_searches(self) -> list[UnfinishedWork]:
        """Return the searches that processes died at, with the same versions on the same kind of card."""
        return [
            remnant
            for remnant in self._journal.unfinished_work()
            if remnant.fields.get("origin") == self._origin
            and isinstance(remnant.fields.get("search"), dict)
        ]

    def _warn_once(self, about: str, message: str, *args: object) -> None:
        """Log a warning, unless there was one about the same."""
        with self._lock:
            is_told = about in self._warned
            self._warned.add(about)
        if not is_told:
            log.warning(message, *args)


def _find_reason(remnants: Sequence[UnfinishedWork], search: Mapping[str, Any]) -> str | None:
    """Return why a search is not to be made; None if it may be."""
    same = [remnant for remnant in remnants if remnant.fields["search"] == search]
    for remnant in same:
        if remnant.has_crashed:
            return f"a server crashed while it tried that with this version of cuDNN, see {remnant.path}"
    for remnant in same:
        if time.time() - remnant.ended_s < _SUSPICION_S:
            return f"for a day, as a server was ended while it tried that, see {remnant.path}"
    return None


def _search(key: PlanKey) -> dict[str, Any]:
    return {"cudnn": not _is_own(key), **key.product_fields()}


def _is_own(key: PlanKey) -> bool:
    return key.options.use_cudnn is UseCudnn.NEVER


def _is_own_search(remnant: UnfinishedWork) -> bool:
    return remnant.fields["search"].get("cudnn") is False
