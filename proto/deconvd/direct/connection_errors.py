"""Errors of direct connections, by cause: the network, the peer, or a bug on our side."""

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
    """The call cannot continue on this connection, but can be retried over another transport.

    The base class of all errors here that are not bugs on our side.
    """


class ConnectionClosedError(ConnectionBrokenError):
    """The connection has ended: the peer closed it, the network failed, or a failed call has ended it."""


class ConnectionTimeoutError(ConnectionBrokenError):
    """The deadline passed in the middle of a call, so the connection cannot be used again."""


class RemoteProtocolError(ConnectionBrokenError):
    """The peer sent a frame that is malformed or not allowed in this state. The connection cannot be used again."""


class MessageTooLargeError(ConnectionBrokenError):
    """A message is larger than direct connections carry. Nothing was sent, and the connection is still usable."""


class LocalProtocolError(RuntimeError):
    """Our own code tried to send or read something that the state does not allow: a bug. Nothing was sent."""
