"""Where the residents of a connection are when it has several servers, and how calls get them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from deconvd.model.dtypes import Array
from deconvd_client.calls.deadline import Deadline
from deconvd_client.residents import Call, Resident
from deconvd_client.server_set.attempt_runner import AttemptRunner
from deconvd_client.server_set.balancer import Balancer, Member, Preference
from deconvd_client.server_set.replica import Replica

__all__ = ["SpreadResidents"]

_R = TypeVar("_R", bound=Replica)


class SpreadResidents(Generic[_R]):
    """The residents of a connection, each of which one of several servers keeps. See `ResidentStore`.

    As those of the workers of one server among several, they are `ReplicaResidents`.

    A resident's handle says which session has it, and so which server. What is put goes where the last was put, so that
    calls find their operands together. If that server is lost, the next call sends them to another one, from the arrays
    that they were made from. A result that was never on this side can be used only while its server is there.

    Args:
        balancer: Knows the servers.
        runner: Runs calls there.
        timeout_s: How long each call may take, in seconds.
        first_home: Returns where the first array should be put; None for anywhere.
    """

    def __init__(
        self,
        balancer: Balancer[_R],
        runner: AttemptRunner[_R],
        timeout_s: float,
        first_home: Callable[[], Member[_R] | None] = lambda: None,
    ) -> None:
        self._balancer = balancer
        self._runner = runner
        self._timeout_s = timeout_s
        self._first_home = first_home
        self._home: Member[_R] | None = None

    def put(self, array: Array, deadline: Deadline | None = None) -> Resident:
        """See `ResidentStore`.

        Args:
            deadline: When the caller must have an answer; None for the time that each call may take.
        """
        resident = self._runner.run(
            lambda server, limit: server.residents.put(array, limit),
            lambda: self.home_preference,
            array.nbytes,
            deadline or Deadline(self._timeout_s),
        )
        self._home = self._holder_of(resident) or self._home
        return resident

    def get(self, resident: Resident, deadline: Deadline | None = None) -> Array:
        """See `ResidentStore`.

        Args:
            deadline: As for `put`.
        """
        return self._runner.run(
            lambda server, limit: server.residents.get(resident, limit),
            lambda: self._preference_for([resident]) or self.home_preference,
            resident.spec.nbytes,
            deadline or Deadline(self._timeout_s),
        )

    def knows_session(self, name: bytes) -> bool:
        """Return whether the session of that name is open at one of the servers."""
        return any(m.server.residents.knows_session(name) for m in self._balancer.members)

    @property
    def home_preference(self) -> Preference[_R]:
        """The preference for the server that the last array was put on."""
        homes = (self._home, self._first_home())
        return Preference(holders=tuple(home for home in homes if home is not None))

    def preference_for(self, call: Call) -> Preference[_R] | None:
        """Return the preference for the servers that have residents of a call; None if none has any."""
        return self._preference_for(
            [operand for operand in call.operands.values() if isinstance(operand, Resident)]
        )

    def are_all_at(self, call: Call, member: Member[_R]) -> bool:
        """Return whether no other server has a resident of a call. Those that were never sent are nowhere."""
        knows_session = member.server.residents.knows_session
        for operand in call.operands.values():
            if isinstance(operand, Resident):
                handle = operand.handle
                if handle is not None and not knows_session(handle.session):
                    return False
        return True

    def gather(self, call: Call, server: _R, deadline: Deadline) -> Call:
        """Return a call with the elements of those operands that only another server has.

        Raises:
            DeconvdError: That server has not sent them by the deadline, or has lost them.
        """
        operands = dict(call.operands)
        for field, operand in call.operands.items():
            if isinstance(operand, Resident) and operand.source is None:
                holder = self._holder_of(operand)
                if holder is not None and holder.server is not server:
                    operands[field] = self.get(operand, deadline)
        return replace(call, operands=operands)

    def _preference_for(self, residents: Sequence[Resident]) -> Preference[_R] | None:
        """Return the preference for the server that has most of some residents."""
        sizes: dict[Member[_R], int] = {}
        bound: set[Member[_R]] = set()
        for resident in residents:
            holder = self._holder_of(resident)
            if holder is not None:
                sizes[holder] = sizes.get(holder, 0) + resident.spec.nbytes
                if resident.source is None:
                    bound.add(holder)
        if not sizes:
            return None
        holders = sorted(sizes, key=lambda m: (m in bound, sizes[m]), reverse=True)
        return Preference(holders=tuple(holders), is_bound=bool(bound))

    def _holder_of(self, resident: Resident) -> Member[_R] | None:
        """Return the member that has a resident; None if none is known to have it."""
        handle = resident.handle
        if handle is None:
            return None
        for member in self._balancer.members:
            if member.server.residents.knows_session(handle.session):
                return member
        return None
