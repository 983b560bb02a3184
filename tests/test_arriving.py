"""Operands that are still arriving: each is asked for by its own bytes, and a device is held for as long as is fair."""

from __future__ import annotations

import time

import numpy as np
import pytest

from deconvd.errors import CallCancelledError
from deconvd_server.call.context import CallContext
from deconvd_server.device import arriving as module
from deconvd_server.device.arriving import (
    ArrivalTimeoutError,
    OverlappedOperands,
    peek_tensor,
    require,
    require_all,
    wait_for,
    wait_for_all,
)
from tests.devices import make_arriving


class Receiving:
    """Operands that are received while they are waited for, some bytes each time: see `Progress`."""

    def __init__(self, step_bytes: int) -> None:
        self.step_bytes = step_bytes
        self.there_bytes = 0
        self.waits: list[tuple[int, float]] = []

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        self.waits.append((size_bytes, timeout_s))
        if timeout_s > 0:
            come_bytes = min(self.there_bytes + self.step_bytes, size_bytes)
            self.there_bytes = max(self.there_bytes, come_bytes)
        return self.there_bytes >= size_bytes


class Silent:
    """Operands of which there are some bytes, and never more."""

    def __init__(self, there_bytes: int = 0) -> None:
        self.there_bytes = there_bytes
        self.timeouts_s: list[float] = []

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        self.timeouts_s.append(timeout_s)
        if size_bytes > self.there_bytes:
            time.sleep(max(timeout_s, 0))
        return self.there_bytes >= size_bytes


W, X = np.zeros(3, np.float32), np.zeros(5, np.float32)


def test_operands_come_one_behind_the_other() -> None:
    w, x = make_arriving(Silent(W.nbytes + 4), W, X)
    assert w.has_arrived()
    assert x.wait_for(4, 0)
    assert not x.wait_for(5, 0)
    assert not x.has_arrived()
    assert peek_tensor(x) is X


def test_only_what_is_there_is_given_to_who_requires_it() -> None:
    w, x = make_arriving(Silent(W.nbytes), W, X)
    assert require(w) is W
    assert require_all({"w": w, "b": X}) == {"w": W, "b": X}
    with pytest.raises(ArrivalTimeoutError):
        require(x)
    with pytest.raises(ArrivalTimeoutError):
        require_all({"w": w, "x": x})


def test_who_waits_for_all_has_arrays_once_all_is_there() -> None:
    progress = Receiving(8)
    w, x = make_arriving(progress, W, X)
    operands = wait_for_all({"x": x, "w": w, "b": W}, CallContext())
    assert [*operands] == ["x", "w", "b"]
    assert operands["x"] is X
    assert operands["w"] is operands["b"] is W
    assert progress.there_bytes == W.nbytes + X.nbytes


def test_who_waits_for_all_waits_for_the_last_one_first() -> None:
    progress, large = Receiving(1000), np.zeros(20, np.float32)
    w, x = make_arriving(progress, W, large)
    wait_for_all({"w": w, "x": x}, CallContext())
    assert [size for size, _ in progress.waits] == [W.nbytes + large.nbytes, W.nbytes]


def test_who_waits_for_all_looks_whether_the_call_is_wanted() -> None:
    _, x = make_arriving(Silent(), W, X)
    call = CallContext()
    call.cancel()
    with pytest.raises(CallCancelledError):
        wait_for_all({"x": x}, call)


def test_following_knows_what_is_there_already() -> None:
    w, x = make_arriving(Silent(W.nbytes), W, X)
    following = OverlappedOperands([x, w, X])
    assert following.operands[0] is x
    assert following.operands[1] is W
    assert following.operands[2] is X
    assert following.is_overlapped
    assert not following.are_complete


def test_there_is_nothing_to_follow_where_all_is_there() -> None:
    there = OverlappedOperands(make_arriving(Silent(1000), W, X))
    assert there.is_overlapped
    assert there.are_complete
    never = OverlappedOperands([W, X])
    assert not never.is_overlapped
    assert never.are_complete


def test_what_comes_is_followed_piece_by_piece() -> None:
    progress = Receiving(4)
    _, x = make_arriving(progress, W, X)
    following = OverlappedOperands([x])
    progress.there_bytes = W.nbytes
    for end in (4, 8, 12):
        following.wait_for(x, end)
    assert [size_bytes for size_bytes, _ in progress.waits[1:]] == [16, 20, 24]
    assert following.waited_s > 0


def test_whether_the_call_is_wanted_is_looked_at_twice_a_second() -> None:
    progress = Receiving(8)
    (x,) = make_arriving(progress, X)
    wait_for(x, CallContext())
    assert {timeout_s for _, timeout_s in progress.waits} == {0.5}


def test_nobody_waits_beyond_the_deadline_of_its_call() -> None:
    progress = Receiving(8)
    (x,) = make_arriving(progress, X)
    wait_for(x, CallContext(timeout_s=0.4))
    assert all(0 < timeout_s <= 0.4 for _, timeout_s in progress.waits)


def test_a_device_is_held_for_five_milliseconds_and_for_what_two_gigabytes_a_second_take() -> None:
    large = np.broadcast_to(np.zeros(1, np.uint8), (1 << 40,))  # only its size counts
    progress = Receiving(1 << 40)
    (x,) = make_arriving(progress, large)
    following = OverlappedOperands([x])
    assert progress.waits == [(1 << 40, 0)]
    assert following.waited_s == 0

    began_s = time.monotonic()
    following.wait_for(x, 1)
    size_bytes, timeout_s = progress.waits[-1]
    assert size_bytes == 1
    assert timeout_s == pytest.approx(5e-3 + (1 << 40) / 2e9, rel=1e-11)
    assert 0 < following.waited_s <= time.monotonic() - began_s


def test_all_of_an_operand_is_expected_if_it_is_arriving() -> None:
    progress = Receiving(X.nbytes)
    (x,) = make_arriving(progress, X)
    following = OverlappedOperands([x, W])
    following.wait_for_all(W)
    assert following.waited_s == 0
    following.wait_for_all(x)
    assert x.has_arrived()


def test_a_device_is_held_as_long_as_a_slow_copy_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.3)
    monkeypatch.setattr(module, "_SLOWEST_BYTES_PER_S", 80)
    fair_s = 0.3 + (W.nbytes + X.nbytes) / 80
    progress = Silent(W.nbytes)
    w, x = make_arriving(progress, W, X)
    following = OverlappedOperands([x, w])
    began_s = time.monotonic()
    following.wait_for(w, W.nbytes)
    with pytest.raises(ArrivalTimeoutError):
        following.wait_for(x, X.nbytes)
    assert time.monotonic() - began_s >= fair_s
    with pytest.raises(ArrivalTimeoutError):
        following.wait_for(x, X.nbytes)
    first, second, third = progress.timeouts_s[-3:]
    assert first == pytest.approx(fair_s)
    assert third <= 0 < second <= first  # for all waits together
