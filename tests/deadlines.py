"""Deadlines of calls that tests make below a connection."""

from __future__ import annotations

from deconvd_client.calls.deadline import Deadline

__all__ = ["short_deadline"]


def short_deadline() -> Deadline:
    """Return a deadline that no test reaches unless something hangs."""
    return Deadline(30)
