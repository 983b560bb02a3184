"""Keeps a client's home among the workers of a host where it has few companions."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from deconvd.errors import DeconvdError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.server import Server
from deconvd_client.server_set.background_loop import BackgroundLoop
from deconvd_client.server_set.balancer import Member, MemberState
from deconvd_client.workers.home_choice import better_home, by_companions, companions
from deconvd_client.workers.worker_membership import WorkerMembership

__all__ = ["HomeKeeper"]

_FIRST_INTERVAL_S: Final = 0.3
_MAX_INTERVAL_S: Final = 8.0
"""How long after a change the companions are counted again, and how often at least while calls are made."""

_START_INTERVAL_S: Final = 1.5
"""The same while a worker does not serve: it may be starting."""

_ASKED_COUNT: Final = 4
"""How many workers are asked for exact numbers before the first home is chosen: those that the list has as the best."""

_FIRST_PAUSE_S: Final = 0.05
"""How long after that, at most, they are asked again: clients that begin together choose at different moments."""

_IDLE_S: Final = 3600.0

_VAIN_LOOKS_COUNT: Final = 8
"""How often workers are looked for that cannot be reached. That takes half a minute."""

_log = logging.getLogger(__name__)


class HomeKeeper:
    """Chooses one of the workers as the home, and another one when that is better. Thread-safe.

    At the home the client has the fewest companions: active connections of others. These are counted soon after each
    change, then less and less often, and not at all while no calls are made. Clients count at random moments, each asks
    both workers for exact numbers just before it moves, and its connections move with it. So of many clients on a
    worker only as many leave as should.

    Attributes:
        order: The workers that serve, the home first. Empty if none can be used.
        was_used: Whether a call was made since the companions were counted. Whoever makes one sets it.
        is_dormant: Whether they are not counted until `wake` is called.

    Args:
        membership: Says which workers there are.
        on_order: Called after `order` has changed.
    """

    def __init__(self, membership: WorkerMembership, on_order: Callable[[], None]) -> None:
        self.order: tuple[Member[Server], ...] = ()
        self.was_used: bool = False
        self.is_dormant: bool = False
        self._membership = membership
        self._on_order = on_order
        self._loop = BackgroundLoop(self._look)
        self._interval_s = _FIRST_INTERVAL_S
        self._next_s = 0.0
        self._has_changed = False
        self._vain_count = 0

    @property
    def home(self) -> Member[Server] | None:
        """The worker that the client keeps to; None if none can be used."""
        order = self.order
        return order[0] if order else None

    def begin(self, info: pb.GetServerInfoResponse) -> None:
        """Choose the first home from an answer of the server, and have a thread look after it."""
        self._membership.adopt(info)
        with suppress(DeconvdError):  # it will be looked at again
            if len(self._membership.listed) > 1:
                self._choose_first()
            self._choose()
        self._loop.wake()

    def wake(self) -> None:
        """Have the companions counted soon: calls are made again."""
        self.is_dormant = False
        self._loop.wake()

    def rouse(self) -> None:
        """Look for workers again if that was given up."""
        if self.is_dormant and not self.order:
            self._vain_count = 0
            self.note_change()

    def note_change(self) -> None:
        """Have a home chosen soon: a worker has failed, or is back."""
        self._interval_s = _FIRST_INTERVAL_S
        self._has_changed = True
        self.wake()

    def close(self) -> None:
        """Look no more."""
        self._loop.close()

    def _look(self) -> float:
        """Do what is due, and return in how many seconds the next will be."""
        home = self.home
        if self._has_changed and (home is None or home.state is not MemberState.SERVING):
            self._next_s = 0.0  # calls go to others already, but not by their companions
        elif self._has_changed:
            self._next_s = min(self._next_s, time.monotonic() + self._pause_s())
        self._has_changed = False
        left_s = self._next_s - time.monotonic()
        if left_s > 0:
            return left_s
        if self._is_idle:
            self.is_dormant = True
            return _IDLE_S
        self.was_used = False
        self._look_again()
        self._vain_count = 0 if self.order else self._vain_count + 1
        pause_s = self._pause_s()
        starts_one = any(not each.is_serving for each in self._membership.listed.values())
        longest_s = _START_INTERVAL_S if starts_one else _MAX_INTERVAL_S
        self._interval_s = min(2 * self._interval_s, longest_s)
        self._next_s = time.monotonic() + pause_s
        return pause_s

    @property
    def _is_idle(self) -> bool:
        if not self.order:
            return self._vain_count >= _VAIN_LOOKS_COUNT
        return not self.was_used

    def _pause_s(self) -> float:
        return self._interval_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret

    def _look_again(self) -> None:
        first = [] if self.home is None else [self.home]
        with suppress(DeconvdError):  # nobody answers: the calls themselves will tell
            self._membership.ask_list(first)
            self._choose()

    def _choose_first(self) -> None:
        """Choose the first home by exact numbers, and once more in a moment: others may be choosing, too.

        What the home then lends keeps calls there, whatever is better later.
        """
        for name in by_companions(self._companions())[:_ASKED_COUNT]:
            self._membership.join(name)
        others = self._companions()
        joined = filter(None, map(self._membership.join, by_companions(others)))
        home = next(joined, None)
        if home is None:
            return
        home.server.open_direct_connection()  # which others count
        time.sleep(random.uniform(0, _FIRST_PAUSE_S))  # noqa: S311 - no secret
        self._settle(home, others)
        self._membership.count_active(home)
        self._move_if_better(home, self._companions())

    def _choose(self) -> None:
        """Choose the home, and have the other workers as members, too."""
        if len(self._membership.listed) < 2:  # one process is what the entry leads to
            self._membership.retire_all()
            self._set_order([])
            return
        others = self._companions()
        names = by_companions(others)
        home = self.home
        if home is None or home.state is not MemberState.SERVING:
            joined = filter(None, map(self._membership.join, names))
            self._settle(next(joined, None), others)
        elif home.identity.decode() in others:
            self._move_if_better(home, others)
        for name in names:
            self._membership.join(name)
        self._settle(self.home, others)

    def _companions(self) -> dict[str, int]:
        """Return how many companions the client has at each worker that serves, as of the list."""
        active = {
            worker.name: worker.active_connections_count
            for worker in self._membership.listed.values()
            if worker.is_serving
        }
        return companions(active, self._own_connections())

    def _own_connections(self) -> dict[str, int]:
        counts = {
            member.identity.decode(): member.server.direct_connections_count
            for member in self._membership.workers
        }
        name = self._membership.entry_name
        counts[name] = counts.get(name, 0) + self._membership.entry.server.direct_connections_count
        return counts

    def _move_if_better(self, home: Member[Server], others: dict[str, int]) -> None:
        name = better_home(home.identity.decode(), others)
        member = None if name is None else self._membership.join(name)
        if name is None or member is None:
            return
        for each in (home, member):
            self._membership.count_active(each)
        exact = self._companions()
        home_name = home.identity.decode()
        pair = {each: exact[each] for each in (home_name, name) if each in exact}
        if home_name not in pair or better_home(home_name, pair) is None:
            return
        _log.debug("moves from worker %s to %s: companions %s", home_name, name, exact)
        member.server.open_direct_connection()  # which others count
        self._settle(member, exact)
        self._interval_s = _FIRST_INTERVAL_S
        home.server.release_idle()

    def _settle(self, home: Member[Server] | None, others: dict[str, int]) -> None:
        """Make a worker the home, with the others after it."""
        serving = {
            member.identity.decode(): member
            for member in self._membership.workers
            if member.state is MemberState.SERVING
        }
        names = by_companions({name: others.get(name, 0) for name in serving})
        members = [serving[name] for name in names]
        if home in members:
            members = [home, *(member for member in members if member is not home)]
        self._set_order(members)

    def _set_order(self, members: list[Member[Server]]) -> None:
        self.order = tuple(members)
        self._on_order()
