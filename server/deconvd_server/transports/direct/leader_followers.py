"""Threads that take turns at small calls: one leads, and serves connection after connection; the others follow.

Threads of one interpreter hinder each other: each system call and copy of a call gives the interpreter's lock away.
Then a thread must be woken to take it. With a thread for each connection a small call costs a dozen such hand-overs
when many clients call. A leader costs none: when it has answered a call, it goes on with whichever has come meanwhile.

    ALONE --a small call has ended--> FOLLOWING --the leader hands over--> LEADING
      ^                                                                       |
      `------------- its call is not small, must wait, or lasts --------------'

A thread that is ALONE waits for the next call of its connection, as if there were no other. FOLLOWING threads sleep.
Their connections are shared: the one that is LEADING waits for all of them. There are as many threads as connections.
So one that leaves with its connection is never missed. The pattern is "Leader/Followers" (Schmidt et al., 2000).
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Final, Protocol

from deconvd.direct.busy_polling import BusyPolling
from deconvd_server.resources.accept_loop import SHORTAGE_PAUSE_S
from deconvd_server.transports.direct.last_caller import LastCaller

__all__ = ["LeaderFollowers", "SharedConnection"]

_WATCH_S: Final = 0.01
"""A leader whose call lasts for one to two of these is relieved. Calls that are known to take long tell it before."""

_QUIET_COUNT: Final = 100
"""How often the watch looks in vain before it ends: to begin one delays a call by the wake-up of its thread."""

_ROUND_COUNT: Final = 8
"""How many connections are served before the leader looks again which have a call. Looking takes a system call."""

_EVENTS_COUNT: Final = 256
"""As many as there are connections: each that has a call is seen."""

_BUSY_POLL_S: Final = 5e-4
"""Longer than a client takes from an answer to its next call if it does nothing in between."""


class SharedConnection(Protocol):
    """A connection, as the threads see it.

    Attributes:
        descriptor: Of its socket. It is readable when a call comes, or the end.
        peer_key: The peer that it counts for.
        last_turn: The number of its last turn. Only `LeaderFollowers` sets it.
    """

    descriptor: int
    peer_key: str
    last_turn: int

    def serve_alone(self) -> bool:
        """Serve calls. Return True once the next call may well be small, and False once the connection has ended."""

    def serve_next(self) -> bool:
        """Serve the call that has come. Return whether the connection is still open."""

    def note_late(self) -> None:
        """Note that the call under way lasts, though nothing had told that it would."""


class LeaderFollowers:
    """Serves direct connections, each of which brings a thread. See the module.

    Locks: one lock guards which connections are shared and which is served. Nothing else is called with it held. The
    leadership is a lock, too, which any thread may release for the leader.

    Args:
        last_caller: Tells whether one connection has all calls: then it is worth busy polling.
        watch: Calls a function in so many seconds, in another thread than those that serve. Any thread may call it.
        on_lost: Called with the name of what is lost, if an unforeseen error ends the leader.
    """

    def __init__(
        self,
        last_caller: LastCaller,
        watch: Callable[[float, Callable[[], None]], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._last_caller = last_caller
        self._watch = watch
        self._on_lost = on_lost
        self._polling = BusyPolling(_BUSY_POLL_S)
        self._events = select.epoll()
        self._ready: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._shared: dict[int, SharedConnection] = {}  # by descriptor
        self._leadership = threading.Lock()
        self._served: SharedConnection | None = None  # by the leader
        self._last_served: SharedConnection | None = None
        self._turns_count = 0
        self._watched_count = -1  # of turns, when the watch looked last
        self._quiet_count = 0
        self._is_watched = False

    def serve(self, connection: SharedConnection) -> None:
        """Serve a connection, and others in turn, until one of them ends in this thread."""
        alone: SharedConnection | None = connection
        while alone is not None and alone.serve_alone():
            self._share(alone)
            alone = self._lead()

    def hand_over(self, connection: SharedConnection) -> None:
        """Let the next thread lead, if the leader serves this connection: its call may last. Any thread may call this.

        The leader is alone with the connection from then on.
        """
        with self._lock:
            if self._served is connection:
                self._served = None
                self._unshare(connection)
                self._leadership.release()

    def forget(self, connection: SharedConnection) -> None:
        """Share a connection no more. To be called before its descriptor is closed."""
        with self._lock:
            self._unshare(connection)

    def close(self) -> None:
        """Release the descriptor. All connections must have ended."""
        self._events.close()

    def poll(self, timeout_s: float) -> bool:
        """Return whether a connection has a call within this time: for `BusyPolling`."""
        self._ready = self._events.poll(timeout_s, _EVENTS_COUNT)
        return bool(self._ready)

    def wait(self) -> None:
        """Return when a connection has a call: for `BusyPolling`."""
        self._ready = self._events.poll(None, _EVENTS_COUNT)

    def _share(self, connection: SharedConnection) -> None:
        with self._lock:
            self._shared[connection.descriptor] = connection
            self._events.register(connection.descriptor, select.EPOLLIN)
        self._begin_watch()  # the leader may be in a call that began when it had nobody to hand over to

    def _unshare(self, connection: SharedConnection) -> None:
        """Share a connection no more, if it is. Called with the lock held."""
        if self._shared.get(connection.descriptor) is connection:
            del self._shared[connection.descriptor]
            self._events.unregister(connection.descriptor)

    def _lead(self) -> SharedConnection | None:
        """Wait for the leadership, and serve calls. Return a connection to be alone with; None if one has ended."""
        self._leadership.acquire()
        while True:
            for connection in self._wait_for_calls():
                is_open = False
                connection.last_turn = self._turns_count = self._turns_count + 1
                self._served = self._last_served = connection
                if not self._is_watched and len(self._shared) > 1:
                    self._begin_watch()
                try:
                    is_open = connection.serve_next()
                finally:
                    with self._lock:
                        is_leader = self._served is connection
                        if is_leader:
                            self._served = None
                    if is_leader and not is_open:
                        self._leadership.release()
                if not is_open:
                    return None
                if not is_leader:
                    return connection

    def _wait_for_calls(self) -> Sequence[SharedConnection]:
        """Wait until connections have calls, and return those to serve next."""
        try:
            self._polling.wait(self, self._is_call_likely)
            ready = [self._shared[descriptor] for descriptor, _ in self._ready]
            return ready if len(ready) == 1 else self._in_turn(ready)
        except MemoryError:  # what ends now gives some back
            time.sleep(SHORTAGE_PAUSE_S)
            return ()
        except BaseException:
            self._leadership.release()
            self._on_lost("a thread for direct calls")
            raise

    def _is_call_likely(self) -> bool:
        """Return whether the next call is likely to come on the connection that had the last one."""
        return self._last_caller.is_sole_caller(self._last_served)

    def _in_turn(self, ready: list[SharedConnection]) -> Sequence[SharedConnection]:
        """Return the connections to serve next, of those that have a call.

        Peers come in turn, and so do a peer's connections: the one that was served longest ago is the first.
        """
        ready.sort(key=_LAST_TURN)
        counts: dict[str, int] = {}  # of connections so far, by peer
        ranks: dict[SharedConnection, int] = {}
        for connection in ready:
            ranks[connection] = counts.get(connection.peer_key, 0)
            counts[connection.peer_key] = ranks[connection] + 1
        if len(counts) > 1:
            ready.sort(key=ranks.__getitem__)
        return ready[:_ROUND_COUNT]

    def _begin_watch(self) -> None:
        """Have the leader watched, if others could go on."""
        with self._lock:
            if self._is_watched or len(self._shared) < 2:
                return
            self._is_watched = True
        self._watch(_WATCH_S, self._look)

    def _look(self) -> None:
        """Relieve the leader if it has been in one call since the last look, and look again while there are calls."""
        served, before = self._served, self._watched_count
        # In this order: a turn that begins from here on has itself watched, or is seen in the count.
        self._is_watched = False
        self._watched_count = self._turns_count
        self._quiet_count = self._quiet_count + 1 if self._watched_count == before else 0
        if self._quiet_count and served is not None:
            served.note_late()
            self.hand_over(served)
        if self._quiet_count < _QUIET_COUNT:
            self._begin_watch()


_LAST_TURN: Final = attrgetter("last_turn")
