"""Which workers there are: those that GetServerInfo names, as far as they have proved to be who they should."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.errors import DeconvdError, UnavailableError
from deconvd.host.forks import new_lock
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.server import Server
from deconvd_client.server_set.balancer import Balancer, Member, MemberState
from deconvd_client.workers.vain_tries import Place, VainTries

__all__ = ["WorkerMembership"]

_VERIFY_TIMEOUT_S: Final = 2.0
"""How long a worker may take to say who it is."""

_LIST_TIMEOUT_S: Final = 1.0
"""How long a worker may take to list the others. Then another one is asked."""

_LISTERS_COUNT: Final = 2
"""How many workers are asked for the list, one after the other, before the address that the caller has given."""

_LEADS_S: Final = 0.5
"""How long in all those that are to become members wait for each other. So few threads wait for workers that answer,
and all that do not answer are waited for at the same time."""

_HOME_TIMEOUT_S: Final = 1.0
"""How much longer a worker may take that is to name a home: its supervisor may hang."""

_MAX_WORKERS_COUNT: Final = 64
"""How many workers a client connects to, whatever a server says."""

_SERVING: Final = "SERVING"

_log = logging.getLogger(__name__)


class WorkerMembership:
    """Keeps the members of a balancer the workers that a server lists. Thread-safe. See `MemberSource`.

    A worker is a member once the instance answers at its address that the list has under its name. The list comes from
    a worker that has proved this, or from the address that the caller has given. What is at the other addresses may be
    somebody else's: behind a forwarded port, say.

    Args:
        entry: The server at the address that the caller has given, where any of them answers.
        open_worker: Returns a server at a target. Nothing is sent to it yet.
        find_targets: Returns where a worker may be, the best target first.
        balancer: Gets the members.
        on_change: Called when a worker is back, or fails.
        on_out: Called with a member that the list has taken out, and that is to be probed.

    Attributes:
        entry: As given.
        listed: The workers by name, as of the last list. A worker that was asked itself has exact numbers.
        entry_name: Which of them has answered at the entry when the caller last adopted an answer.
    """

    def __init__(
        self,
        entry: Member[Server],
        open_worker: Callable[[str], Server],
        find_targets: Callable[[pb.Worker], list[str]],
        balancer: Balancer[Server],
        on_change: Callable[[], None],
        on_out: Callable[[Member[Server]], None],
    ) -> None:
        self.entry: Member[Server] = entry
        self._open_worker = open_worker
        self._find_targets = find_targets
        self._balancer = balancer
        self._on_change = on_change
        self._on_out = on_out
        self._lock = new_lock()
        self._is_closed = False
        self._instances: dict[str, str] = {}  # that have proved to be there, by name
        self._vain_tries = VainTries()
        self.listed: dict[str, pb.Worker] = {}
        self.entry_name: str = ""

    @property
    def workers(self) -> list[Member[Server]]:
        """The members that are workers, also those that are OUT."""
        return [member for member in self._balancer.members if not member.is_spare]

    def ask_list(
        self, first: Iterable[Member[Server]] = (), *, wants_home: bool = False
    ) -> pb.GetServerInfoResponse:
        """Ask for the list of workers, and adopt it. Return the answer.

        Args:
            first: Whom to ask before others.
            wants_home: Whether it should name a home, too.

        Raises:
            DeconvdError: Nobody answers.
        """
        extra_s = _HOME_TIMEOUT_S if wants_home else 0.0
        serving = [m for m in self.workers if m.state is MemberState.SERVING]
        for member in islice(dict.fromkeys([*first, *serving]), _LISTERS_COUNT):
            with suppress(DeconvdError):
                deadline = Deadline(_LIST_TIMEOUT_S + extra_s)
                return self._adopt(_ask(member.server, deadline, wants_home=wants_home))
        deadline = Deadline(_VERIFY_TIMEOUT_S + extra_s)
        return self._adopt(_ask(self.entry.server, deadline, wants_home=wants_home))

    def adopt(self, info: pb.GetServerInfoResponse) -> None:
        """Adopt the list in an answer from the address that the caller has given."""
        self.entry_name = info.worker_name
        self._adopt(info)

    def join(self, name: str) -> Member[Server] | None:
        """Return the member that is the worker of a name; None if it cannot be used now."""
        known = self._balancer.find(name.encode())
        if known is not None:
            return known if known.state is MemberState.SERVING else None
        return self._open(name)

    def join_each(self, names: Sequence[str]) -> Iterator[Member[Server]]:
        """Yield the members that are the workers of some names, each as soon as it can be used.

        They are tried side by side: this ends soon after the time that one may take, however many do not answer.

        Args:
            names: Those that matter most come first: they are tried a little before the others.
        """
        answers: SimpleQueue[Member[Server] | None] = SimpleQueue()
        left_count = 0
        for name in names:
            known = self._balancer.find(name.encode())
            if known is not None:
                if known.state is MemberState.SERVING:
                    yield known
                continue
            run_in_background(partial(self._join_for, name, answers))
            left_count += 1
            with suppress(Empty):
                member = answers.get(timeout=_LEADS_S / len(names))
                left_count -= 1
                if member is not None:
                    yield member
        for _ in range(left_count):
            if (member := answers.get()) is not None:
                yield member

    def _join_for(self, name: str, answers: SimpleQueue[Member[Server] | None]) -> None:
        member: Member[Server] | None = None
        try:
            member = self.join(name)
        except Exception:  # noqa: BLE001 - whatever it is, others can be used
            _log.exception("worker %s is not used", name)
        finally:
            answers.put(member)

    @property
    def pause_s(self) -> float:
        """For how many seconds no worker that serves should be tried; 0 if one may be, or none serves."""
        return min(
            map(self._vain_tries.remaining_s, self._places(self.listed.values())), default=0.0
        )

    def count_active(self, member: Member[Server]) -> None:
        """Have `listed` say how many active connections a worker has now.

        Raises:
            DeconvdError: It does not answer.
        """
        self._check(_name_of(member), _ask(member.server, Deadline(_VERIFY_TIMEOUT_S)))

    def has_device(self, member: Member[Server], device: str) -> bool:
        """Return whether a worker computes on a device, by its id."""
        worker = self.listed.get(_name_of(member))
        return worker is not None and device in worker.devices

    def retire_all(self) -> None:
        """Have no workers: the server has none any more."""
        for member in self.workers:
            self._remove(member)

    def close(self) -> None:
        """Open no servers any more."""
        with self._lock:
            self._is_closed = True

    # as `MemberSource`

    def wait_for_names(self, deadline: Deadline) -> None:
        """Return: there is always the entry."""

    def note_failure(self) -> None:
        """Have the owner look for another home soon."""
        self._on_change()

    def probe(self, member: Member[Server], deadline: Deadline) -> str:
        """Return the health of a worker. One that was started again is a new member, and one that has ended none."""
        if member.is_spare:
            return member.server.route.health(deadline)
        name = _name_of(member)
        try:
            info = _ask(member.server, deadline)
        except UnavailableError:
            self.ask_list()  # it may have ended: then what only it had is lost
            raise
        instance = self._check(name, info)
        health = member.server.route.health(deadline)
        if (health == _SERVING) is not (member.state is MemberState.SERVING):
            if health == _SERVING and instance != self._instances[name]:
                self._remove(member)  # with all that was of the former instance
                self._open(name)
            self._on_change()
        return health

    @property
    def next_lookup_s(self) -> float:
        """Never: the owner asks for the list."""
        return math.inf

    def refresh(self) -> None:
        """Do nothing: the owner asks for the list."""

    def _adopt(self, info: pb.GetServerInfoResponse) -> pb.GetServerInfoResponse:
        """Take out the members that no longer serve. Forget those that have ended, with all that they had."""
        self.listed = {worker.name: worker for worker in info.workers[:_MAX_WORKERS_COUNT]}
        self._vain_tries.keep(self._places(self.listed.values()))
        for member in self.workers:
            name = _name_of(member)
            worker = self.listed.get(name)
            is_out = member.state is not MemberState.SERVING
            if worker is None or (is_out and worker.instance_id != self._instances.get(name)):
                self._remove(member)  # what only it had is lost: calls need not wait for it
            elif member.state is MemberState.SERVING and not self._is_as_known(worker):
                self._balancer.note_failure(
                    member, UnavailableError(f"worker {name} does not serve, or was started again")
                )
                self._on_out(member)
        return info

    def _is_as_known(self, worker: pb.Worker) -> bool:
        return worker.is_serving and worker.instance_id == self._instances.get(worker.name)

    def _open(self, name: str) -> Member[Server] | None:
        """Make a worker a member, by the first of its addresses where it proves to be the one that the list names."""
        worker = self.listed.get(name)
        if worker is None or not worker.instance_id:
            return None
        for target in self._find_targets(worker):
            place = target, worker.instance_id
            if self._vain_tries.remaining_s(place):
                continue
            server = self._open_worker(target)
            began_s = time.monotonic()
            try:
                instance = self._check(name, _ask(server, Deadline(_VERIFY_TIMEOUT_S)))
            except DeconvdError as error:
                self._vain_tries.note(place, time.monotonic() - began_s)
                _log.debug("worker %s is not used by %s: %s", name, target, error)
                run_in_background(server.close)
                continue
            self._vain_tries.forget(place)
            member = Member(name.encode(), server)
            with self._lock:
                is_wanted = not self._is_closed and self._balancer.find(member.identity) is None
                if is_wanted:
                    self._instances[name] = instance
                    self._balancer.add(member)
            if not is_wanted:
                run_in_background(server.close)
            return self._balancer.find(member.identity)
        return None

    def _places(self, workers: Iterable[pb.Worker]) -> list[Place]:
        """Return where those of some workers may be that serve."""
        return [
            (target, worker.instance_id)
            for worker in workers
            if worker.is_serving and worker.instance_id
            for target in self._find_targets(worker)
        ]

    def _check(self, name: str, info: pb.GetServerInfoResponse) -> str:
        """Return the instance that answered, if it is the worker of a name.

        Raises:
            UnavailableError: It is another server.
        """
        if not self._is_listed(name, info):
            self.ask_list()  # it may have been started again
        if not self._is_listed(name, info):
            raise UnavailableError(f"another server answers in place of worker {name}")
        for own in info.workers:
            if own.name == name:
                self.listed[name] = own
        return info.instance_id

    def _is_listed(self, name: str, info: pb.GetServerInfoResponse) -> bool:
        worker = self.listed.get(name)
        is_it = worker is not None and worker.instance_id == info.instance_id
        return is_it and info.worker_name == name

    def _remove(self, member: Member[Server]) -> None:
        self._balancer.remove(member)
        run_in_background(member.server.close)


def _ask(
    server: Server, deadline: Deadline, *, wants_home: bool = False
) -> pb.GetServerInfoResponse:
    """Ask a server at its own address, once."""
    return server.route.target_stub.get_server_info(deadline, wants_home=wants_home)


def _name_of(member: Member[Server]) -> str:
    return member.identity.decode()
