"""Which homes clients get that begin: in turn, by what workers have and will soon have."""

from __future__ import annotations

from collections import Counter

from deconvd_server.resources.worker_table import ConnectionLoad
from deconvd_server.supervision.home_claims import HomeClaims

NAMES = ("0", "1", "2", "3")


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
