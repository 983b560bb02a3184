"""The workers of one host as one server: each call is made by one of them, and by another one if that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeVar

import numpy as np

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    UnavailableError,
)
from deconvd.model.dtypes import Array, DType
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.uninterrupted import Promise, PromiseTimeoutError, run_in_background
from deconvd_client.residents import Call, Resident
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo
from deconvd_client.server_set.attempt_runner import AttemptRunner, Search
from deconvd_client.server_set.balancer import Balancer, Member, MemberState, Preference
from deconvd_client.server_set.call_parts import call_size_bytes
from deconvd_client.server_set.monitor import Monitor
from deconvd_client.server_set.resident_places import SpreadResidents
from deconvd_client.shared_memory.memory_kind import HOST_MEMORY
from deconvd_client.transports.retry_policy import (
    NoRetries,
    RetriedElsewhere,
    RetryPolicy,
    SingleRound,
    name_limit,
)
from deconvd_client.workers.home_keeper import HomeKeeper
from deconvd_client.workers.weak_call import weak_call
from deconvd_client.workers.worker_membership import WorkerMembership

__all__ = ["WorkerSet"]

_T = TypeVar("_T")

_SERVING: Final = MemberState.SERVING

_PLAIN_TYPES: Final = frozenset((np.ndarray,))
_HOST_TYPES: Final = frozenset((np.ndarray, Resident))

_CLOSE_TIMEOUT_S: Final = 0.9

_HEALTHY: Final = "SERVING"

_ASKED_COUNT: Final = 4
"""How many workers are asked for the health of all."""

_WORKERS_PART: Final = 0.75
"""Which part of the time they have for that. The rest is the entry's."""


class _ThreadPlace(threading.local):
    """Which of the workers a thread prefers: the home and those after it have the numbers 0, 1, 2 and so on."""

    number = 0
    is_assigned = False


class WorkerSet:
    """The workers of one host as one server. Thread-safe.

    A process with one thread that calls has all of its calls at its home, by a single `Server`. Other threads prefer
    other workers, and whoever finds its worker at work takes the one with the fewest calls from here. What is
    bound goes where it is bound to: arrays in memory that a worker lends, and residents.

    The way of a call that succeeds is short: no attempt is recorded for it, and nobody watches it. If it fails, the
    others are tried by an `AttemptRunner`, at last the entry: the address that the caller has given, which waits for a
    server as if there were no workers. As one of several servers (see `Replica`), it makes each call by such a runner:
    a worker that falls silent is left by its calls, as a server would be.

    Args:
        entry: The server at that address.
        open_worker: Returns a server at a target, whose calls are not retried.
        find_targets: As for `WorkerMembership`.
        ledgers: Those of all of them.
        timeout_s: How long each call may take, in seconds.
        fail_fast: Whether a call fails at once if no server can be reached.
        is_replica: Whether there are other servers, so that calls that fail here are made elsewhere.
        on_order: Called after `has_home` may have changed.

    Attributes:
        residents: The tensors that they keep.
    """

    def __init__(
        self,
        entry: Server,
        open_worker: Callable[..., Server],
        find_targets: Callable[[pb.Worker], list[str]],
        ledgers: LedgerRecorder,
        *,
        timeout_s: float,
        fail_fast: bool,
        is_replica: bool,
        on_order: Callable[[], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._balancer: Balancer[Server] = Balancer()
        self._entry = Member(entry.route.target_stub.target.encode(), entry, is_spare=True)
        self._balancer.add(self._entry)
        self._membership = WorkerMembership(
            self._entry,
            partial(open_worker, retries=NoRetries(), ledgers=ledgers),
            find_targets,
            self._balancer,
            weak_call(self._note_change),
            weak_call(self._note_out),
        )
        self._on_order = on_order
        self._keeper = HomeKeeper(self._membership, weak_call(self._note_order))
        self._monitor = Monitor(self._balancer, self._membership)
        policies: tuple[RetryPolicy, RetryPolicy]
        if is_replica:
            policies = (RetriedElsewhere(self._balancer.has_serving),) * 2
        else:
            # the entry waits for a server by itself, but a resident that one worker has waits for that one
            policies = (SingleRound(), RetryPolicy(fail_fast=fail_fast))
        self._runner, self._bound_runner = (
            AttemptRunner(
                self._balancer,
                self._membership,
                self._monitor,
                policy,
                RetryPolicy(fail_fast=fail_fast),
                ledgers,
            )
            for policy in policies
        )
        keeper = self._keeper
        self.residents: SpreadResidents[Server] = SpreadResidents(
            self._balancer, self._bound_runner, timeout_s, lambda: keeper.home
        )
        self._place = _ThreadPlace()
        self._numbers = count()
        self._has_refusals = False
        self._are_threads_spread = False
        # those that may lend memory to this process
        self._lenders: frozenset[Member[Server]] = frozenset()

    def begin(self, info: pb.GetServerInfoResponse) -> None:
        """Find the workers that an answer of the entry lists."""
        self._keeper.begin(info)

    def note_answer(self, info: pb.GetServerInfoResponse) -> None:
        """Look for workers again if none could be used for a long time, and the entry lists others."""
        self._keeper.rouse(info)

    @property
    def has_home(self) -> bool:
        """Whether a worker can be used. If none can, the entry has to do."""
        return self._keeper.home is not None

    def execute(self, call: Call) -> dict[str, Array]:
        """See `CallExecutor`."""
        deadline = Deadline(self._timeout_s)
        member: Member[Server] | None = None
        if not _PLAIN_TYPES.issuperset(map(type, (call.results_like, *call.operands.values()))):
            member = self._holder_for(call)
            if member is None:
                return self._run_bound(Server.execute, call, deadline)
        elif len(self._lenders) > 1:
            member = self._find_lender(call)
        keeper = self._keeper
        keeper.was_used = True
        if keeper.is_dormant:  # small calls notice each function
            keeper.wake()
        if member is None:
            order = keeper.order
            member = order[self._place.number % len(order)] if order else self._entry
            if member.quick_calls or member.state is not _SERVING or self._has_refusals:
                member = self._choose(member)
        try:
            member.quick_calls.add(deadline)
            return member.server.dispatcher.execute(call, deadline)
        except (UnavailableError, CallCancelledError, DeadlineError) as error:
            search = self._search_others(Server.execute, call, deadline, member, error)
            if search is None:
                if isinstance(error, DeadlineError) and not member.is_spare:
                    raise name_limit(error, deadline) from None
                raise
        finally:
            member.quick_calls.discard(deadline)
        return self._runner.resume(search)

    def run(
        self, method: Callable[[Server, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """See `Replica`. The worker is watched meanwhile."""
        self._note_use()
        return self._run_watched(method, call, deadline, self._place_preference)

    def execute_and_keep(self, call: Call, deadline: Deadline | None = None) -> dict[str, Resident]:
        """See `CallExecutor`.

        Args:
            deadline: When the caller must have an answer; None for the time that each call may take.
        """
        return self._run_bound(Server.execute_and_keep, call, deadline or Deadline(self._timeout_s))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array, in memory that the worker of this thread lends, if possible."""
        self._assign_place()
        if self._keeper.is_dormant:
            self._keeper.wake()
        order = self._keeper.order
        member = order[self._place.number % len(order)] if order else self._entry
        if member.state is not _SERVING:
            member = self._choose(member)
        return member.server.empty(shape, dtype)

    def info(self, deadline: Deadline | None = None) -> ServerInfo:
        """Return what the home says about itself."""
        home = self._keeper.home
        return self._runner.run(
            lambda server, limit: server.info(limit),
            lambda: self.residents.home_preference if home is None else Preference(holders=(home,)),
            0,
            deadline or Deadline(self._timeout_s),
        )

    def health(self, deadline: Deadline | None = None) -> str:
        """Return ``SERVING`` if a worker serves, else what the entry says. One that is stopped delays no other."""
        deadline = deadline or Deadline(self._timeout_s)
        limit = deadline.with_limit(_WORKERS_PART * deadline.remaining_s())
        answers: SimpleQueue[str] = SimpleQueue()
        members = self._keeper.order[:_ASKED_COUNT]
        for member in members:
            run_in_background(partial(_tell_health, member.server, limit, answers))
        with suppress(Empty):
            for _ in members:
                if (health := answers.get(timeout=limit.remaining_s())) == _HEALTHY:
                    return health
        return self._entry.server.health(deadline)

    @property
    def is_lending(self) -> bool:
        """Whether the home is known to lend memory on this host. It is not asked."""
        return (self._keeper.home or self._entry).server.is_lending

    def lends_memory(self) -> bool:
        """Return whether the home lends memory on this host."""
        return (self._keeper.home or self._entry).server.lends_memory()

    def close(self) -> None:
        """Close all connections, within a second. Calls under way, and later ones, raise CallCancelledError."""
        for runner in (self._runner, self._bound_runner):
            runner.close()
        self._monitor.close()
        self._keeper.close()
        self._membership.close()
        deadline = Deadline(_CLOSE_TIMEOUT_S)
        promises: list[Promise[None]] = []
        for member in self._balancer.members:
            promises.append(Promise())
            run_in_background(partial(_fulfil, promises[-1], member.server))
        with suppress(PromiseTimeoutError):
            for promise in promises:
                promise.wait(deadline.remaining_s())

    def describe(self) -> list[str]:
        """Return in words how many workers are in use, and how calls travel to the home."""
        order = self._keeper.order
        if not order:
            return [*self._entry.server.describe()]
        workers = self._membership.workers
        count = sum(member.state is _SERVING for member in workers)
        return [f"{count} of {len(workers)} workers in use", *order[0].server.describe()]

    def _note_change(self) -> None:
        self._keeper.note_change()

    def _note_out(self, member: Member[Server]) -> None:
        self._monitor.note_refusal(member)

    def _choose(self, preferred: Member[Server]) -> Member[Server]:
        """Return the worker with the fewest calls from here, `preferred` among equals."""
        order = self._keeper.order
        self._has_refusals = any(member.is_pausing for member in order)
        ready = [m for m in order if m.state is _SERVING and not m.is_pausing]
        if not ready:
            return self._entry
        if self._is_link_slow(ready[0]):
            return ready[0]  # the link is what is full, and W would be sent to each
        self._forget_ended()
        if preferred.running_count:
            self._assign_place()
            preferred = order[self._place.number % len(order)]
        return min(ready, key=lambda member: (member.running_count, member is not preferred))

    def _forget_ended(self) -> None:
        """Forget calls whose ends an interrupt has kept from being noted."""
        for member in self._keeper.order:
            late = [deadline for deadline in [*member.quick_calls] if not deadline.remaining_s()]
            member.quick_calls.difference_update(late)

    def _assign_place(self) -> None:
        """Give this thread a worker of its own, as far as there are enough."""
        place = self._place
        if not place.is_assigned:
            place.number, place.is_assigned = next(self._numbers), True
            if place.number:
                self._are_threads_spread = True
                self._note_lenders()

    def _note_order(self) -> None:
        self._note_lenders()
        self._on_order()

    def _note_lenders(self) -> None:
        """Remember which workers may lend memory: all that were a home, and all others once threads use them."""
        order = self._keeper.order
        used = order if self._are_threads_spread else order[:1]
        members = frozenset(self._membership.workers)
        self._lenders = (self._lenders & members).union(used)

    @staticmethod
    def _is_link_slow(member: Member[Server]) -> bool:
        stub = member.server.route.current_stub
        return stub is not None and stub.link_rate.is_slow

    def _find_lender(self, call: Call) -> Member[Server] | None:
        """Return the worker that lends the memory of most bytes of a call's operands; None if none does."""
        sizes: dict[Member[Server], int] = {}
        for array in call.operands.values():
            if isinstance(array, np.ndarray) and array.nbytes >= HOST_MEMORY.min_tensor_bytes:
                for member in self._lenders:
                    if member.server.borrower.locate(array) is not None:
                        sizes[member] = sizes.get(member, 0) + array.nbytes
        if not sizes:
            return None
        member = max(sizes, key=sizes.__getitem__)
        return member if member.state is _SERVING else None

    def _holder_for(self, call: Call) -> Member[Server] | None:
        """Return the home if it has all residents of a call whose arrays are on the host; else None."""
        home = self._keeper.home
        is_on_host = _HOST_TYPES.issuperset(map(type, (call.results_like, *call.operands.values())))
        if home is None or not is_on_host or home.state is not _SERVING:
            return None
        return home if self.residents.are_all_at(call, home) else None

    def _search_others(
        self,
        method: Callable[[Server, Call, Deadline], _T],
        call: Call,
        deadline: Deadline,
        member: Member[Server],
        error: DeconvdError,
    ) -> Search[Server, _T] | None:
        """Return a search for another server that makes a call which has failed at one; None if the error is final."""
        search = Search(
            lambda server, limit: method(server, self.residents.gather(call, server, limit), limit),
            lambda: self.residents.preference_for(call) or Preference(),
            call_size_bytes(call),
            deadline,
        )
        if member.is_spare or not self._runner.note_error(search, member, error):
            return None
        self._has_refusals = True
        return search

    def _run_bound(
        self, method: Callable[[Server, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """Make a call with residents that others have or that will be kept, or with arrays on cards."""
        self._note_use()
        return self._run_watched(method, call, deadline, self._card_preference)

    def _note_use(self) -> None:
        keeper = self._keeper
        keeper.was_used = True
        if keeper.is_dormant:
            keeper.wake()

    def _run_watched(
        self,
        method: Callable[[Server, Call, Deadline], _T],
        call: Call,
        deadline: Deadline,
        preference_without_residents: Callable[[Call], Preference[Server]],
    ) -> _T:
        """Make a call at the worker that has its residents, or else by another preference; elsewhere if that fails."""
        return self._bound_runner.run(
            lambda server, limit: method(server, self.residents.gather(call, server, limit), limit),
            lambda: self.residents.preference_for(call) or preference_without_residents(call),
            call_size_bytes(call),
            deadline,
        )

    def _place_preference(self, call: Call) -> Preference[Server]:
        """Return the preference for the worker that `execute` would choose for a call without residents."""
        tensors = (call.results_like, *call.operands.values())
        if not _HOST_TYPES.issuperset(map(type, tensors)):
            return self._card_preference(call)
        member = self._find_lender(call) if len(self._lenders) > 1 else None
        if member is None:
            order = self._keeper.order
            member = order[self._place.number % len(order)] if order else self._entry
            if member.running_count or member.state is not _SERVING or member.is_pausing:
                member = self._choose(member)
        return Preference(holders=(member,))

    def _card_preference(self, call: Call) -> Preference[Server]:
        """Return the preference for the home, or for a worker with the card that a call's arrays are on."""
        home = self._keeper.home
        members = list(self._keeper.order)
        device: Any = getattr(call.results_like, "device", None)
        card = getattr(device, "id", None)  # cupy's; numpy's own is a str
        if card is not None:
            members = [m for m in members if self._membership.has_device(m, f"cuda:{card}")]
        if home is not None and (home in members or not members):
            members = [home]
        return Preference(holders=tuple(members[:1]))


def _tell_health(server: Server, deadline: Deadline, answers: SimpleQueue[str]) -> None:
    """Ask a server for its health, and pass its answer on; an empty one if it gives none."""
    health = ""
    with suppress(DeconvdError):
        health = server.health(deadline)
    answers.put(health)


def _fulfil(promise: Promise[None], server: Server) -> None:
    """Close a server, and fulfil a promise by it."""
    try:
        server.close()
        promise.fulfil(None)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the waiting thread's
        promise.fail(error)
