"""The client on systems that have less than Linux: what they lack is taken away, the rest is real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import server_process

_WINDOWS = """
import os, select, socket, sys
for module in ("fcntl", "grp", "pwd", "resource"):
    sys.modules[module] = None
for name in ("register_at_fork", "sysconf", "geteuid", "getuid", "sched_getaffinity", "fork"):
    delattr(os, name)
for name in ("AF_UNIX", "recv_fds", "send_fds"):
    delattr(socket, name)
for name in ("poll", "epoll"):
    delattr(select, name)
"""

_MACOS = """
import os, select
del os.sched_getaffinity, select.epoll
"""

_CALLS = """
import sys
import numpy as np
import deconvd_client

x, W = np.ones((8, 8, 128, 128), np.float32), np.ones((8, 4, 4, 4), np.float32)
with deconvd_client.connect(sys.argv[1]) as F:
    y = F.deconvolution_2d(x, W, stride=2, pad=1)
    gx, gW, gb = F.deconvolution_2d_grad(x, W, None, y, stride=2, pad=1)
    small = F.empty((1, 8, 4, 4), np.float32)
    small[...] = 1
    y, pullback = F.vjp(small, W)
    assert pullback(y).gW.shape == F.put(W).shape == gW.shape
    assert (F.deconvolution_2d(small, W) == y).all()
"""


@pytest.mark.parametrize("without", [_WINDOWS, _MACOS], ids=["Windows", "macOS"])
def test_a_client_elsewhere_does_without(tmp_path: Path, without: str) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as server:
        outcome = subprocess.run(
            [sys.executable, "-W", "error", "-c", without + _CALLS, server.target],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert outcome.returncode == 0, outcome.stderr
