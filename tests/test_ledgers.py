"""Ledgers that a block collects: one a call, in order, and those of its own thread or tasks alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest

from deconvd_client import CallLedger, Connection, InvalidArgumentError

X = np.ones((2, 3, 8, 8), np.float32)
W = np.ones((3, 2, 3, 3), np.float32)
GY = np.ones((2, 2, 10, 10), np.float32)


def test_each_call_of_a_block_has_a_ledger(F: Connection) -> None:
    F.deconvolution_2d(X, W)
    with F.ledgers() as ledgers:
        assert ledgers == []
        F.deconvolution_2d(X, W)
        F.deconvolution_2d_grad(X, W, None, GY)
        F.put(X).numpy()
    F.deconvolution_2d(X, W)

    calls = ["Deconvolve", "DeconvolveGrad", "PutTensor", "GetTensor"]
    assert [ledger.call for ledger in ledgers] == calls
    for ledger in ledgers[:2]:
        assert set(ledger.stages_ms) == {"queue", "compute"}
        assert 0 < ledger.stages_ms["compute"] <= ledger.server_ms < ledger.total_ms < 60_000


def test_the_last_ledger_is_the_last_of_the_block(F: Connection) -> None:
    with F.ledgers() as ledgers:
        F.deconvolution_2d(X, W)

    last = F.last_ledger
    assert ledgers[0].server_ms == last["server_us"] / 1000
    assert ledgers[0].stages_ms["compute"] == last["compute_us"] / 1000


def test_a_failed_call_has_no_ledger(F: Connection) -> None:
    with F.ledgers() as ledgers:
        with pytest.raises(InvalidArgumentError):
            F.deconvolution_2d(X, W[:1])

    assert ledgers == []


def test_an_outer_block_collects_what_the_inner_one_does(F: Connection) -> None:
    with F.ledgers() as outer:
        with F.ledgers() as inner:
            F.deconvolution_2d(X, W)
        F.deconvolution_2d(X, W)

    assert outer[:1] == inner
    assert len(outer) == 2


def test_threads_collect_their_own(F: Connection) -> None:
    def call(count: int) -> list[CallLedger]:
        with F.ledgers() as ledgers:
            for _ in range(count):
                F.deconvolution_2d(X, W)
        return ledgers

    with F.ledgers() as mine, ThreadPoolExecutor(3) as threads:
        assert list(map(len, threads.map(call, (3, 1, 2)))) == [3, 1, 2]
    assert mine == []


def test_tasks_collect_their_own_and_those_that_they_start(F: Connection) -> None:
    async def call(count: int) -> int:
        with F.ledgers() as ledgers:
            calls = [asyncio.to_thread(F.deconvolution_2d, X, W) for _ in range(count)]
            await asyncio.gather(*calls)
        return len(ledgers)

    async def both() -> list[int]:
        return [*await asyncio.gather(call(2), call(3))]

    assert asyncio.run(both()) == [2, 3]


def test_a_ledger_is_a_line_and_a_dictionary() -> None:
    ledger = CallLedger("Deconvolve", 2.5, 1.25, {"queue": 0.125, "compute": 1.0})

    assert str(ledger) == "Deconvolve 2.50 ms: queue 0.12, compute 1.00, server 1.25"
    assert asdict(ledger)["stages_ms"] == {"queue": 0.125, "compute": 1.0}
