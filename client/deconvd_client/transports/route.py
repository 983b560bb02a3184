"""The route to a server: by its Unix socket if client and server are on one host, else by its target."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from enum import Enum, StrEnum
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from deconvd.errors import CallCancelledError, DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.transports.retry_policy import PinnedTransportError, RetryPolicy
from deconvd_client.transports.side_sockets import Owners, any_owner, is_trusted_socket
from deconvd_client.transports.stub import Stub

__all__ = ["Route", "TransportName"]

_T = TypeVar("_T")

_SEARCH_TIMEOUT_S: Final = 5.0
"""How long the search for a Unix socket may take that runs beside calls."""

_VERIFY_TIMEOUT_S: Final = 1.0
"""How long a server may take to say at a Unix socket which instance it is."""

_FIRST_PROBE_PAUSE_S: Final = 0.2
"""How soon a lost Unix socket is probed; the pause doubles with each probe."""

_MAX_PROBE_PAUSE_S: Final = 30.0
"""The longest pause between two probes."""

_PROBE_TIMEOUT_S: Final = 2.0
"""How long one probe may take."""

_log = logging.getLogger(__name__)


class TransportName(StrEnum):
    """How tensors travel, as callers may choose it."""

    AUTO = "auto"
    """The fastest that works."""

    SHARED_MEMORY = "shared_memory"
    """All but small tensors in shared memory that the server lends; messages by the fastest transport that works."""

    UNIX = "unix"
    """By a Unix socket of the server."""

    TCP = "tcp"
    """By TCP to the host of the target, which must not be a Unix socket."""

    GRPC = "grpc"
    """By gRPC to the target alone."""


class _RouteState(Enum):
    """What is known about a Unix socket of the server on this host.

    UNKNOWN --found--> NEAR --its connection broke--> LOST --found again--> NEAR
    UNKNOWN --it does not answer--> LOST
    UNKNOWN --there is none--> FAR
    NEAR --its connection broke, and calls must use it--> UNKNOWN
    LOST --in a forked child--> UNKNOWN
    any of them --`close`--> CLOSED
    """

    UNKNOWN = "unknown"
    """The next call has one looked for."""

    NEAR = "near"
    """Calls go by it."""

    LOST = "lost"
    """Calls go by the target, and a background thread looks for the socket."""

    FAR = "far"
    """Calls go by the target, for good."""

    CLOSED = "closed"


class Route:
    """Runs calls by the Unix socket of the server if there is one on this host, else by its target. Thread-safe.

    The *near* stub is that of the Unix socket. It is lost only when its connection breaks: a server that answers that
    it is full has been reached. A background thread looks for the socket, also for a lost one: calls go by the target
    meanwhile, unless they must not.

    Args:
        open_stub: Returns a stub for a target. Nothing is sent yet.
        target: Where the server can always be reached.
        transport: Says whether to look for a Unix socket, and whether calls must use one.
        retries: Says which calls are retried.
        patience: Bounds how long calls wait for the first search.
        owners: Whose Unix sockets are used in place of the target.

    Raises:
        InvalidArgumentError: The target cannot be reached by `transport`.
    """

    def __init__(
        self,
        open_stub: Callable[[str], Stub],
        target: str,
        transport: TransportName,
        retries: RetryPolicy,
        patience: Patience,
        owners: Owners = any_owner,
    ) -> None:
        self._owners = owners
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
        self._patience = patience
        self._must_be_near = transport is TransportName.UNIX and not is_unix
        is_near_enough = is_unix or transport in (TransportName.TCP, TransportName.GRPC)
        self._lock = new_lock()
        self._state = _RouteState.FAR if is_near_enough else _RouteState.UNKNOWN
        # shared memory is near as well: its calls can wait for the search
        self._is_pinned = self._must_be_near or transport is TransportName.SHARED_MEMORY
        self._search = SharedTask()
        self._near_stub: Stub | None = None
        self._stubs: dict[
            str, Stub
        ] = {}  # by target, of all Unix sockets ever tried: calls may still use them
        self._close_signal: SimpleQueue[None] = SimpleQueue()  # gets an item when this is closed
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Search as at first: the thread that looked for a lost socket does not exist in a forked child."""
        self._close_signal = SimpleQueue()
        if self._state is _RouteState.LOST:
            self._move(_RouteState.UNKNOWN)

    def call(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        """Return what `work` returns for the near stub; for that of the target if the near one has no server.

        Args:
            work: Makes one attempt with a stub.

        Raises:
            DeconvdError: What `work` raised last; or GetServerInfo, if calls must wait for the search.
            PinnedTransportError: Calls must use a Unix socket, and there is none.
        """
        return self._retries.run(partial(self._try, work, deadline), deadline)

    def call_once(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        """Return what `work` returns, as `call` does, but without retries."""
        return self._retries.run_once(partial(self._try, work, deadline), deadline)

    def server_info(self, deadline: Deadline, session: bytes = b"") -> pb.GetServerInfoResponse:
        """Return the GetServerInfo response for a session, asked at the target as it was given."""
        return self._retries.run(
            partial(self._target_stub.get_server_info, deadline, session),
            deadline,
            waits_while_full=False,
        )

    def health(self, deadline: Deadline) -> str:
        """Return the server's health, asked at the target as it was given, once: the caller wants it as of now."""
        return self._retries.run_once(partial(self._target_stub.health, deadline), deadline)

    @property
    def target_stub(self) -> Stub:
        """The stub of the target as it was given."""
        return self._target_stub

    @property
    def current_stub(self) -> Stub | None:
        """The stub that calls use now; None while that is not known."""
        return self._near_stub or (
            None if self._state is _RouteState.UNKNOWN else self._target_stub
        )

    def close(self, deadline: Deadline) -> None:
        """Close all stubs. Calls under way end with CallCancelledError."""
        self._retries.stop()
        self._close_signal.put(None)
        with self._lock:
            self._move(_RouteState.CLOSED)
            stubs = [self._target_stub, *self._stubs.values()]
        for stub in stubs:
            stub.close(deadline)

    def _try(self, work: Callable[[Stub], _T], deadline: Deadline) -> _T:
        if deadline.scope is not None:  # small calls notice each function
            deadline.check_cancelled()
        if self._state is _RouteState.UNKNOWN:
            if self._is_pinned:
                self._seek(deadline)
            else:
                patience_s = min(self._patience.remaining_s(), deadline.remaining_s())
                self._search.run(self._seek_in_background, patience_s)
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
        """Look for a Unix socket of the server on this host.

        Raises:
            DeconvdError: What GetServerInfo raised, or there is no socket and calls must use one.
        """
        try:
            near, why_not = self._find_near(deadline)
        except _NoAnswerError as error:
            self._search_later(str(error))
            return
        with self._lock:
            if self._state is _RouteState.UNKNOWN:
                if near is not None:
                    self._move(_RouteState.NEAR, near)
                elif not self._must_be_near:
                    self._move(_RouteState.FAR)
        if near is None and self._must_be_near:
            raise PinnedTransportError(f"transport='unix' cannot be used: {why_not}")

    def _seek_in_background(self) -> None:
        """Look for a Unix socket beside calls, which hear of trouble from the target. The next call looks again."""
        try:
            self._seek(Deadline(_SEARCH_TIMEOUT_S))
        except DeconvdError as error:
            _log.debug("no search for a Unix socket: %s", error)

    def _search_later(self, why: str) -> None:
        """Go on without a socket that does not answer yet: a background thread will find it, or a retry."""
        if self._must_be_near:
            raise UnavailableError(f"transport='unix' cannot be used: {why}")
        with self._lock:
            if self._state is not _RouteState.UNKNOWN:
                return
            self._start_probe()
            self._move(_RouteState.LOST)

    def _find_near(self, deadline: Deadline) -> tuple[Stub | None, str]:
        """Return a stub of a Unix socket at which the server answers; if there is none, None and the reason.

        Raises:
            DeconvdError: What GetServerInfo raised at the target.
            _NoAnswerError: The server has a socket on this host that does not answer.
        """
        info = self._target_stub.get_server_info(deadline)
        here = [path for path in info.unix_sockets if is_trusted_socket(path, self._owners)]
        silent = ""
        for path in here:
            try:
                stub = self._verify(f"unix:{path}", info.instance_id, deadline)
            except CallCancelledError:
                raise  # the server stops, or the connection is closed
            except DeconvdError as error:
                _log.debug("not by %s: %s", path, error)
                silent = f"nobody answers at {path}: {error}"
            else:
                if stub is not None:
                    return stub, ""
        if silent:
            raise _NoAnswerError(silent)
        return None, _absence_reason(info, here, self._owners)

    def _verify(self, target: str, instance_id: str, deadline: Deadline) -> Stub | None:
        """Return a stub of a target; None if another server answers there. Raises a DeconvdError if none answers."""
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
            self._start_probe()  # first: an interrupt between the two lines must not leave it LOST for ever
            self._move(_RouteState.LOST)
        _log.warning("the server's Unix socket is gone, calls go by its target: %s", error)

    def _move(self, to: _RouteState, near: Stub | None = None) -> None:
        """Change the state, unless it is CLOSED, which is for good. Called with the lock held."""
        if self._state is not _RouteState.CLOSED:
            self._state, self._near_stub = to, near

    def _start_probe(self) -> None:
        """Have a background thread look for the socket until it is there."""
        run_in_background(_Prober(weakref.WeakMethod(self._probe_once), self._close_signal).run)

    def _probe_once(self) -> bool:
        """Look once for the lost socket; return whether to stop looking."""
        try:
            near, _ = self._find_near(Deadline(_PROBE_TIMEOUT_S))
        except (DeconvdError, _NoAnswerError) as error:
            _log.debug("no Unix socket yet: %s", error)
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
    """Looks for a lost socket again and again, at growing intervals.

    Args:
        probe: Looks once, and returns whether to stop. A weak reference, so that the thread does not keep a connection
            alive that its user has dropped.
        close_signal: Gets an item when the route is closed.
    """

    def __init__(
        self, probe: weakref.WeakMethod[Callable[[], bool]], close_signal: SimpleQueue[None]
    ) -> None:
        self._probe = probe
        self._close_signal = close_signal

    def run(self) -> None:
        """Look until the socket is found, or the route is closed or dropped."""
        pause_s = _FIRST_PROBE_PAUSE_S
        while True:
            try:
                self._close_signal.get(timeout=pause_s)
            except Empty:
                pass
            else:
                self._close_signal.put(None)  # for other probers
                return
            probe = self._probe()
            if probe is None or probe():
                return
            del probe  # during the pause it would keep the route alive
            pause_s = min(2 * pause_s, _MAX_PROBE_PAUSE_S)


class _NoAnswerError(Exception):
    """The server has a Unix socket on this host that does not answer: it is starting, stopping or busy."""


def _absence_reason(info: pb.GetServerInfoResponse, here: list[str], owners: Owners) -> str:
    """Return why no Unix socket of a server can be used. `here` has those of its paths that may be."""
    if not info.unix_sockets:
        return "the server listens at no Unix socket"
    foreign = [path for path in info.unix_sockets if path not in here and is_trusted_socket(path)]
    if not here and foreign:
        users = " or ".join(map(str, sorted(owners() or ())))
        return (
            f"{', '.join(foreign)} must belong to user {users}, as this client shows credentials there, and does not. "
            "If the socket is the server's, give it as the target."
        )
    if not here:
        return (
            f"none of the server's Unix sockets ({', '.join(info.unix_sockets)}) exists on this host. "
            "The server is on another host or in a container."
        )
    return f"another server answers at {', '.join(here)}"
