"""Errors of direct lines, by who is to blame: the stream between both ends, the other end, or a bug of ours."""

from __future__ import annotations

__all__ = [
    "ConnectionBrokenError",
    "ConnectionClosedError",
    "ConnectionTimeoutError",
    "LocalProtocolError",
    "MessageTooLargeError",
    "RemoteProtocolError",
]


class ConnectionBrokenError(ConnectionError):
    """A call cannot go on by its line. The base of what is nobody's bug here: the call can go another way."""


class ConnectionClosedError(ConnectionBrokenError):
    """The other end has closed the line, or it was cut, or it has ended with the call that was on it."""


class ConnectionTimeoutError(ConnectionBrokenError):
    """The deadline has passed, and the line is somewhere in the middle of things."""


class RemoteProtocolError(ConnectionBrokenError):
    """The other end has sent what it may not, or what makes no sense. The line is of no more use."""


class MessageTooLargeError(ConnectionBrokenError):
    """A message is larger than lines carry. Nothing was sent, and the line is as it was."""


class LocalProtocolError(RuntimeError):
    """We were about to send or read what the line's state does not allow: a bug. Nothing was sent."""
