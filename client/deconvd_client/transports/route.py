"""The nearest way to a server: a Unix socket, where client and server are on one host."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from enum import Enum, StrEnum
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from deconvd.errors import CallCancelledError, DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.transports.retry_policy import PinnedTransportError, RetryPolicy
from deconvd_client.transports.stub import Stub

__all__ = ["Route", "TransportName"]

_T = TypeVar("_T")

_VERIFY_TIMEOUT_S: Final = 1.0
"""How long a server may take to answer at a Unix socket of this host, when it is asked who it is."""

_FIRST_PROBE_PAUSE_S: Final = 0.2
_MAX_PROBE_PAUSE_S: Final = 30.0
"""How long after a nearer way was lost it is looked for again: at first, and at most."""

_PROBE_TIMEOUT_S: Final = 2.0

_log = logging.getLogger(__name__)


class TransportName(StrEnum):
    """Which way tensors are to go: what callers may ask for."""

    AUTO = "auto"
    """The nearest that works."""

    SHARED_MEMORY = "shared_memory"
    """Those that are not small in memory that the server lends; messages go the nearest way."""

    UNIX = "unix"
    """By a Unix socket of the server's."""

    TCP = "tcp"
    """By TCP to the host of the target, which is no Unix socket."""

    GRPC = "grpc"
    """By gRPC to the target, and nothing beside it."""


class _RouteState(Enum):
    """What is known of a nearer way.

    UNSOUGHT --found--> NEAR --its connection broke--> LOST --found again--> NEAR
    UNSOUGHT --it does not answer--> LOST
    UNSOUGHT --there is none--> FAR
    NEAR, where there must be one, --its connection broke--> UNSOUGHT
    LOST --in a forked child--> UNSOUGHT
    any of them --`close`--> CLOSED
    """

    UNKNOWN = "unsought"
    NEAR = "near"
    LOST = "lost"
    FAR = "far"
    CLOSED = "closed"


class Route:
    """Runs calls by the nearest way to a server that works, and tries them again where that may help.

    A way is lost only when its connection breaks: a server that answers that it is full has been
    reached. What was lost is looked for in the background, so that no call pays for it.

    Args:
        open_stub: Returns a stub for a target; nothing is sent yet.
        target: Where the server can be reached in any case.
        transport: Whether to look for a nearer way, and whether there must be one.
        retries: Which calls are tried again.

    Raises:
        InvalidArgumentError: `transport` is no way to such a target.
    """

    def __init__(
        self,
        open_stub: Callable[[str], Stub],
        target: str,
        transport: TransportName,
        retries: RetryPolicy,
    ) -> None:
        self._target_stub = open_stub(target)
        is_unix = target.startswith("unix:")
        if is_unix and transport is TransportName.TCP:
            self._target_stub.close(Deadline(0))
            raise InvalidArgumentError(
                f"transport tcp must have a target of the form host:port, got {target}",
                argument="transport",
            )
        self._open_stub = open_stub
        self._retries = retries
        self._must_be_near = transport is TransportName.UNIX and not is_unix
        is_near_enough = is_unix or transport in (TransportName.TCP, TransportName.GRPC)
        self._lock = new_lock()
        self._state = _RouteState.FAR if is_near_enough else _RouteState.UNKNOWN
        self._is_searching = False
        self._near_stub: Stub | None = None
        self._stubs: dict[str, Stub] = {}  # of Unix sockets: kept, since calls may be using them
        self._close_signal: SimpleQueue[None] = SimpleQueue()  # gets something when it is
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Look for a nearer way as at first: the thread that looked is not in a forked child."""
        self._is_searching = False
        self._close_signal = SimpleQueue()
        if self._state is _RouteState.LOST:
            self._move(_RouteState.UNKNOWN)

    def call(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        """Return what `work` returns for the nearest stub; if that has no server, for the far one.

        Args:
            work: Called once for each try.

        Raises:
            DeconvdError: What `work` raised last, or the server when it was asked for nearer ways.
            PinnedTransportError: There must be a nearer way, and there is none.
        """
        return self._retries.run(partial(self._try, work, deadline), deadline)

    def call_once(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        """Return what `work` returns, as `call` does, without trying again."""
        return self._retries.run_once(partial(self._try, work, deadline), deadline)

    def server_info(self, deadline: Deadline, session: bytes = b"") -> pb.GetServerInfoResponse:
        """Return what the server says of itself to a session, at the target as it was given."""
        return self._retries.run(
            partial(self._target_stub.get_server_info, deadline, session), deadline
        )

    def health(self, deadline: Deadline) -> str:
        """Return the server's health, at the target as it was given: as it is now, so it is asked once."""
        return self._retries.run_once(partial(self._target_stub.health, deadline), deadline)

    @property
    def target_stub(self) -> Stub:
        """The stub of the target as it was given."""
        return self._target_stub

    @property
    def current_stub(self) -> Stub | None:
        """The stub by which calls go now; None while that is not known."""
        return self._near_stub or (
            None if self._state is _RouteState.UNKNOWN else self._target_stub
        )

    def close(self, deadline: Deadline) -> None:
        """Close all ways. Calls under way end with CallCancelledError."""
        self._retries.stop()
        self._close_signal.put(None)
        with self._lock:
            self._move(_RouteState.CLOSED)
            stubs = [self._target_stub, *self._stubs.values()]
        for stub in stubs:
            stub.close(deadline)

    def _try(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        if self._state is _RouteState.UNKNOWN:
            self._seek(deadline)
        near = self._near_stub
        if near is None:
            return work(self._target_stub)
        try:
            return work(near)
        except UnavailableError as error:
            if error.was_reached or isinstance(error, PinnedTransportError):
                raise
            self._lose(near, error)
            if self._must_be_near:
                raise
        return work(self._target_stub)

    def _seek(self, deadline: Deadline) -> None:
        """Look for a nearer way.

        While one thread looks, others go the far way, unless there must be a near one.
        """
        with self._lock:
            if self._is_searching and not self._must_be_near:
                return
            self._is_searching = True
        try:
            near, why_not = self._find_near(deadline)
        except _NoAnswerError as error:
            self._search_later(str(error))
            return
        finally:
            self._is_searching = False
        with self._lock:
            if self._state is _RouteState.UNKNOWN:
                if near is not None:
                    self._move(_RouteState.NEAR, near)
                elif not self._must_be_near:
                    self._move(_RouteState.FAR)
        if near is None and self._must_be_near:
            raise PinnedTransportError(f"no call can go by a Unix socket: {why_not}")

    def _search_later(self, why: str) -> None:
        """Do without a nearer way that may come: look for it beside the calls, or again if there must be one."""
        if self._must_be_near:
            raise UnavailableError(f"no call can go by a Unix socket: {why}")
        with self._lock:
            if self._state is not _RouteState.UNKNOWN:
                return
            self._start_probe()
            self._move(_RouteState.LOST)

    def _find_near(self, deadline: Deadline) -> tuple[Stub | None, str]:
        """Return a stub of a Unix socket at which the server answers; if there is none, why.

        Raises:
            DeconvdError: What the server raised when it was asked where it listens.
            _NoAnswerError: It has a socket here, and nobody answers there.
        """
        info = self._target_stub.get_server_info(deadline)
        here = [path for path in info.unix_sockets if Path(path).is_socket()]
        silent = ""
        for path in here:
            try:
                stub = self._verify(f"unix:{path}", info.instance_id, deadline)
            except CallCancelledError:
                raise  # it stops, or the connection is closed
            except DeconvdError as error:
                _log.debug("not by %s: %s", path, error)
                silent = f"nobody answers at {path}: {error}"
            else:
                if stub is not None:
                    return stub, ""
        if silent:
            raise _NoAnswerError(silent)
        return None, _absence_reason(info, here)

    def _verify(self, target: str, instance_id: str, deadline: Deadline) -> Stub | None:
        """Return a stub of a target if the same server answers there. Raises a DeconvdError if none does."""
        with self._lock:
            if self._state is _RouteState.CLOSED:
                raise CallCancelledError("the connection is closed")
            stub = self._stubs.get(target) or self._open_stub(target)
            self._stubs[target] = stub
        if stub.get_server_info(deadline.with_limit(_VERIFY_TIMEOUT_S)).instance_id != instance_id:
            _log.debug("another server answers at %s", target)
            return None
        _log.debug("calls go by %s", target)
        return stub

    def _lose(self, near: Stub, error: UnavailableError) -> None:
        with self._lock:
            if self._near_stub is not near:
                return
            if self._must_be_near:
                self._move(_RouteState.UNKNOWN)
                return
            self._start_probe()  # first: after an interrupt nobody would look for what is LOST
            self._move(_RouteState.LOST)
        _log.warning("the server's Unix socket is gone, calls go by its target: %s", error)

    def _move(self, to: _RouteState, near: Stub | None = None) -> None:
        """Change the state; CLOSED is for good. Called with the lock held."""
        if self._state is not _RouteState.CLOSED:
            self._state, self._near_stub = to, near

    def _start_probe(self) -> None:
        """Look for the nearer way until it is there."""
        run_in_background(_Prober(weakref.WeakMethod(self._probe_once), self._close_signal).run)

    def _probe_once(self) -> bool:
        """Look once for what was lost; return whether there is an end of looking."""
        try:
            near, _ = self._find_near(Deadline(_PROBE_TIMEOUT_S))
        except (DeconvdError, _NoAnswerError) as error:
            _log.debug("no nearer way yet: %s", error)
            return False
        if near is None:
            return False
        with self._lock:
            is_back = self._state is _RouteState.LOST
            if is_back:
                self._move(_RouteState.NEAR, near)
        if is_back:
            _log.info("the server's Unix socket is back")
        return True


class _Prober:
    """Looks for a lost way again and again, ever more seldom.

    Args:
        look: Looks once, and returns whether that was enough. It does not keep its object alive.
        closed: Gets something once nothing is looked for any more.
    """

    def __init__(self, look: weakref.WeakMethod[Callable[[], bool]], closed: SimpleQueue[None]):
        self._look = look
        self._close_signal = closed

    def run(self) -> None:
        """Look until the way is found, or nobody wants it any more."""
        pause_s = _FIRST_PROBE_PAUSE_S
        while True:
            try:
                self._close_signal.get(timeout=pause_s)
            except Empty:
                pass
            else:
                self._close_signal.put(None)  # for other probes
                return
            look = self._look()
            if look is None or look():
                return
            del look
            pause_s = min(2 * pause_s, _MAX_PROBE_PAUSE_S)


class _NoAnswerError(Exception):
    """The server has a Unix socket here, and nobody answers there: it stops or starts, or has no time now."""


def _absence_reason(info: pb.GetServerInfoResponse, here: list[str]) -> str:
    if not info.unix_sockets:
        return "the server listens at none"
    if not here:
        return (
            f"the server's, {', '.join(info.unix_sockets)}, are on another host or in a container"
        )
    return f"another server answers at {', '.join(here)}"
