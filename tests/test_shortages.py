"""A server without memory for a moment pauses its accept loops, and goes on: it serves, and ends as it should."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from tests.processes import wait_until
from tests.servers import server_process

_SHORTAGE = """
import importlib

def run_out(module, owner, name, errors):
    owner = getattr(importlib.import_module(module), owner)
    real, left = getattr(owner, name), list(errors)

    def short(*arguments, **words):
        if left:
            error = left.pop()
            print("on purpose:", name, file=sys.stderr, flush=True)
            raise error
        return real(*arguments, **words)

    setattr(owner, name, short)

import errno, sys
"""

_PLACES = (
    ("socket", "socket", "accept"),
    ("deconvd_server.transports.direct.greeter", "Greeter", "begin"),
    ("deconvd_server.transports.direct.greeter", "Greeter", "_advance"),
    ("deconvd_server.transports.direct.server", "DirectServer", "_admit"),
    ("deconvd_server.transports.direct.server", "DirectServer", "_drop_connection"),
    ("deconvd_server.transports.direct.server", "DirectServer", "_tell_load"),
    ("deconvd_server.shared_memory.lender", "Lender", "_accept"),
    ("deconvd_server.shared_memory.lender", "Lender", "_read"),
    ("deconvd_server.shared_memory.lender", "Lender", "_deliver"),
    ("deconvd_server.shared_memory.lender", "Lender", "_drop"),
)
"""What the threads that accept connections do for one client after the other."""


@pytest.mark.parametrize("error", ["MemoryError()", "OSError(errno.ENOBUFS, 'No buffer space')"])
def test_accept_loops_go_on_after_a_shortage(error: str, tmp_path: Path) -> None:
    prelude = _SHORTAGE + "".join(f"run_out(*{place}, 2 * [{error}])\n" for place in _PLACES)
    x, W = np.ones((1, 3, 9, 9), np.float32), np.ones((3, 2, 3, 3), np.float32)

    with server_process(tmp_path, prelude=prelude) as server:
        has_met_all = False

        def call() -> bool:
            nonlocal has_met_all
            with deconvd_client.connect(server.target) as F:
                F.deconvolution_2d(x, W)
                is_direct = "no direct connection" not in repr(F)
                borrowed = F.empty((1 << 20,), np.float32) is not None
            log = server.log.read_text()
            has_met_all = all(log.count(f"on purpose: {name}") >= 2 for _, _, name in _PLACES)
            return has_met_all and is_direct and borrowed

        wait_until(call)
        assert server.end(signal.SIGTERM) == 0
        log = server.log.read_text()
    assert "no longer served" not in log
    assert "Traceback" not in log
