"""Several cards in one server."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from tests.servers import server_process

pytestmark = pytest.mark.gpu

_CALLS_COUNT = 40
_CLIENTS_COUNT = 12
"""More than one card computes at once, so that the least loaded one changes."""


@pytest.fixture(scope="module", autouse=True)
def _two_cards() -> None:
    from deconvd_server.device.cuda import devices_count  # loads CUDA

    if devices_count() < 2:
        pytest.skip("needs two cards")


def test_calls_are_spread_over_all_cards_and_are_right_on_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((8, 4, 4, 4), np.float32)
    busy: set[str] = set()
    wrong: list[float] = []

    with (
        server_process(tmp_path, device="cuda") as server,
        deconvd_client.connect(server.target) as F,
    ):

        def calls(seed: int) -> None:
            x = np.random.default_rng(seed).standard_normal((32, 8, 32 + seed, 32), np.float32)
            expected = F.deconvolution_2d(x, W, stride=2, pad=1)
            for _ in range(_CALLS_COUNT):
                y = F.deconvolution_2d(x, W, stride=2, pad=1)
                wrong.append(float(np.abs(y - expected).max()))

        clients = [threading.Thread(target=calls, args=(seed,)) for seed in range(_CLIENTS_COUNT)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            busy |= {card.id for card in F.server_info().devices if card.running_calls_count}
        plans = {
            card.id: {cache.name: cache.count for cache in card.caches}["plans"]
            for card in F.server_info().devices
        }

    assert len(wrong) == _CALLS_COUNT * _CLIENTS_COUNT
    assert max(wrong) < 1e-4
    assert {"cuda:0", "cuda:1"} <= busy
    assert all(count > 0 for count in plans.values())


@pytest.mark.parametrize("device", ["cuda:1", "cuda:1,cuda:0"])
def test_cards_are_those_that_were_asked_for(tmp_path: Path, device: str) -> None:
    x, W = np.ones((4, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)

    with (
        server_process(tmp_path, device=device) as server,
        deconvd_client.connect(server.target) as F,
    ):
        y = F.deconvolution_2d(x, W)
        ids = [card.id for card in F.server_info().devices]
        assert server.end() == 0

    assert ids == device.split(",")
    assert y[0, 0, 8, 8] == 8 * 4 * 4
