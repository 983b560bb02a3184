"""Failover: a call that one transport cannot carry is carried by another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transport import (
    NotServedDirectlyError,
    OutcomeUnknownError,
    StreamAttempt,
    Transport,
)

__all__ = ["Failover"]

_T = TypeVar("_T")


class Failover:
    """Has calls carried by one transport if it may carry them, else by another. See `Transport`.

    The other carries what the first finds that it cannot carry, too.

    Both have the same deadline: what the first has used of it the second lacks.

    Args:
        only_unsent: Raise OutcomeUnknownError, and leave to the caller what the first has lost in the midst: the server
            may be at it still, and write into memory of ours what the other would have written there too.
    """

    def __init__(self, first: Transport, second: Transport, *, only_unsent: bool = False) -> None:
        self._first = first
        self._second = second
        self._at_most_once = only_unsent

    @property
    def may_carry(self) -> bool:
        """Whether either may."""
        return self._first.may_carry or self._second.may_carry

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        late_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger."""
        if self._first.may_carry:
            try:
                return self._first.unary(method, request, deadline, late_copy)
            except OutcomeUnknownError:
                if self._at_most_once:
                    raise
            except NotServedDirectlyError:
                pass
        return self._second.unary(method, request, deadline, late_copy)

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger."""
        if self._first.may_carry:
            try:
                return self._first.stream(begin, deadline)
            except OutcomeUnknownError:
                if self._at_most_once:
                    raise
            except NotServedDirectlyError:
                pass
        return self._second.stream(begin, deadline)
