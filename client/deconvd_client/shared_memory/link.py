"""The client's end of the lending socket, by which memory is borrowed and given back."""

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
"""Longer than a server takes to allocate memory and to register it with its devices."""


class LinkLostError(Exception):
    """The server closed the socket, is not there, or speaks another protocol."""


class NoListenerError(LinkLostError):
    """No server listens at the socket on this host."""


class LendingLimitError(Exception):
    """The server lends no more memory for now."""


class LendingUnsupportedError(Exception):
    """The server does not lend this kind of memory, and never will."""


class LinkState(Enum):
    """What a link is doing.

    IDLE --a thread sends a request--> BUSY --it has the reply, or an error--> IDLE
    IDLE --close--> CLOSED
    BUSY --close--> CLOSING --the thread has an error--> CLOSED
    """

    IDLE = "idle"
    """No request is under way: all that can come from the server is the end of the connection."""

    BUSY = "busy"
    CLOSING = "closing"
    """The socket is shut down. It is closed later: its number could become another file's while the thread uses it."""

    CLOSED = "closed"


_STATE_AFTER_REQUEST: Final = {LinkState.BUSY: LinkState.IDLE, LinkState.CLOSING: LinkState.CLOSED}


class Link:
    """A connection to the server's lending socket. The server lends memory for as long as it is open.

    One thread sends requests. Any thread may close the link meanwhile, which ends a request with an error.

    Attributes:
        state: What it is doing. See `LinkState`.

    Raises:
        NoListenerError: There is no such socket, or no server listens there.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise NoListenerError("this system has no Unix sockets")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_REPLY_TIMEOUT_S)
        self._lock = new_lock()  # guards the state; never held while a thread waits for the server
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
        """Whether neither side has closed it."""
        if not self._poll.poll(0):
            return self.state is not LinkState.CLOSED
        with self._lock:  # so that no request begins meanwhile: its reply would be readable, too
            if self.state is LinkState.IDLE:
                return not self._poll.poll(0)
            return self.state is LinkState.BUSY

    def borrow(self, size_bytes: int) -> HostRegion:
        """Return new memory of the host of at least `size_bytes`.

        Raises:
            LendingLimitError: It would be over a limit.
            LinkLostError: The link can no longer be used.
        """
        reply, descriptor = self._request(LendingRequest(LendingOperation.LEND, size_bytes))
        try:
            _check_lent(reply)
            return HostRegion(reply.region, _map_memory(descriptor, reply.size_bytes, size_bytes))
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def borrow_on_card(self, card: bytes, size_bytes: int) -> LendingReply:
        """Return the reply to a request for new memory on a card.

        Args:
            card: The card's `card_id`.

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
        """Tell the server that no later call will use the region with a name. Raises LinkLostError."""
        _, descriptor = self._request(LendingRequest(LendingOperation.RETURN, region=name))
        _close_all([] if descriptor is None else [descriptor])

    def close(self) -> None:
        """Give all memory back."""
        with self._lock:
            if self.state is LinkState.IDLE:
                self._move(LinkState.CLOSED)
            elif self.state is LinkState.BUSY:
                self._move(LinkState.CLOSING)

    def leave_to_parent(self) -> None:
        """Stop using the link in a forked child: the parent goes on using it."""
        with self._lock:
            self._socket.close()  # first: if `_move` shut it down, the parent's connection would end
            self._move(LinkState.CLOSED)

    def _move(self, to: LinkState) -> None:
        """Change the state, and shut down or close the socket accordingly. Called with the lock held."""
        if to in (LinkState.CLOSING, LinkState.CLOSED):
            with suppress(OSError):  # the server has gone, or it is shut down already
                self._socket.shutdown(socket.SHUT_RDWR)
        if to is LinkState.CLOSED:
            self._socket.close()
        self.state = to

    def _request(self, request: LendingRequest) -> tuple[LendingReply, int | None]:
        with self._lock:
            if self.state is not LinkState.IDLE:
                raise LinkLostError(f"the lending socket is {self.state.value}")
            self._move(LinkState.BUSY)
        try:
            return self._exchange(request)
        finally:
            with self._lock:
                self._move(_STATE_AFTER_REQUEST[self.state])

    def _exchange(self, request: LendingRequest) -> tuple[LendingReply, int | None]:
        descriptors: list[int] = []
        try:
            with suppress(BrokenPipeError):  # the reason may be there to be read
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
    """Map lent memory, but only if it is sealed: if it could shrink, access to it would kill this process by SIGBUS."""
    import fcntl  # not every system has it; those that lack it have no lending either

    try:
        if descriptor is None:
            raise ValueError("it came without a descriptor")
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("it is not sealed")
        if not wanted_bytes <= size_bytes == os.fstat(descriptor).st_size:
            raise ValueError("it has another size")
        return mmap.mmap(descriptor, size_bytes)
    except (OSError, ValueError) as error:
        raise LinkLostError(f"the server lent unusable memory: {error}") from None


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
