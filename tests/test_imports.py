"""What each package brings into a process that imports it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import deconvd_client


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("deconvd_client", {"grpc", "numpy", "deconvd_server"}),
        (
            "deconvd_client.connection",
            {"cupy", "cudnn", "deconvd_server", "torch", "jax", "chainer"},
        ),
        ("deconvd_client.cli.__main__", {"grpc", "numpy", "deconvd_server"}),
        ("deconvd_client.cli.run", {"cupy", "cudnn", "deconvd_server"}),
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


def test_a_public_name_hides_no_module() -> None:
    # a module that is imported becomes an attribute of its package, in the place of the name
    assert not [name for name in deconvd_client.__all__ if find_spec(f"deconvd_client.{name}")]


def test_public_names_can_be_listed_before_they_are_imported() -> None:
    assert {"connect", "RemoteTensor", "__version__"} <= set(dir(deconvd_client))
