"""A few values by key, of which those used longest ago make room."""

from __future__ import annotations

from deconvd.lru import Lru


def test_what_was_used_longest_ago_makes_room() -> None:
    lru: Lru[str, int] = Lru(3)
    for number, key in enumerate("abc"):
        assert lru.put(key, number) == number

    assert lru.get("a") == 0
    lru.put("b", 7)  # put again, it is used as well
    lru.put("d", 3)

    assert [lru.get(key) for key in "abcd"] == [0, 7, None, 3]


def test_what_is_dropped_is_not_found_and_leaves_room() -> None:
    lru: Lru[str, int] = Lru(2)
    lru.put("a", 1)
    lru.put("b", 2)
    lru.drop("a")
    lru.drop("unknown")
    lru.put("c", 3)

    assert [lru.get(key) for key in "abc"] == [None, 2, 3]
    lru.clear()
    assert [lru.get(key) for key in "abc"] == [None, None, None]
