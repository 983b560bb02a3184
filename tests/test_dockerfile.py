"""What can be told of the container images without building them. `make test-image` builds one, and tests that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_server.__main__ import main
from deconvd_server.command_options import unknown_variables
from deconvd_server.exit_codes import ExitCode
from tests.environments import ROOT
from tests.servers import ServerProcess, server_process

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
INSTALL = ROOT / "deploy/install.sh"

PROBE_S = 0.1
"""How much of a processor a health check may take."""

_STAGE = r"^FROM (?P<base>\S+) AS (?P<name>\S+)\n(?P<body>.*?)(?=^FROM |\Z)"

both_images = pytest.mark.parametrize("image", ["cpu", "cuda"])


def instructions(image: str) -> list[tuple[str, str]]:
    """Return the instructions that make an image, after those of the stages that it is based on."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    stages = {match["name"]: match for match in re.finditer(_STAGE, text, re.DOTALL | re.MULTILINE)}
    lines: list[str] = []
    while stage := stages.get(image):
        lines = stage["body"].split("\n") + lines
        image = stage["base"]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def settings(image: str, instruction: str) -> dict[str, str]:
    """Return the pairs that an image's ENV or LABEL has."""
    values = [value for name, value in instructions(image) if name == instruction]
    pairs = re.findall(r'([\w.]+)=("[^"]*"|\S+)', " ".join(values))
    return {name: value.strip('"') for name, value in pairs}


@both_images
def test_labels_tell_what_an_image_is(image: str) -> None:
    labels = settings(image, "LABEL")

    prefix = "org.opencontainers.image."
    names = ("title", "description", "licenses", "source", "version", "revision", "base.name")
    assert sorted(labels) == sorted(prefix + name for name in names)
    assert labels[f"{prefix}title"] == PROJECT["name"]
    assert labels[f"{prefix}description"] == PROJECT["description"]
    assert labels[f"{prefix}licenses"] == PROJECT["license"]
    declared = {value.partition("=")[0] for name, value in instructions(image) if name == "ARG"}
    for label, value in labels.items():
        if value.startswith("${"):
            assert value.strip("${}") in declared, label


@both_images
def test_an_image_runs_as_a_user_that_is_not_root_and_is_known_by_number(image: str) -> None:
    users = [value for name, value in instructions(image) if name == "USER"]

    assert [re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", user) is not None for user in users] == [True]


@both_images
def test_an_image_only_copies_what_other_stages_have_built(image: str) -> None:
    made = [name for name, _ in instructions(image) if name in ("RUN", "ADD", "COPY")]
    copied = [value for name, value in instructions(image) if name == "COPY"]

    assert made == ["COPY", "COPY"]
    assert all(value.startswith("--from=") for value in copied)


@both_images
def test_an_image_sets_only_variables_that_are_options(image: str) -> None:
    environment = settings(image, "ENV")

    assert {"DECONVD_LISTEN", "DECONVD_DEVICE", "DECONVD_TARGET"} <= set(environment)
    assert unknown_variables(environment, main.variables) == []
    assert environment["DECONVD_TARGET"] in environment["DECONVD_LISTEN"].split()


@both_images
@pytest.mark.usefixtures("unmeasured")
def test_the_health_check_takes_little_of_a_processor(image: str, server: ServerProcess) -> None:
    (check,) = [value for name, value in instructions(image) if name == "HEALTHCHECK"]
    command: list[str] = json.loads(check.partition(" CMD ")[2])
    command[0] = str(Path(sys.executable).with_name(command[0]))

    used_s = [processor_s(command, server.target) for _ in range(5)]

    assert min(used_s) < PROBE_S, used_s


def processor_s(command: list[str], target: str) -> float:
    """Run a health check that must succeed, and return how much of a processor it took."""
    pid = os.posix_spawn(command[0], command, {**os.environ, "DECONVD_TARGET": target})
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class ReadOnlyRoot:
    """Runs a command where only one directory can be written to, and the working directory is the root.

    Attributes:
        directory: The one; memory that has no files is there as ever.
    """

    directory: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that runs another one so, under the same process id."""
        unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && cd / && exec "$@"'
        return [*unshare, "sh", "-c", script, str(self.directory), *words]


@pytest.mark.parametrize("image", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.usefixtures("unmeasured")
def test_a_server_with_the_images_settings_needs_only_its_home_and_the_directory_of_its_socket(
    image: str, tmp_path: Path
) -> None:
    """For `cuda`, this is what can be run of its image on the host of a card, without a container."""
    root = ReadOnlyRoot(tmp_path)
    if subprocess.run(root.command(["true"]), capture_output=True, check=False).returncode:
        pytest.skip("the system gives this user no mount namespaces")
    environment = settings(image, "ENV")
    replaced = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    replaced["DECONVD_DIRECT_PORT"] = "0"
    with server_process(
        tmp_path,
        device=environment["DECONVD_DEVICE"],
        listen=("unix", "127.0.0.1:0"),
        within=root,
        environment={**environment, **replaced},
    ) as server:
        elsewhere = str(tmp_path.parent / "file")
        written = subprocess.run(
            root.command(["touch", elsewhere]), capture_output=True, check=False
        )
        with deconvd_client.connect(server.target) as F:
            y = F.deconvolution_2d(np.ones((1, 1, 2, 2), "f4"), np.ones((1, 1, 1, 1), "f4"))
        code = server.end()

    assert b"Read-only file system" in written.stderr
    assert (y.sum(), code) == (4, ExitCode.DRAINED)
    if image == "cpu":  # CUDA and CuPy keep what they compile
        assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/opt/deconvd"], "usage: "),
        (["/opt/deconvd", "server", "packages", "now"], "usage: "),
        (["/opt/deconvd", "server", "all"], "the step must be packages or deconvd, got all"),
        (["/nonexistent/deconvd", "server,cuda12"], "got cuda12"),
    ],
)
def test_the_script_that_installs_says_what_it_wants(arguments: list[str], said: str) -> None:
    ended = subprocess.run([INSTALL, *arguments], capture_output=True, text=True, check=False)

    assert ended.returncode != 0
    assert said in ended.stderr


def test_the_script_that_installs_replaces_nothing_but_environments(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()

    ended = subprocess.run(
        [INSTALL, tmp_path, "server"], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert f"{tmp_path} has files, and is no environment" in ended.stderr
    assert (tmp_path / "theirs").exists()


def test_the_readme_says_where_the_list_of_packages_is() -> None:
    folder = settings("cpu", "ENV")["PATH"].partition("/bin:")[0]
    (name,) = set(re.findall(r"/([\w.]+\.cdx\.json)", INSTALL.read_text()))

    assert f"{folder}/{name}" in README
