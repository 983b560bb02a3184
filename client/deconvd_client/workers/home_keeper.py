"""Keeps a client's home among the workers of a host where it has few companions."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from deconvd.errors import DeconvdError
from deconvd.host.forks import register_fork_reset
from deconvd.model.home_choice import better_home, rank_homes
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.server import Server
from deconvd_client.server_set.background_loop import BackgroundLoop
from deconvd_client.server_set.balancer import Member, MemberState
from deconvd_client.workers.worker_membership import WorkerMembership

__all__ = ["HomeKeeper"]

_FIRST_INTERVAL_S: Final = 0.3
_MAX_INTERVAL_S: Final = 8.0
"""How long after a change the companions are counted again, and how often at least while calls are made."""

_START_INTERVAL_S: Final = 1.5
"""The same while a worker does not serve: it may be starting."""

_FIRST_PAUSE_S: Final = 0.05
"""How long after that, at most, they are asked again: clients that begin together choose at different moments."""

_NAMED_INTERVAL_S: Final = 4.0
"""How long after the server has named a home the companions are counted: others that begin must have come to theirs."""

_CHILD_PATIENCE_S: Final = 0.5
"""How long the first calls of a forked child wait for its home."""

_IDLE_S: Final = 3600.0

_VAIN_LOOKS_COUNT: Final = 8
"""How often workers are looked for that cannot be reached. That takes half a minute."""

_log = logging.getLogger(__name__)


class HomeKeeper:
    """Chooses one of the workers as the home, and another one when that is better. Thread-safe.

    The server names the first home: it knows who else has just begun. An older server does not, and then the client
    chooses as it does later. At the home it has the fewest companions, active connections of others, on the device as
    on the worker. These are counted soon after each change, then less and less often, and not at all while no calls are
    made. Clients count at random moments, each asks both workers for exact numbers just before it moves, and its
    connections move with it. So of many clients on a worker only as many leave as should.

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
        self._is_child = False  # which was forked, and has not found its home yet
        self._child_task = SharedTask()
        register_fork_reset(self)

    @property
    def home(self) -> Member[Server] | None:
        """The worker that the client keeps to; None if none can be used."""
        order = self.order
        return order[0] if order else None

    def begin(self, info: pb.GetServerInfoResponse) -> None:
        """Choose the first home after an answer of the server, and have a thread look after it."""
        self._membership.adopt(info)
        self._find_home()
        self._loop.wake()

    def reset_after_fork(self) -> None:
        """Have a forked child find a home of its own, at its first need: all children would have that of the parent."""
        self._is_child = True
        self.is_dormant = True

    def wake(self) -> None:
        """Have the companions counted soon: calls are made again. In a child, find its home first, for a moment."""
        if self._is_child:
            self._child_task.run(self._find_home_of_child, _CHILD_PATIENCE_S)
        self.is_dormant = False
        self._loop.wake()

    def rouse(self, info: pb.GetServerInfoResponse) -> None:
        """Look for workers again if that was given up, or is due later, and an answer of the entry lists others."""
        if not self.is_dormant or self.order:
            return
        self._membership.adopt(info)
        if not self._membership.pause_s:
            self._vain_count = 0
            self.note_change()
            if self._is_child:
                self._child_task.run(self._find_home_of_child, 0.0)

    def note_change(self) -> None:
        """Have a home chosen soon: a worker has failed, or is back."""
        self._interval_s = _FIRST_INTERVAL_S
        self._has_changed = True
        self.is_dormant = self._is_child
        self._loop.wake()

    def close(self) -> None:
        """Look no more."""
        self._loop.close()

    def _look(self) -> float:
        """Do what is due, and return in how many seconds the next will be."""
        if self._is_child:
            return _IDLE_S  # until its first call
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
        if not self.order and (silence_s := self._membership.pause_s):
            self.is_dormant = True
            return silence_s
        self.is_dormant = self.was_used = False
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
        home = self.home
        if home is None or home.state is not MemberState.SERVING:
            self._find_home()
            return
        with suppress(DeconvdError):  # nobody answers: the calls themselves will tell
            self._membership.ask_list([home])
            self._choose(may_move=True)

    def _find_home_of_child(self) -> None:
        self._next_s = 0.0
        self._find_home()
        self._is_child = False
        self._loop.wake()

    def _find_home(self) -> None:
        """Settle at the home that the server names, or at one that is chosen here, and have the others as members."""
        name = ""
        with suppress(DeconvdError):
            name = self._membership.ask_list(wants_home=True).home
        with suppress(DeconvdError):  # it will be looked at again
            is_named = bool(name) and self._settle_at(name)
            if not is_named and len(self._membership.listed) > 1:
                self._choose_first()
            self._choose(may_move=not is_named)

    def _settle_at(self, home_name: str) -> bool:
        """Settle at the worker that the server names to this client alone. Return whether it can be used."""
        others = (name for name in self._rank(self._loads()) if name != home_name)
        is_there = False
        for member in self._membership.join_each([home_name, *others]):
            if member.identity.decode() == home_name:
                is_there = True
                member.server.open_direct_connection()  # by which the server sees that it is the home
                self._settle(member, self._loads())
                self._interval_s = _NAMED_INTERVAL_S
                self._next_s = time.monotonic() + self._pause_s()
        return is_there

    def _choose_first(self) -> None:
        """Choose the first home by exact numbers, and once more in a moment: others may be choosing, too.

        What the home then lends keeps calls there, whatever is better later.
        """
        members = self._join_all(self._rank(self._loads()))
        loads = self._loads()
        home = next((members[name] for name in self._rank(loads) if name in members), None)
        if home is None:
            return
        home.server.open_direct_connection()  # which others count
        time.sleep(random.uniform(0, _FIRST_PAUSE_S))  # noqa: S311 - no secret
        self._settle(home, loads)
        self._membership.count_active(home)
        self._move_if_better(home, self._loads())

    def _choose(self, *, may_move: bool) -> None:
        """Choose the home, and have the other workers as members, too.

        Args:
            may_move: Whether the client may leave the home that it has.
        """
        if len(self._membership.listed) < 2:  # one process is what the entry leads to
            self._membership.retire_all()
            self._set_order([])
            return
        loads = self._loads()
        names = self._rank(loads)
        home = self.home
        if home is not None and home.state is MemberState.SERVING and may_move:
            self._move_if_better(home, loads)
        members = self._join_all(names)
        home = self.home
        if home is None or home.state is not MemberState.SERVING:
            home = next((members[name] for name in names if name in members), None)
        self._settle(home, loads)

    def _join_all(self, names: list[str]) -> dict[str, Member[Server]]:
        """Have workers as members. Return those that can be used, by their names."""
        return {member.identity.decode(): member for member in self._membership.join_each(names)}

    def _loads(self) -> dict[str, int]:
        """Return how many active connections others have at each worker that serves, as of the list.

        Connections of this client may be idle. Then they are not among the active ones.
        """
        own = self._own_connections()
        return {
            worker.name: max(worker.active_connections_count - own.get(worker.name, 0), 0)
            for worker in self._membership.listed.values()
            if worker.is_serving
        }

    def _devices(self) -> dict[str, str]:
        return {
            worker.name: " ".join(worker.devices) for worker in self._membership.listed.values()
        }

    def _rank(self, loads: dict[str, int]) -> list[str]:
        """Return the names of the workers, the best home first, equal ones in any order."""
        names = random.sample([*loads], len(loads))
        return rank_homes({name: loads[name] for name in names}, self._devices())

    def _own_connections(self) -> dict[str, int]:
        counts = {
            member.identity.decode(): member.server.direct_connections_count
            for member in self._membership.workers
        }
        name = self._membership.entry_name
        counts[name] = counts.get(name, 0) + self._membership.entry.server.direct_connections_count
        return counts

    def _move_if_better(self, home: Member[Server], loads: dict[str, int]) -> None:
        home_name = home.identity.decode()
        if home_name not in loads:
            return  # it has just ended: another home is found by whoever notices that
        name = better_home(home_name, loads, self._devices())
        member = None if name is None else self._membership.join(name)
        if name is None or member is None:
            return
        for each in (home, member):
            self._membership.count_active(each)
        exact = self._loads()
        if home_name not in exact or better_home(home_name, exact, self._devices()) != name:
            return
        _log.debug("moves from worker %s to %s: loads %s", home_name, name, exact)
        member.server.open_direct_connection()  # which others count
        self._settle(member, exact)
        self._interval_s = _FIRST_INTERVAL_S
        home.server.release_idle()

    def _settle(self, home: Member[Server] | None, loads: dict[str, int]) -> None:
        """Make a worker the home, with the others after it."""
        serving = {
            member.identity.decode(): member
            for member in self._membership.workers
            if member.state is MemberState.SERVING
        }
        names = self._rank({name: loads.get(name, 0) for name in serving})
        members = [serving[name] for name in names]
        if home in members:
            members = [home, *(member for member in members if member is not home)]
        self._set_order(members)

    def _set_order(self, members: list[Member[Server]]) -> None:
        self.order = tuple(members)
        self._on_order()
