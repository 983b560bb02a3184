"""The client's end of the side socket."""

from __future__ import annotations

import mmap
import os
import select
import socket
from contextlib import suppress
from enum import Enum
from typing import Final

from deconvd.host.forks import new_lock
from deconvd.lending.protocol import (
    MAX_REPLY_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd_client.shared_memory.region import HostRegion

__all__ = [
    "LendingLimitError",
    "LendingUnsupportedError",
    "Link",
    "LinkLostError",
    "LinkState",
    "NoListenerError",
]

_REPLY_TIMEOUT_S: Final = 10.0
"""More than a server takes to make memory and to show it to its devices."""


class LinkLostError(Exception):
    """The server closed the socket, is not there, or speaks another language."""


class NoListenerError(LinkLostError):
    """Nobody listens at the socket on this host."""


class LendingLimitError(Exception):
    """The server lends no more, for now."""


class LendingUnsupportedError(Exception):
    """The server lends none of what was asked for, and never will."""


class LinkState(Enum):
    """What a link is doing.

    IDLE --a thread asks--> ASKING --it has the answer, or an error--> IDLE
    IDLE --close--> CLOSED
    ASKING --close--> CLOSING --it has an error--> CLOSED
    """

    IDLE = "idle"
    """Nothing comes from the server but the end of the socket."""

    BUSY = "asking"
    CLOSING = "closing"
    """The socket is shut down. Its descriptor is the asking thread's until that has done: it would be another's."""

    CLOSED = "closed"


_STATE_AFTER_REQUEST: Final = {LinkState.BUSY: LinkState.IDLE, LinkState.CLOSING: LinkState.CLOSED}


class Link:
    """A connection to the server's side socket. What was borrowed by it is lent for as long as it is open.

    One thread asks; any may close it meanwhile, which ends the asking.

    Attributes:
        state: What it is doing. See `LinkState`.

    Raises:
        NoListenerError: There is no such socket, or no one listens.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise NoListenerError("this system has no Unix sockets")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_REPLY_TIMEOUT_S)
        self._lock = new_lock()  # of the state; never held while the server is waited for
        self.state: LinkState = LinkState.IDLE
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NoListenerError(f"cannot connect to {path}: {error.strerror or error}") from None
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @property
    def is_open(self) -> bool:
        """Whether the server has not closed it."""
        if not self._poll.poll(0):
            return self.state is not LinkState.CLOSED
        with self._lock:  # so that no thread begins to ask: what could be read then is its answer
            if self.state is LinkState.IDLE:
                return not self._poll.poll(0)
            return self.state is LinkState.BUSY

    def borrow(self, size_bytes: int) -> HostRegion:
        """Return new memory of the host of at least `size_bytes`.

        Raises:
            LendingLimitError: It would be over a limit.
            LinkLostError: The link is of no more use.
        """
        reply, descriptor = self._request(LendingRequest(LendingOperation.LEND, size_bytes))
        try:
            _check_lent(reply)
            return HostRegion(reply.region, _map_memory(descriptor, reply.size_bytes, size_bytes))
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def borrow_on_card(self, card: bytes, size_bytes: int) -> LendingReply:
        """Return what the server says of new memory on a card.

        Args:
            card: Its `card_id`.

        Raises:
            LendingLimitError, LinkLostError: As `borrow` does.
            LendingUnsupportedError: The server lends no memory of that card.
        """
        reply, descriptor = self._request(
            LendingRequest(LendingOperation.LEND_ON_CARD, size_bytes, card)
        )
        if descriptor is not None:
            os.close(descriptor)
        _check_lent(reply)
        return reply

    def give_back(self, name: bytes) -> None:
        """Tell the server that no later call will use the region of that name. Raises LinkLostError."""
        self._request(LendingRequest(LendingOperation.RETURN, region=name))

    def close(self) -> None:
        """Give all back."""
        with self._lock:
            if self.state is LinkState.IDLE:
                self._move(LinkState.CLOSED)
            elif self.state is LinkState.BUSY:
                self._move(LinkState.CLOSING)

    def leave_to_parent(self) -> None:
        """Have nothing to do with it any more, in a forked child: the parent goes on using it."""
        with self._lock:
            self._socket.close()  # before `_move` shuts it down, which would be felt by the parent
            self._move(LinkState.CLOSED)

    def _move(self, to: LinkState) -> None:
        """Change the state, and what becomes of the socket with it. Called with the lock held."""
        if to in (LinkState.CLOSING, LinkState.CLOSED):
            with suppress(OSError):  # the server has gone, or that is done already
                self._socket.shutdown(socket.SHUT_RDWR)
        if to is LinkState.CLOSED:
            self._socket.close()
        self.state = to

    def _request(self, request: LendingRequest) -> tuple[LendingReply, int | None]:
        with self._lock:
            if self.state is not LinkState.IDLE:
                raise LinkLostError(f"the socket is {self.state.value}")
            self._move(LinkState.BUSY)
        try:
            return self._exchange(request)
        finally:
            with self._lock:
                self._move(_STATE_AFTER_REQUEST[self.state])

    def _exchange(self, request: LendingRequest) -> tuple[LendingReply, int | None]:
        descriptors: list[int] = []
        try:
            with suppress(BrokenPipeError):  # it may have said why before it went
                self._socket.send(request.pack())
            packet, descriptors, _flags, _address = socket.recv_fds(
                self._socket, MAX_REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            if not packet:
                raise LinkLostError("the server has closed the socket")
            reply = LendingReply.parse(packet)
        except (OSError, ValueError) as error:
            _close_all(descriptors)
            raise LinkLostError(f"the server does not answer: {error}") from None
        if reply.status in (ReplyStatus.REFUSED, ReplyStatus.MALFORMED):
            _close_all(descriptors)
            raise LinkLostError(f"the server refuses: {reply.text}")
        return reply, descriptors[0] if descriptors else None


def _check_lent(reply: LendingReply) -> None:
    if reply.status is ReplyStatus.NO_SUCH_CARD:
        raise LendingUnsupportedError(reply.text)
    if reply.status is not ReplyStatus.DONE:
        raise LendingLimitError(reply.text)


def _map_memory(descriptor: int | None, size_bytes: int, wanted_bytes: int) -> mmap.mmap:
    """Map lent memory, once it is sure that nobody can cut it and so kill this process with SIGBUS."""
    import fcntl  # which not every system has: there, no one lends

    try:
        if descriptor is None:
            raise ValueError("it came without a descriptor")
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("it is not sealed")
        if not wanted_bytes <= size_bytes == os.fstat(descriptor).st_size:
            raise ValueError("it has another size")
        return mmap.mmap(descriptor, size_bytes)
    except (OSError, ValueError) as error:
        raise LinkLostError(f"the server lent memory that is of no use: {error}") from None


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
