"""Several servers as one: each call goes to one of them, or its samples to several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import numpy as np

from deconvd.errors import DeadlineError, DeconvdError, UnavailableError
from deconvd.model.dtypes import Array, DType
from deconvd.wire.ledger import parse_ledger
from deconvd.wire.messages import WIDE_SUMS
from deconvd_client.calls.cancel_scope import CancelScope, abort_on_cancel
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.uninterrupted import BackgroundTask, PromiseTimeoutError
from deconvd_client.credentials import Credentials
from deconvd_client.residents import Call, Resident, SourceArray
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo
from deconvd_client.server_set.attempt_runner import AttemptRunner
from deconvd_client.server_set.balancer import Balancer, MemberState, Preference
from deconvd_client.server_set.call_parts import (
    CallPart,
    ResultJoiner,
    call_size_bytes,
    split_call,
    widen_sums,
)
from deconvd_client.server_set.membership import Membership
from deconvd_client.server_set.monitor import Monitor
from deconvd_client.server_set.replica import Replica
from deconvd_client.server_set.resident_places import SpreadResidents
from deconvd_client.transports.retry_policy import NoRetries, RetryPolicy

__all__ = ["ServerSet"]

_T = TypeVar("_T")

_MIN_KEY_BYTES: Final = 64 << 10
"""The least size of W for which its digest is taken. Servers remember no smaller one."""

_CLOSE_TIMEOUT_S: Final = 0.9

_SERVING: Final = "SERVING"


class ServerSet:
    """Several servers as one. It has the methods of `Server` that a connection uses. Thread-safe.

    `Membership` knows which servers there are, `Monitor` finds out how they fare, `Balancer` decides where a call
    goes, and `AttemptRunner` makes it there, or elsewhere if it fails.

    A call whose operands are all on this side is split if it is large. Its parts go to different servers, in the order
    for its W. A smaller one goes to the server that has its W, if that is large enough to be kept there. Which of a
    server's processes makes a call is the server's own business: it is a `Replica`.

    Args:
        targets: As `parse_targets` returns them.
        credentials: Those for each target.
        open_server: Returns the server at a target, to which nothing is sent yet.
        open_lane: Returns those behind a proxy that a lane leads to, likewise.
        timeout_s: How long each call may take, in seconds.
        fail_fast: Whether a call fails at once if no server can be reached.

    Attributes:
        ledgers: Say where the time of its calls went.
        residents: The tensors that its servers keep.
    """

    def __init__(
        self,
        targets: Sequence[str],
        credentials: Mapping[str, Credentials],
        open_server: Callable[..., Replica],
        open_lane: Callable[..., Replica],
        *,
        timeout_s: float,
        fail_fast: bool,
    ) -> None:
        self._timeout_s = timeout_s
        self._is_closed = False
        self.ledgers: LedgerRecorder = LedgerRecorder()
        options = {"retries": NoRetries(), "ledgers": self.ledgers}
        self._balancer: Balancer[Replica] = Balancer()
        self._membership = Membership(
            targets,
            credentials,
            partial(open_server, **options),
            partial(open_lane, **options),
            self._balancer,
        )
        self._monitor = Monitor(self._balancer, self._membership)
        self._runner = AttemptRunner(
            self._balancer,
            self._membership,
            self._monitor,
            RetryPolicy(fail_fast=fail_fast),
            RetryPolicy(fail_fast=fail_fast),
            self.ledgers,
        )
        self.residents: SpreadResidents[Replica] = SpreadResidents(
            self._balancer, self._runner, timeout_s
        )

    def execute(self, call: Call) -> dict[str, Array]:
        """See `CallExecutor`."""
        deadline = Deadline(self._timeout_s)
        if isinstance(call.results_like, np.ndarray) and not _has_residents(call):
            self._runner.wait_for_members(deadline)
            call = call.with_host_arrays()
            parts = split_call(call, len(self._balancer.configured))
            if len(parts) > 1:
                return self._execute_parts(call, parts, deadline)
        return self._run(_execute, call, deadline)

    def execute_and_keep(self, call: Call) -> dict[str, Resident]:
        """See `CallExecutor`."""
        return self._run(_execute_and_keep, call, Deadline(self._timeout_s))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array: in memory shared with a server if one on this host is known to lend some."""
        members = self._balancer.configured
        lenders = [member for member in members if member.server.is_lending] or members
        for member in lenders:
            if member.state is MemberState.SERVING:
                return member.server.empty(shape, dtype)
        return np.empty(shape, dtype)

    def info(self) -> ServerInfo:
        """Return what one of the servers says about itself: the one that has residents, if there is one."""
        return self._runner.run(
            lambda server, limit: server.info(limit),
            lambda: self.residents.home_preference,
            0,
            Deadline(self._timeout_s),
        )

    def health(self) -> str:
        """Return ``SERVING`` if at least one server serves, else what another one says.

        Each is asked for an equal part of the time, and for what those before it have left of theirs.

        Raises:
            UnavailableError, DeadlineError: None can be reached.
        """
        deadline = Deadline(self._timeout_s)
        self._membership.wait_for_names(deadline)
        members = self._balancer.configured
        health = ""
        failure: UnavailableError | DeadlineError | None = None
        for asked_count, member in enumerate(members):
            limit = deadline.with_limit(deadline.remaining_s() / (len(members) - asked_count))
            try:
                health = member.server.health(limit)
            except (UnavailableError, DeadlineError) as error:
                failure = error
            if health == _SERVING:
                break
        if failure is not None and not health:
            raise failure
        return health

    @property
    def last_ledger(self) -> dict[str, int]:
        """See `Server.last_ledger`. For a call that was split, it is that of the slowest part."""
        return parse_ledger(self.ledgers.last_text)

    def clear_last_ledger(self) -> None:
        """Forget the ledger of this thread's last call."""
        self.ledgers.forget_last()

    def lends_memory(self) -> bool:
        """Return whether all of them lend memory on this host."""
        self._membership.wait_for_names(Deadline(self._timeout_s))
        return all(member.server.lends_memory() for member in self._balancer.configured)

    def close(self) -> None:
        """Close all connections, within a second. Calls under way, and later ones, raise CallCancelledError."""
        self._is_closed = True
        self._runner.close()
        self._monitor.close()
        deadline = Deadline(_CLOSE_TIMEOUT_S)
        tasks = [BackgroundTask(member.server.close) for member in self._balancer.members]
        for task in tasks:
            task.start()
        with suppress(PromiseTimeoutError):
            for task in tasks:
                task.wait(deadline.remaining_s())

    def describe(self) -> Iterator[str]:
        """Yield in words how many servers are in use, as far as is known without asking them."""
        if self._is_closed:
            yield "closed"
        elif members := self._balancer.configured:
            count = sum(member.state is MemberState.SERVING for member in members)
            yield f"{count} of {len(members)} servers in use"

    def _run(
        self, method: Callable[[Replica, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """Make a call at the server that suits it best."""
        call, key = self._take_key(call)
        if not _has_residents(call):
            return self._run_with_key(method, call, Preference(key), deadline)
        return self._runner.run(
            lambda server, limit: method(server, self.residents.gather(call, server, limit), limit),
            lambda: self.residents.preference_for(call) or Preference(key),
            call_size_bytes(call),
            deadline,
        )

    def _run_with_key(
        self,
        method: Callable[[Replica, Call, Deadline], _T],
        call: Call,
        preference: Preference[Replica],
        deadline: Deadline,
    ) -> _T:
        return self._runner.run(
            lambda server, limit: method(server, call, limit),
            lambda: preference,
            call_size_bytes(call),
            deadline,
        )

    def _take_key(self, call: Call) -> tuple[Call, bytes]:
        """Return a call that knows the digest of its W, and that digest; an empty one if no server would keep W."""
        W = call.operands.get("w")
        if isinstance(W, Resident):
            source = W.source
        elif isinstance(W, np.ndarray):
            source = SourceArray(W)
        else:  # W is not needed, or is on a card
            source = None
        if source is None or source.array.nbytes < _MIN_KEY_BYTES:
            return call, b""
        if all(member.server.is_lending for member in self._balancer.configured):
            return call, b""  # it is copied into shared memory, which is faster than a digest
        return replace(call, sources={"w": source}), source.digest.blake3

    def _execute_parts(
        self, call: Call, parts: Sequence[CallPart], deadline: Deadline
    ) -> dict[str, Array]:
        """Make the parts of a call at the same time, and join their results."""
        call, key = self._take_key(call)
        joiner = ResultJoiner(call)
        group = CancelScope()
        limit = deadline.with_limit(deadline.remaining_s())
        limit.scope = group
        failures: list[BaseException] = []

        def execute(part: CallPart) -> str:
            try:
                part_call = replace(part.call, sources=call.sources)
                preference: Preference[Replica] = Preference(key, part.number)
                joiner.add(part, self._run_with_key(_execute_part, part_call, preference, limit))
            except BaseException as error:
                failures.append(error)  # before the others fail, since they are cancelled
                group.cancel("another part of the call has failed")
                raise
            return self.ledgers.last_text

        with abort_on_cancel(deadline.scope, group.cancel):
            try:
                tasks = [BackgroundTask(partial(copy_context().run, execute, p)) for p in parts]
                for task in tasks:
                    task.start()
                texts = [_outcome(task) for task in tasks]
            except BaseException:
                group.cancel()  # an interrupt
                raise
        if failures:
            deadline.check_cancelled()
            try:
                raise failures[0]
            finally:
                failures.clear()  # the traceback refers to this frame: a cycle, which would keep the arrays
        self.ledgers.last.text = max(texts, key=lambda text: parse_ledger(text).get("server_us", 0))
        return joiner.results()


def _execute(replica: Replica, call: Call, deadline: Deadline) -> dict[str, Array]:
    return replica.run(Server.execute, call, deadline)


def _execute_and_keep(replica: Replica, call: Call, deadline: Deadline) -> dict[str, Resident]:
    return replica.execute_and_keep(call, deadline)


def _execute_part(replica: Replica, part: Call, deadline: Deadline) -> dict[str, Array]:
    return replica.run(_execute_wide, part, deadline)


def _execute_wide(server: Server, part: Call, deadline: Deadline) -> dict[str, Array]:
    """Make a part of a call. Its sums come in the type in which they are summed, if the server can do that."""
    wide = widen_sums(part)
    if wide is not None and server.route.target_stub.has_feature(WIDE_SUMS, deadline):
        part = wide
    return server.execute(part, deadline)


def _outcome(task: BackgroundTask[str]) -> str:
    """Return the ledger of a part once it has ended; an empty one if it has failed."""
    try:
        return task.wait()
    except DeconvdError:
        return ""


def _has_residents(call: Call) -> bool:
    return any(isinstance(operand, Resident) for operand in call.operands.values())
