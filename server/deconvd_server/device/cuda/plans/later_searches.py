"""Searches for plans that calls did not wait for: made one after the other, while the card is idle."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from deconvd.errors import DeconvdError
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.stand_in import StandIn

__all__ = ["LaterSearches"]

_log = logging.getLogger(__name__)

_PENDING_COUNT: Final = 1024
"""The most searches that wait. Beyond it the one that has waited longest is forgotten: its stand-in asks again."""

_QUIET_S: Final = 0.02
"""The card is idle if no call has come for this long: between two calls of one client it always seems to be."""

_LONGEST_WAIT_S: Final = 1.0
_BUSY_RATIO: Final = 20.0
"""A card that is never idle has as much to win. So a search is made after the former, or after that many times as long
as the last search took: a busy card spends a twentieth of its time on searches at most."""


class LaterSearches:
    """Has the plans searched that stand-ins ask for. Thread-safe.

    Args:
        name: Of its thread, which is started with the first search.
        count_calls: Returns how many calls the card has begun so far.
        is_idle: Returns whether no call is being computed.
        activate: Makes the card the thread's device, and translates errors.
    """

    def __init__(
        self,
        name: str,
        count_calls: Callable[[], int],
        is_idle: Callable[[], bool],
        activate: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._name = name
        self._count_calls = count_calls
        self._is_idle = is_idle
        self._activate = activate
        self._pending: OrderedDict[PlanKey, tuple[StandIn, Callable[[PlanKey], None]]] = (
            OrderedDict()
        )
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._last_s = 0.0

    def add(self, key: PlanKey, stand_in: StandIn, search: Callable[[PlanKey], None]) -> None:
        """Have the plan of a key searched, once, and the stand-in marked as replaced. After `close`, do nothing.

        Args:
            search: Searches the plan of a key, and has it served from then on.
        """
        with self._changed:
            if self._is_closed:
                return
            self._pending[key] = (stand_in, search)
            if len(self._pending) > _PENDING_COUNT:
                self._pending.popitem(last=False)
            if self._thread is None:
                # a daemon: a process may end without closing its devices
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Forget the searches that have not begun, and wait for the one that has."""
        with self._changed:
            self._is_closed = True
            self._pending.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._wait_until_idle()
            with self._changed:
                if not self._pending:
                    continue
                key, (stand_in, search) = self._pending.popitem(last=False)
            if stand_in.is_replaced:  # it had asked again while its search was under way
                continue
            begin_s = time.monotonic()
            self._search(key, stand_in, search)
            self._last_s = time.monotonic() - begin_s

    def _wait_for_work(self) -> bool:
        """Wait for a search to be asked for. Return False once there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_closed)
            return not self._is_closed

    def _wait_until_idle(self) -> None:
        end_s = time.monotonic() + max(_LONGEST_WAIT_S, _BUSY_RATIO * self._last_s)
        while time.monotonic() < end_s:
            count = self._count_calls()
            with self._changed:
                if self._changed.wait_for(lambda: self._is_closed, _QUIET_S):
                    return
            if self._is_idle() and self._count_calls() == count:
                return

    def _search(self, key: PlanKey, stand_in: StandIn, search: Callable[[PlanKey], None]) -> None:
        try:
            with self._activate():
                search(key)
        except DeconvdError as error:  # all that the card and cuDNN raise is translated to such
            _log.info("no better plan was found for %s of %s: %s", key.product, key.problem, error)
        except Exception:  # noqa: BLE001 - logged: a kernel may not compile, and other shapes wait for their searches
            _log.exception(
                "the search of a better plan failed for %s of %s", key.product, key.problem
            )
        else:
            stand_in.is_replaced = True
