"""Streams have slices of the size that the link's rate asks for, and the rate is learnt from large responses."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from benchmarks.links.namespaces import LinkUnavailableError, linked_namespace
from deconvd.wire.slice_sizes import SLICE_BYTES
from deconvd.wire.stream_parts import PendingElements, Uint8Array
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.transports.link_rate import LinkRate, MeteredSource
from deconvd_client.transports.stub import Stub
from tests.processes import wait_until
from tests.slow_links import slow_link_to_server

MIB = 1 << 20
GBIT_BYTES_PER_S = 125e6
ONE = np.ones((1, 1, 1, 1), np.float32)
SAMPLE_BYTES = 64 << 10
MAX_CALLS_COUNT = 20


def known_rate(bytes_per_s: float) -> LinkRate:
    rate = LinkRate()
    rate.add_part(MIB, MIB / bytes_per_s)
    return rate


def test_an_unknown_rate_asks_for_the_usual_slices() -> None:
    assert LinkRate().bytes_per_s is None
    assert LinkRate().slice_bytes(64 * MIB) == SLICE_BYTES


@pytest.mark.parametrize("bytes_per_s", [4e8, 3e9])
def test_a_fast_link_asks_for_the_usual_slices(bytes_per_s: float) -> None:
    assert known_rate(bytes_per_s * 1.01).slice_bytes(2 * MIB) == SLICE_BYTES


@pytest.mark.parametrize("bytes_per_s", [1e6, 12.5e6, GBIT_BYTES_PER_S])
@pytest.mark.parametrize("total_bytes", [2 * MIB, 16 * MIB, 64 * MIB, 2048 * MIB])
def test_what_the_ends_of_a_call_and_its_slices_cost_is_a_fraction_of_the_call(
    bytes_per_s: float, total_bytes: int
) -> None:
    """The first slice's operands and the last slice's results have the link for themselves."""
    slice_bytes = known_rate(bytes_per_s).slice_bytes(total_bytes)

    one_way_s = total_bytes / 2 / bytes_per_s
    ends_s = slice_bytes / bytes_per_s
    overhead_s = total_bytes / slice_bytes * 2e-4
    assert 64 << 10 <= slice_bytes <= SLICE_BYTES
    assert ends_s < 0.3 * one_way_s
    assert overhead_s < 0.5 * one_way_s


def test_rates_that_differ_a_little_ask_for_the_same_slices() -> None:
    sizes = {known_rate(bytes_per_s * 1e6).slice_bytes(16 * MIB) for bytes_per_s in range(100, 150)}

    assert sizes == {512 << 10}


def test_the_rate_is_that_of_the_slower_parts() -> None:
    rate = LinkRate()
    for bytes_per_s in (5e9, 1e8, 4e9, 3e9, 2e8, 1.2e8, 2.2e8, 5e9):
        rate.add_part(MIB, MIB / bytes_per_s)

    assert rate.bytes_per_s == pytest.approx(2e8)


def test_a_link_that_has_become_faster_is_noticed() -> None:
    rate = known_rate(1e7)
    for _ in range(15):
        rate.add_part(MIB, MIB / 1e9)

    assert rate.bytes_per_s == pytest.approx(1e9)


def test_small_parts_say_nothing_of_the_rate() -> None:
    rate = LinkRate()
    rate.add_part(MIB // 4, 1.0)

    assert rate.bytes_per_s is None


def test_a_rate_is_forgotten_if_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    rate = known_rate(1e6)
    now_s += 59.0
    assert rate.bytes_per_s == pytest.approx(1e6)

    now_s += 2.0
    assert rate.bytes_per_s is None
    rate.add_part(MIB, MIB / 1e9)
    assert rate.bytes_per_s == pytest.approx(1e9)


class Clocked:
    """Elements that arrive at a rate, with a pause before each part, on a clock of its own."""

    def __init__(self, *, is_buffered: bool, piece_bytes: int, bytes_per_s: float) -> None:
        self.is_buffered = is_buffered
        self.now_s = 0.0
        self._piece_bytes = piece_bytes
        self._bytes_per_s = bytes_per_s

    def next(self) -> Message | PendingElements | None:
        self._advance(in_head=True)
        return PendingElements(self._piece_bytes)

    def read_into(self, target: Uint8Array) -> None:
        assert len(target) == self._piece_bytes
        self._advance(in_head=False)

    def _advance(self, *, in_head: bool) -> None:
        if in_head is self.is_buffered:
            self.now_s += self._piece_bytes / self._bytes_per_s


@pytest.mark.parametrize(("is_buffered", "piece_bytes"), [(True, MIB), (False, 4 * MIB)])
def test_time_between_parts_is_not_the_links(
    is_buffered: bool, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Clocked(is_buffered=is_buffered, piece_bytes=piece_bytes, bytes_per_s=1e8)
    monkeypatch.setattr(time, "perf_counter", lambda: source.now_s)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    rate = LinkRate()
    metered = MeteredSource(source, rate, 4 * MIB, 3)

    for _ in range(3):
        source.now_s += 1.0  # the server computes
        for _ in range(4 * MIB // piece_bytes):
            metered.next()
            metered.read_into(np.empty(piece_bytes, np.uint8))

    assert rate.bytes_per_s == pytest.approx(1e8)


def test_what_the_reader_computes_is_not_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS the reader decrypts. That does not make a link seem slow, or calls would have small slices."""
    source = Clocked(is_buffered=False, piece_bytes=4 * MIB, bytes_per_s=3e8)
    monkeypatch.setattr(time, "perf_counter", lambda: source.now_s)
    monkeypatch.setattr(time, "thread_time", lambda: source.now_s / 2)
    rate = LinkRate()
    metered = MeteredSource(source, rate, 4 * MIB, 1)

    metered.next()
    metered.read_into(np.empty(4 * MIB, np.uint8))

    assert rate.bytes_per_s == pytest.approx(6e8)
    assert rate.slice_bytes(64 * MIB) == SLICE_BYTES


class Slicing:
    """What the streams of a client say of their slices.

    Attributes:
        samples_counts: The samples of a slice, of each stream.
        link_rates: The rates of the stubs that carried them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples_counts: list[int] = []
        self.link_rates: list[LinkRate] = []
        stream = Stub.stream

        def recorded(
            stub: Stub, begin: Callable[[], StreamAttempt[Any]], deadline: Deadline
        ) -> tuple[Any, str]:
            self.link_rates.append(stub.link_rate)
            return stream(stub, lambda: self._record(begin()), deadline)

        monkeypatch.setattr(Stub, "stream", recorded)

    def _record(self, attempt: StreamAttempt[Any]) -> StreamAttempt[Any]:
        first: Any = next(attempt.parts)
        self.samples_counts.append(first.header.slice_samples_count)
        return replace(attempt, parts=chain((first,), attempt.parts))


@pytest.fixture
def slicing(monkeypatch: pytest.MonkeyPatch) -> Slicing:
    return Slicing(monkeypatch)


def random_x(samples_count: int) -> Any:
    return np.random.default_rng(0).standard_normal((samples_count, 1, 128, 128), np.float32)


def test_a_link_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(LinkUnavailableError, match="run as root"), linked_namespace(1.0):
            pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with (
        pytest.raises(LinkUnavailableError, match="ip is missing: install iproute2"),
        linked_namespace(1.0),
    ):
        pass


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_slow_link_gets_smaller_slices_and_the_same_results(
    transport: str, tmp_path: Path, slicing: Slicing
) -> None:
    x = random_x(128)
    usual = SLICE_BYTES // (2 * SAMPLE_BYTES)
    with slow_link_to_server(tmp_path, transport, 1.0) as F:
        first = F.deconvolution_2d(x, ONE)
        assert slicing.samples_counts == [usual]
        for _ in range(MAX_CALLS_COUNT):
            assert F.deconvolution_2d(x, ONE).tobytes() == first.tobytes() == x.tobytes()
            if slicing.samples_counts[-1] <= usual // 4:
                break

        assert slicing.samples_counts[-1] <= usual // 4


def test_the_rate_of_a_slow_link_is_measured(tmp_path: Path, slicing: Slicing) -> None:
    """A machine that is busy with other work can seem slower than the link, so there are several clients."""
    x = random_x(128)
    rates: list[float | None] = []
    with slow_link_to_server(tmp_path, "tcp", 1.0) as F:
        while len(rates) < MAX_CALLS_COUNT:
            with pickle.loads(pickle.dumps(F)) as another:
                another.deconvolution_2d(x, ONE)
            rates.append(slicing.link_rates[-1].bytes_per_s)
            if rates[-1] is not None and GBIT_BYTES_PER_S / 2 < rates[-1] < GBIT_BYTES_PER_S * 2:
                return

    pytest.fail(f"no rate is that of the link: {rates}")


def test_a_large_message_becomes_a_stream_where_it_would_take_both_ways_in_turn(
    tmp_path: Path, slicing: Slicing
) -> None:
    """A busy machine may find the link fast at first, and messages measure nothing: so there are several clients."""
    x = random_x(30)
    with slow_link_to_server(tmp_path, "grpc", 1.0) as F:

        def are_slices_small() -> bool:
            with pickle.loads(pickle.dumps(F)) as another:
                for _ in range(2):
                    assert another.deconvolution_2d(x, ONE).tobytes() == x.tobytes()
            return slicing.samples_counts[-1] <= len(x) // 4

        wait_until(are_slices_small)


def test_deterministic_calls_have_the_same_slices_whatever_was_measured(
    tmp_path: Path, slicing: Slicing
) -> None:
    x = random_x(128)
    with slow_link_to_server(tmp_path, "tcp", 1.0) as F:
        for _ in range(MAX_CALLS_COUNT):
            F.deconvolution_2d(x, ONE)
            if slicing.samples_counts[-1] < slicing.samples_counts[0]:
                break
        assert slicing.samples_counts[-1] < slicing.samples_counts[0]
        slicing.samples_counts.clear()

        with F.using_config("cudnn_deterministic", True):
            gradients = [F.deconvolution_2d_grad(x, ONE, None, x) for _ in range(2)]

        assert slicing.samples_counts == [SLICE_BYTES // (2 * SAMPLE_BYTES)] * 2
        for first, second in zip(*gradients, strict=True):
            np.testing.assert_array_equal(first, second)
