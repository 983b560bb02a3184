"""The WGAN with gradient penalty in torch learns, and learns the same by the server as by torch itself."""

from __future__ import annotations

import re

import pytest

from tests.frameworks.example_programs import run_example
from tests.servers import ServerProcess

Row = tuple[float, float, float]


def measure(*arguments: str) -> list[Row]:
    """Return the critic's loss, the penalty in it and the error of the mean image, as the program prints them."""
    printed = run_example("wgan_gp_torch", "--steps", "20", *arguments)
    rows = re.findall(
        r"loss +(-?\S+), of which penalty +(\S+); error .* (\S+)$", printed, re.MULTILINE
    )
    return [(float(critic), float(penalty), float(error)) for critic, penalty, error in rows]


def test_a_wgan_with_gradient_penalty_learns_as_with_torchs_own_layers(
    server: ServerProcess,
) -> None:
    remote = measure("--target", server.target)

    (first_loss, first_penalty, first_error), _, (last_loss, last_penalty, last_error) = remote
    assert last_loss < 0 < first_loss
    assert last_penalty < first_penalty / 10
    assert last_error < first_error
    # 80 optimizer steps apart, sums of float32 in another order
    assert remote == [pytest.approx(row, rel=1e-2, abs=1e-3) for row in measure("--local")]
