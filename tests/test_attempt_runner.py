"""What is made again elsewhere, when, and what is not: by servers that answer as a test says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.credentials import NO_CREDENTIALS
from deconvd_client.server_set.attempt_runner import AttemptRunner
from deconvd_client.server_set.balancer import Balancer, Preference
from deconvd_client.server_set.membership import Membership
from deconvd_client.server_set.monitor import Monitor
from deconvd_client.transports.retry_policy import RetryPolicy
from tests.processes import wait_until

TARGETS = ("a:1", "b:1", "c:1")
AWAY = UnavailableError("nobody listens")


class ScriptedServer:
    """A server whose answers are errors, one for each call, and then its name."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.errors: list[DeconvdError] = []
        self.calls_count = 0
        self.probes_count = 0
        self.health_answer = "SERVING"
        self.route = self

    def serve(self) -> str:
        self.calls_count += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.target

    def health(self, deadline: Deadline) -> str:
        self.probes_count += 1
        return self.health_answer

    def close(self) -> None:
        pass


class ScriptedSet:
    """A runner of calls at three scripted servers, in the order of their names."""

    def __init__(self, *, fail_fast: bool = False) -> None:
        self.servers: list[Any] = []
        self.balancer: Balancer[Any] = Balancer()

        def open_server(target: str, **_: object) -> Any:
            self.servers.append(ScriptedServer(target))
            return self.servers[-1]

        credentials = dict.fromkeys(TARGETS, NO_CREDENTIALS)
        membership = Membership(TARGETS, credentials, open_server, open_server, self.balancer)
        self.monitor = Monitor(self.balancer, membership)
        retries = RetryPolicy(fail_fast=fail_fast)
        self.runner = AttemptRunner(
            self.balancer, membership, self.monitor, retries, retries, LedgerRecorder()
        )

    def call(self, timeout_s: float = 10.0) -> str:
        preference: Preference[Any] = Preference(holders=self.balancer.members)

        def work(server: Any, _: Deadline) -> str:
            answer: str = server.serve()
            return answer

        return self.runner.run(work, lambda: preference, 0, Deadline(timeout_s))


@pytest.fixture
def servers() -> Iterator[ScriptedSet]:
    scripted = ScriptedSet()
    yield scripted
    scripted.monitor.close()


@pytest.mark.parametrize(
    "error",
    [
        AWAY,
        UnavailableError("the server is full", retry_after_s=30.0),
        CallCancelledError("the server stops"),
        DeadlineError("it would take too long here"),
        UnimplementedError("too old"),
    ],
    ids=lambda error: str(error),
)
def test_the_next_server_serves_at_once(servers: ScriptedSet, error: DeconvdError) -> None:
    servers.servers[0].errors = [error]
    begin_s = time.monotonic()

    assert servers.call() == "b:1"
    assert time.monotonic() - begin_s < 20


@pytest.mark.parametrize(
    "error", [InvalidArgumentError("outsize"), InternalError("oops")], ids=lambda error: str(error)
)
def test_an_answer_is_raised(servers: ScriptedSet, error: DeconvdError) -> None:
    servers.servers[0].errors = [error]

    with pytest.raises(type(error), match=str(error)):
        servers.call()
    assert servers.servers[1].calls_count == 0


def test_when_all_are_full_the_soonest_is_waited_for(servers: ScriptedSet) -> None:
    for server, pause_s in zip(servers.servers, (60.0, 0.2, 60.0), strict=True):
        server.errors = [UnavailableError("full", retry_after_s=pause_s)]
    begin_s = time.monotonic()

    served = servers.call()

    assert 0.2 <= time.monotonic() - begin_s < 30
    assert served in TARGETS
    assert [server.calls_count for server in servers.servers].count(2) == 1


def test_a_call_is_not_tried_again_for_longer_than_its_deadline(servers: ScriptedSet) -> None:
    for server in servers.servers:
        server.errors = [UnavailableError("full", retry_after_s=60.0)]

    with pytest.raises(UnavailableError, match="full"):
        servers.call(timeout_s=5.0)


def test_what_no_server_can_do_is_an_error(servers: ScriptedSet) -> None:
    for server in servers.servers:
        server.errors = [UnimplementedError("too old")]

    with pytest.raises(UnimplementedError, match="too old"):
        servers.call()
    assert servers.call() == "a:1"  # and no reason to leave them alone


def test_fail_fast_asks_each_server_once() -> None:
    scripted = ScriptedSet(fail_fast=True)
    for server in scripted.servers:
        server.errors = [AWAY, AWAY]

    with pytest.raises(
        UnavailableError, match=r"no server takes the call: a:1, b:1, c:1: nobody listens$"
    ):
        scripted.call()
    assert [server.calls_count for server in scripted.servers] == [1, 1, 1]
    scripted.monitor.close()


def test_a_lost_server_is_probed_and_back(servers: ScriptedSet) -> None:
    servers.servers[0].errors = [AWAY]

    assert servers.call() == "b:1"
    wait_until(lambda: servers.call() == "a:1")
    assert servers.servers[0].probes_count >= 1


def test_a_server_that_drains_gets_no_more_calls(servers: ScriptedSet) -> None:
    drained = servers.servers[0]
    drained.errors = [UnavailableError("draining", retry_after_s=0.0)] * 1000
    drained.health_answer = "NOT_SERVING"

    assert servers.call() == "b:1"
    wait_until(lambda: drained.probes_count > 1)
    count = drained.calls_count
    for _ in range(100):
        assert servers.call() == "b:1"
    assert drained.calls_count == count


def test_a_full_server_is_not_probed_for_each_call_that_it_refuses(servers: ScriptedSet) -> None:
    full = servers.servers[0]
    full.errors = [UnavailableError("full", retry_after_s=0.0)] * 1000
    begin_s = time.monotonic()

    for _ in range(300):
        servers.call()

    wait_until(lambda: full.probes_count > 0)
    assert full.probes_count <= 2 + (time.monotonic() - begin_s) / 0.5
