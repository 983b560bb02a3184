"""A kernel that does not end: its callers are told, and the process ends although its threads hang in CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.errors import UnavailableError
from deconvd_server.exit_codes import ExitCode
from tests.hung_device import HUNG_SAMPLES_COUNT
from tests.servers import server_process

pytestmark = pytest.mark.gpu

PRELUDE = "import tests.hung_card; tests.hung_card.install()"

W = np.ones((1, 1, 2, 2), np.float32)
HUNG = np.ones((HUNG_SAMPLES_COUNT, 1, 8, 8), np.float32)
QUICK = np.ones((1, 1, 8, 8), np.float32)


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_a_kernel_that_waits_ends_the_process_and_the_next_one_computes(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry = "deconvd_client.transports.retry_policy.RetryPolicy._pause_s"
    options = ("--device-timeout-s", "5")
    listen = ("127.0.0.1:0",)
    with (
        server_process(
            tmp_path, *options, device="cuda:0", listen=listen, prelude=PRELUDE
        ) as server,
        deconvd_client.connect(server.target, transport=transport, timeout_s=120) as F,
    ):
        y = F.deconvolution_2d(QUICK, W)  # its plan is chosen, and the connection is open
        monkeypatch.setattr(retry, lambda *_: None)
        with pytest.raises(UnavailableError, match="cuda:0 has not ended a kernel") as caught:
            F.deconvolution_2d(HUNG, W)
        code = server.process.wait(60)

    monkeypatch.undo()
    with (
        server_process(tmp_path, device="cuda:0", listen=listen) as server,
        deconvd_client.connect(server.target, timeout_s=120) as F,
    ):
        np.testing.assert_array_equal(F.deconvolution_2d(QUICK, W), y)
    assert caught.value.retry_after_s == 2.0
    assert code == ExitCode.DEVICE_HUNG
