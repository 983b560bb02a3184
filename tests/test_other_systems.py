"""The client on systems that have less than Linux: what they lack is taken away, the rest is real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.elsewhere import LACKING
from tests.environments import ROOT
from tests.servers import server_process

_CALLS = """
import sys
import tests.elsewhere
tests.elsewhere.pretend(sys.argv[1])
import numpy as np
import deconvd_client

x, W = np.ones((8, 8, 128, 128), np.float32), np.ones((8, 4, 4, 4), np.float32)
with deconvd_client.connect(sys.argv[2]) as F:
    y = F.deconvolution_2d(x, W, stride=2, pad=1)
    gx, gW, gb = F.deconvolution_2d_grad(x, W, None, y, stride=2, pad=1)
    small = F.empty((1, 8, 4, 4), np.float32)
    small[...] = 1
    y, pullback = F.vjp(small, W)
    assert pullback(y).gW.shape == F.put(W).shape == gW.shape
    assert (F.deconvolution_2d(small, W) == y).all()
"""


@pytest.mark.parametrize("system", LACKING)
def test_a_client_elsewhere_does_without(tmp_path: Path, system: str) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as server:
        outcome = run("-c", _CALLS, system, server.target)

    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.usefixtures("unmeasured")
def test_the_tests_that_need_no_server_pass_elsewhere() -> None:
    outcome = run("-m", "tests.elsewhere", "--as", "windows", "-q")

    assert outcome.returncode == 0, outcome.stdout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
