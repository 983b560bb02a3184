"""The packages: built, checked, and tried in environments of their own as their users would."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

import deconvd
from tests.environments import ROOT, Environment, fresh_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

README = (ROOT / "README.md").read_text()
START = r"^    pip install (?P<what>\S+) .*\n    (?P<server>deconvd-server .*)\n"
COMMANDS = {"deconvd", "deconvd-health", "deconvd-server"}
LIST = """
import json, importlib.metadata
print(json.dumps(sorted([d.name, d.version] for d in importlib.metadata.distributions())))
"""
CALL = """
import numpy as np, deconvd_client
with deconvd_client.connect("unix:deconvd.sock") as F:
    x = np.arange(9, dtype="f4").reshape(1, 1, 3, 3)
    assert (F.deconvolution_2d(x, np.full((1, 1, 1, 1), 2, "f4")) == 2 * x).all()
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment that holds pip alone."""
    return fresh_environment(tmp_path)


def test_wheel_and_source_pass_the_indexs_checks(
    built_wheel: Path, environment: Environment
) -> None:
    environment.install("twine", "check-wheel-contents")

    said = environment.output("twine", "check", "--strict", *map(str, built_wheel.parent.iterdir()))
    contents = environment.output("check-wheel-contents", "--ignore", "W009", str(built_wheel))

    assert said.count("PASSED") == 2
    assert contents.endswith(": OK\n")


def test_the_wheel_tells_its_license_and_its_authors(built_wheel: Path) -> None:
    with ZipFile(built_wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(wheel.read(name).decode())
        license_text = wheel.read(name.replace("METADATA", "licenses/LICENSE")).decode()

    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Author"] == "The deconvd authors"
    assert metadata["Keywords"]
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier", [])
    assert "Apache License" in license_text
    assert "The deconvd authors" in license_text


def test_the_wheel_serves_and_calls_where_nothing_else_is(
    built_wheel: Path, environment: Environment
) -> None:
    environment.install(f"{built_wheel}[server]")

    served(environment, "deconvd-server --device cpu --listen unix:deconvd.sock", CALL)


def test_the_client_alone_needs_no_server_and_a_server_says_what_it_lacks(
    built_wheel: Path, environment: Environment
) -> None:
    environment.install(str(built_wheel))

    assert "Usage: deconvd " in environment.output("deconvd", "--help")
    for lacking, next_package, *options in (
        ("threadpoolctl", "threadpoolctl"),
        ("grpc_reflection", "grpcio-reflection"),
        ("prometheus_client", "", "--metrics-port", "0"),
    ):
        ended = environment.run("deconvd-server", "--device", "cpu", *options)
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"deconvd-server: {lacking} is missing. Install deconvd")
        assert "pip install '.[server]'" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        if next_package:
            environment.install(next_package)


def test_what_the_readme_shows_first_works_in_a_checkout(environment: Environment) -> None:
    commands = re.search(START, README, flags=re.MULTILINE)
    assert commands is not None
    script = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    check_out(environment.directory)

    environment.output("sh", "-c", f"pip install --quiet {commands['what']}")
    environment.output("sh", "-c", "rm -r *")  # only what is installed is left

    served(environment, commands["server"], script)


def test_what_the_container_image_is_built_of_makes_a_server_and_lists_its_packages(
    tmp_path: Path,
) -> None:
    source, folder = tmp_path / "source", tmp_path / "deconvd"
    for name in re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)

    subprocess.run(
        [source / "deploy/install.sh", folder, "server"], check=True, capture_output=True
    )

    listed = subprocess.run(
        [folder / "bin/python", "-I", "-c", LIST], check=True, capture_output=True, text=True
    )
    sbom = json.loads((folder / "sbom.cdx.json").read_text())
    components = [sbom["metadata"]["component"], *sbom["components"]]
    assert sorted([one["name"], one["version"]] for one in components) == json.loads(listed.stdout)
    assert ["deconvd", deconvd.__version__] in json.loads(listed.stdout)
    assert {path.name for path in folder.glob("bin/deconvd*")} == COMMANDS
    assert not list(folder.glob("bin/pip*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deconvd", "source"]


def check_out(directory: Path) -> None:
    """Copy all files that git has, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)


def served(environment: Environment, command: str, script: str) -> None:
    """Run a script beside a server, and see that both end well."""
    with subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=environment.directory,
        env=environment.variables,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert "listening on" in server.stdout.readline()
            environment.output("python", "-W", "error", "-c", script)
            environment.output("deconvd", "status", "--target", "unix:deconvd.sock")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
