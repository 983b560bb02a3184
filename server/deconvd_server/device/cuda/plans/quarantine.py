"""The quarantine: searches for plans that are not made again, because a process died in one. Needs no CUDA."""

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
"""How long a search is held if a process died in it without a report of a crash.

The process may have been killed for another reason. A search that does crash without a report ends one server a day.
"""

_MAX_CRASHES_COUNT: Final = 16
"""Searches that may crash before all new searches are held. Without it, a client that looks for problems at which cuDNN
crashes could end server after server. Other clients meet a few such problems at most before cuDNN is updated."""


class Quarantine:
    """Holds a search that a process died in from the processes that follow. Thread-safe.

        the process crashed     held until cuDNN's version or the card changes
        it died otherwise       held for a day

    A search is for one product of a problem, whatever the options, since cuDNN's heuristics are called with the same
    problem. A search with cuDNN and one without it are two searches.

    Args:
        folder: Where processes note the searches that they start.
        origin: Versions and the card: all that a crash depends on, other than the search.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str | int]) -> None:
        self._journal = process_journal(folder)
        self._origin = dict(origin)
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def holds(self, key: PlanKey) -> bool:
        """Return whether a plan for a key must not be searched. The log says why, once for each search."""
        search = _search(key)
        way = "with our most general kernels alone" if _is_own(key) else "without cuDNN"
        unfinished = self._unfinished_searches()
        reason = _find_reason(unfinished, search)
        if reason is not None:
            what = f"{key.product} of {key.problem}"
            self._warn_once(digest_of(search), "computing %s %s: %s", what, way, reason)
            return True
        crashes = [w for w in unfinished if w.has_crashed and _is_own_search(w) == _is_own(key)]
        if len({digest_of(crash.fields["search"]) for crash in crashes}) < _MAX_CRASHES_COUNT:
            return False
        folder = crashes[0].path.parent
        self._warn_once(
            way,
            "computing all new problems %s: servers have crashed repeatedly, see %s",
            way,
            folder,
        )
        return True

    @contextmanager
    def note_search(self, key: PlanKey, is_lost: Callable[[], bool]) -> Iterator[None]:
        """Note on disk, for the length of a with-block, that a plan for a key is being searched.

        Args:
            is_lost: Called if the block raises a RuntimeError. Returns whether the card must be reset, which ends the
                process. Then the note stays, as after any other death.
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
        """Return the searches that processes died in, with the same versions on the same kind of card."""
        return [
            work
            for work in self._journal.unfinished_work()
            if work.fields.get("origin") == self._origin
            and isinstance(work.fields.get("search"), dict)
        ]

    def _warn_once(self, about: str, message: str, *args: object) -> None:
        """Log a warning, unless this process has logged one about the same."""
        with self._lock:
            is_known = about in self._warned
            self._warned.add(about)
        if not is_known:
            log.warning(message, *args)


def _find_reason(unfinished: Sequence[UnfinishedWork], search: Mapping[str, Any]) -> str | None:
    """Return why a search must not be made; None if it may be."""
    same = [work for work in unfinished if work.fields["search"] == search]
    for work in same:
        if work.has_crashed:
            return (
                f"a server crashed while it tried that with this version of cuDNN, see {work.path}"
            )
    for work in same:
        if time.time() - work.ended_s < _SUSPICION_S:
            return f"for a day, as a server was ended while it tried that, see {work.path}"
    return None


def _search(key: PlanKey) -> dict[str, Any]:
    return {"cudnn": not _is_own(key), **key.product_fields()}


def _is_own(key: PlanKey) -> bool:
    return key.options.use_cudnn is UseCudnn.NEVER


def _is_own_search(work: UnfinishedWork) -> bool:
    return work.fields["search"].get("cudnn") is False
