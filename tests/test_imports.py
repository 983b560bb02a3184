"""What each package brings into a process that imports it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("deconvd_client", {"cupy", "cudnn", "deconvd_server", "torch", "jax", "chainer"}),
        ("deconvd_client.cli", {"cupy", "cudnn", "deconvd_server"}),
        ("deconvd_server.__main__", {"cupy", "cudnn", "deconvd_client"}),
        ("deconvd_server.device", {"grpc", "cupy", "cudnn"}),
        ("deconvd_server.transports.direct.server", {"grpc", "cupy", "cudnn"}),
        ("deconvd_server.service.deconvolution", {"grpc", "cupy", "cudnn"}),
        ("deconvd.model.problem", {"grpc", "google.protobuf", "deconvd_client", "deconvd_server"}),
    ],
)
def test_a_package_imports_no_more_than_it_needs(package: str, forbidden: set[str]) -> None:
    script = f"import sys, {package}; print(*sys.modules)"

    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )

    imported = set(outcome.stdout.split())
    assert package in imported
    assert not imported & forbidden
