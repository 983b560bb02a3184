"""A transport made of two: the one that is faster where it can be had, and the one that always can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from deconvd_client.deadline import Deadline
from deconvd_client.late_copy import LateCopy
from deconvd_client.transport import Conversation, NoLineError, Transport

__all__ = ["Failover"]

_T = TypeVar("_T")


class Failover:
    """Has calls carried by one transport, and by another if that finds that it cannot. See `Transport`.

    Both have the same deadline: what the first has used of it the second lacks.
    """

    def __init__(self, first: Transport, second: Transport) -> None:
        self._first = first
        self._second = second

    def unary(
        self, method: str, request: bytes, deadline: Deadline, late_copy: LateCopy | None = None
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger."""
        try:
            return self._first.unary(method, request, deadline, late_copy)
        except NoLineError:
            pass
        return self._second.unary(method, request, deadline, late_copy)

    def stream(self, begin: Callable[[], Conversation[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger."""
        try:
            return self._first.stream(begin, deadline)
        except NoLineError:
            pass
        return self._second.stream(begin, deadline)
