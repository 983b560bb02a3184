"""The client's end of the side socket."""

from __future__ import annotations

import mmap
import os
import select
import socket
from contextlib import suppress
from typing import Final

from deconvd.forks import new_lock
from deconvd.shared_memory import MAX_REPLY_BYTES, Answer, Operation, Reply, Request
from deconvd_client.shared_memory.region import HostRegion

__all__ = ["Link", "LinkLostError", "NeverLentError", "NotHereError", "NotLentError"]

_TIMEOUT_S: Final = 10.0
"""More than a server takes to make memory and to show it to its devices."""


class LinkLostError(Exception):
    """The server closed the socket, is not there, or speaks another language."""


class NotHereError(LinkLostError):
    """Nobody listens at the socket on this host."""


class NotLentError(Exception):
    """The server lends no more, for now."""


class NeverLentError(Exception):
    """The server lends none of what was asked for, and never will."""


class Link:
    """A connection to the server's side socket. What was borrowed by it is lent for as long as it is open.

    One thread asks; any may close it meanwhile, which ends the asking.

    Raises:
        NotHereError: There is no such socket, or no one listens.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise NotHereError("this system has no Unix sockets")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_TIMEOUT_S)
        self._asking = new_lock()  # never waited for
        self._turns_count = 0  # of asking: odd while a thread asks
        self._is_closed = False
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NotHereError(f"cannot connect to {path}: {error.strerror or error}") from None
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @property
    def is_open(self) -> bool:
        """Whether the server has not closed it."""
        # What can be read is the socket's end, or what nobody asked for. While a thread asks it is
        # the answer.
        before = self._turns_count
        return not self._poll.poll(0) or before % 2 == 1 or self._turns_count != before

    def borrow(self, size_bytes: int) -> HostRegion:
        """Return new memory of the host of at least `size_bytes`.

        Raises:
            NotLentError: It would be over a limit.
            LinkLostError: The link is of no more use.
        """
        reply, descriptor = self._asked(Request(Operation.LEND, size_bytes))
        try:
            _check_lent(reply)
            return HostRegion(reply.region, _mapped(descriptor, reply.size_bytes, size_bytes))
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def borrow_on_card(self, card: bytes, size_bytes: int) -> Reply:
        """Return what the server says of new memory on a card.

        Args:
            card: Its `card_id`.

        Raises:
            NotLentError, LinkLostError: As `borrow` does.
            NeverLentError: The server lends no memory of that card.
        """
        reply, descriptor = self._asked(Request(Operation.LEND_ON_CARD, size_bytes, card))
        if descriptor is not None:
            os.close(descriptor)
        _check_lent(reply)
        return reply

    def give_back(self, name: bytes) -> None:
        """Tell the server that no later call will use the region of that name. Raises LinkLostError."""
        self._asked(Request(Operation.RETURN, region=name))

    def close(self) -> None:
        """Give all back."""
        self._is_closed = True
        with suppress(OSError):  # the server has gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._close_unless_asking()

    def leave_to_parent(self) -> None:
        """Have nothing to do with it any more, in a forked child: the parent goes on using it."""
        self._socket.close()

    def _close_unless_asking(self) -> None:
        # a descriptor that is closed under who waits for it may be another socket's by then
        if self._asking.acquire(blocking=False):
            self._socket.close()
            self._asking.release()

    def _asked(self, request: Request) -> tuple[Reply, int | None]:
        try:
            with self._asking:
                self._turns_count += 1
                try:
                    return self._exchanged(request)
                finally:
                    self._turns_count += 1
        finally:
            if self._is_closed:
                self._close_unless_asking()

    def _exchanged(self, request: Request) -> tuple[Reply, int | None]:
        descriptors: list[int] = []
        try:
            with suppress(BrokenPipeError):  # it may have said why before it went
                self._socket.send(request.pack())
            packet, descriptors, _flags, _address = socket.recv_fds(
                self._socket, MAX_REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            if not packet:
                raise LinkLostError("the server has closed the socket")
            reply = Reply.parse(packet)
        except (OSError, ValueError) as error:
            _close_all(descriptors)
            raise LinkLostError(f"the server does not answer: {error}") from None
        if reply.answer in (Answer.REFUSED, Answer.MALFORMED):
            _close_all(descriptors)
            raise LinkLostError(f"the server refuses: {reply.text}")
        return reply, descriptors[0] if descriptors else None


def _check_lent(reply: Reply) -> None:
    if reply.answer is Answer.NO_SUCH_CARD:
        raise NeverLentError(reply.text)
    if reply.answer is not Answer.DONE:
        raise NotLentError(reply.text)


def _mapped(descriptor: int | None, size_bytes: int, wanted_bytes: int) -> mmap.mmap:
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
