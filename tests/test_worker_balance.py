"""How the clients of a server with several processes share them: those that begin together, leave, come, are forked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deconvd_server.resources.worker_table import ConnectionLoad
from deconvd_server.supervision.home_claims import HomeClaims
from tests.processes import wait_until
from tests.worker_hosts import (
    WorkerHost,
    homes_of_children,
    running_client_processes,
    running_host,
)

NAMES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerHost]:
    directory = tmp_path_factory.mktemp("host")
    with running_host(directory, count=4, listen=("unix", "127.0.0.1:0")) as host:
        yield host


def counts(homes: list[str]) -> list[int]:
    """Return how many clients keep to each worker."""
    found = Counter(homes)
    return [found[name] for name in NAMES]


@pytest.mark.parametrize("number", [0, 1], ids=["unix", "tcp"])
def test_clients_that_begin_together_are_balanced_at_once(host: WorkerHost, number: int) -> None:
    with running_client_processes(host.server.targets[number], 4) as clients:
        assert counts(clients.begin(4)) == [4, 4, 4, 4]


def test_clients_that_begin_take_the_places_of_those_that_have_left(host: WorkerHost) -> None:
    with running_client_processes(host.server.target, 2) as clients:
        assert counts(clients.begin(6)) == [3, 3, 3, 3]
        clients.leave("0", "2")
        wait_until(lambda: host.told_counts() == {(0, 3, 0, 3)})
        assert counts(clients.begin(3)) == [3, 3, 3, 3]


def test_processes_that_are_forked_in_one_moment_are_balanced(host: WorkerHost) -> None:
    found = counts(homes_of_children(host.server.target, 7))

    assert found == [2, 2, 2, 2]


def test_where_the_server_names_no_home_clients_find_their_balance(tmp_path: Path) -> None:
    constants = {"deconvd_server.supervision.home_claims:_MOST_CLAIMS_COUNT": 0}
    with (
        running_host(tmp_path, constants=constants) as host,
        running_client_processes(host.server.target, 1) as clients,
    ):
        clients.begin(6)
        wait_until(lambda: counts(clients.homes()) == [3, 3, 0, 0], timeout_s=120, pause_s=0.3)


def claims(count: int, devices: str) -> tuple[HomeClaims, dict[str, str]]:
    """Return claims after so many, on workers with some devices that have told of no connection."""
    homes, places = HomeClaims(), dict(zip(NAMES, devices, strict=False))
    for _ in range(count):
        homes.claim(places, 0.0)
    return homes, places


def claimed(homes: HomeClaims, places: dict[str, str], count: int, now_s: float = 0.0) -> list[str]:
    return [homes.claim(places, now_s) for _ in range(count)]


def test_homes_are_claimed_in_turn_on_the_devices_first() -> None:
    homes, places = claims(0, "aabb")

    assert claimed(homes, places, 8) == ["0", "2", "1", "3", "0", "2", "1", "3"]


def test_a_claim_counts_until_its_connection_has_begun() -> None:
    homes, places = claims(2, "aa")  # one each
    homes.note_load("0", ConnectionLoad(1, 1))
    assert claimed(homes, places, 2) == ["0", "1"]
    homes.note_load("0", ConnectionLoad(0, 2))  # both have come, and one has gone
    homes.note_load("1", ConnectionLoad(2, 2))

    assert claimed(homes, places, 2) == ["0", "0"]


def test_a_claim_whose_connection_never_comes_counts_for_ten_seconds() -> None:
    homes, places = claims(0, "aa")
    homes.note_load("0", ConnectionLoad(2, 2))
    assert claimed(homes, places, 2, now_s=5.0) == ["1", "1"]

    assert claimed(homes, places, 1, now_s=14.9) == ["0"]
    assert claimed(homes, places, 2, now_s=15.1) == ["1", "1"]


def test_of_workers_that_are_alike_the_one_is_next_whose_turn_was_longest_ago() -> None:
    homes, places = claims(0, "aaa")
    for begun_count in range(1, 5):
        (name,) = claimed(homes, places, 1)
        homes.note_load(name, ConnectionLoad(0, begun_count))  # a client that has come and gone

        assert name == str((begun_count - 1) % 3)


def test_a_worker_whose_process_has_ended_has_no_claims_and_gets_none() -> None:
    homes, places = claims(6, "aaa")
    homes.forget("1")
    without = {name: device for name, device in places.items() if name != "1"}

    assert claimed(homes, without, 2) == ["0", "2"]
    assert claimed(homes, places, 3) == ["1", "1", "1"]


def test_claims_without_end_are_refused_and_so_are_those_where_nobody_serves() -> None:
    homes, places = claims(0, "aaaa")

    assert claimed(homes, {}, 1) == [""]
    names = claimed(homes, places, 2000)
    assert Counter(names) == dict.fromkeys(NAMES, 256) | {"": 976}
    assert claimed(homes, places, 1, now_s=20.0) != [""]
