"""The interface of what says which servers there are."""

from __future__ import annotations

from typing import Protocol, TypeVar

from deconvd_client.calls.deadline import Deadline
from deconvd_client.server_set.balancer import Member
from deconvd_client.server_set.replica import Replica

__all__ = ["MemberSource"]

_R = TypeVar("_R", bound=Replica)


class MemberSource(Protocol[_R]):
    """Keeps the members of a balancer those that there are. Thread-safe."""

    def wait_for_names(self, deadline: Deadline) -> None:
        """Return once there are members. Raises UnavailableError if there will be none."""

    def note_failure(self) -> None:
        """Have the members looked up soon: one of them fails."""

    def probe(self, member: Member[_R], deadline: Deadline) -> str:
        """Return the health of a member, in one of gRPC's words. Raises a DeconvdError if it does not answer."""

    @property
    def next_lookup_s(self) -> float:
        """In how many seconds the members should be looked up; infinite if never."""

    def refresh(self) -> None:
        """Look the members up in the background."""
