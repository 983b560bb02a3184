"""Other packages that deconvd shares an environment with: all of them still install and work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.environments import Environment, fresh_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHAINER = "chainer==7.8.1"
COMPARISON = """
import subprocess, warnings
import numpy as np
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import chainer
    import chainer.functions
import deconvd_client

generator = np.random.default_rng(0)
x = generator.standard_normal((2, 3, 5, 6)).astype("f4")
W = generator.standard_normal((3, 4, 3, 2)).astype("f4")
options = {"stride": (2, 1), "pad": 1}
command = ["deconvd-server", "--device", "cpu", "--listen", "unix:deconvd.sock"]
with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
    try:
        server.stdout.readline()
        with deconvd_client.connect("unix:deconvd.sock") as F:
            y = F.deconvolution_2d(x, W, **options)
            for variable in (chainer.Variable(W), chainer.Parameter(W)):
                of_variable = F.deconvolution_2d(x, variable, **options)
                assert isinstance(of_variable, chainer.Variable)
                np.testing.assert_array_equal(of_variable.array, y)
    finally:
        server.terminate()
expected = chainer.functions.deconvolution_2d(x, W, **options).array
np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
print(np.__version__)
"""


@pytest.mark.parametrize("neighbour", ["tritonclient[grpc]", "tensorflow", "ray"])
def test_a_neighbour_installs_beside_it_as_it_does_alone(
    built_wheel: Path, tmp_path: Path, neighbour: str
) -> None:
    environment = fresh_environment(tmp_path, pinned=False)

    alone = would_install(environment, "--no-deps", neighbour)
    together = would_install(environment, f"{built_wheel}[server]", neighbour)

    assert "deconvd" in together
    assert together.items() >= alone.items()


def would_install(environment: Environment, *arguments: str) -> dict[str, str]:
    """Return the versions of the packages that pip would install."""
    report = environment.directory / "report.json"
    environment.output(
        "python", "-m", "pip", "install", "--dry-run", "--report", str(report), *arguments
    )
    installed = json.loads(report.read_text())["install"]
    return {one["metadata"]["name"]: one["metadata"]["version"] for one in installed}


def test_beside_chainer_the_extra_keeps_numpy_at_1_and_both_compute_the_same(
    built_wheel: Path, tmp_path: Path
) -> None:
    environment = fresh_environment(tmp_path, pinned=False)
    environment.install(
        "setuptools<81", "wheel", "numpy<2"
    )  # Chainer's setup.py needs pkg_resources
    environment.install("--no-build-isolation", CHAINER)

    environment.install(f"{built_wheel}[server,chainer]")

    assert environment.output("python", "-c", COMPARISON).startswith("1.")
