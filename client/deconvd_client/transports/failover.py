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
    """Two transports as one: the second carries the calls that the first cannot carry. See `Transport`.

    Both share the deadline of a call: the second has only the time that the first has left.

    Args:
        at_most_once: Raise OutcomeUnknownError where the first has lost a call after it was sent. The server may still
            compute it, and two attempts must not write results to the same memory.
    """

    def __init__(self, first: Transport, second: Transport, *, at_most_once: bool = False) -> None:
        self._first = first
        self._second = second
        self._at_most_once = at_most_once

    @property
    def may_carry(self) -> bool:
        """Whether either may carry a call now."""
        return self._first.may_carry or self._second.may_carry

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        overlapped_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """See `Transport`."""
        if self._first.may_carry:
            try:
                return self._first.unary(method, request, deadline, overlapped_copy)
            except OutcomeUnknownError:
                if self._at_most_once:
                    raise
            except NotServedDirectlyError:
                pass
        return self._second.unary(method, request, deadline, overlapped_copy)

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """See `Transport`."""
        if self._first.may_carry:
            try:
                return self._first.stream(begin, deadline)
            except OutcomeUnknownError:
                if self._at_most_once:
                    raise
            except NotServedDirectlyError:
                pass
        return self._second.stream(begin, deadline)
