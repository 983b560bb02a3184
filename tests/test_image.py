"""The image of `make test-image`, in containers: who may call, health, the end, and what is in it."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd
import deconvd_client
from deconvd.host.startup_line import address_in_startup_line
from deconvd_client import Tls, UnauthenticatedError, UnavailableError
from deconvd_server.exit_codes import ExitCode
from tests.certificates import Authority, CertificateFiles
from tests.containers import Container, Image
from tests.environments import ROOT
from tests.processes import wait_until
from tests.servers import free_port

pytestmark = pytest.mark.image

X = np.arange(16, dtype="f4").reshape(1, 1, 4, 4)
W = np.full((1, 1, 1, 1), 2, "f4")
README = (ROOT / "README.md").read_text()
SBOM = "/opt/deconvd/sbom.cdx.json"
INSTALLED = """
import json, importlib.metadata
print(json.dumps([[d.name, d.version] for d in importlib.metadata.distributions()]))
"""
PROCESSOR = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(status, usage.ru_utime + usage.ru_stime)
"""


@pytest.fixture(scope="module")
def image(pytestconfig: pytest.Config) -> Image:
    """The image that is named on pytest's command line."""
    name = pytestconfig.getoption("--image")
    assert name, "--image must name an image, as in deconvd:cpu"
    return Image(pytestconfig.getoption("--runner").split(), name)


@pytest.fixture
def keys(tmp_path: Path, loopback_certificate: CertificateFiles) -> Path:
    """A folder with a certificate and its key, in which the container's user may make files."""
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(0o777)
    for path, name in (
        (loopback_certificate.cert, "cert.pem"),
        (loopback_certificate.key, "key.pem"),
    ):
        (folder / name).write_bytes(path.read_bytes())
        (folder / name).chmod(0o644)
    return folder


def health_check(image: Image) -> list[str]:
    words: list[str] = image.configuration()["Healthcheck"]["Test"]
    assert words[0] == "CMD"
    return words[1:]


def test_without_keys_it_refuses_to_start_and_says_how_to_make_them(image: Image) -> None:
    ended = image.run()

    assert ended.returncode == ExitCode.WRONG_OPTION
    assert "other hosts can reach 0.0.0.0:50051" in ended.stderr
    assert "openssl req -x509" in ended.stderr
    assert "deconvd-server token new NAME" in ended.stderr
    assert "--insecure" in ended.stderr


def test_insecure_serves_everyone_and_is_healthy_at_a_small_price(image: Image) -> None:
    with image.serve("--insecure") as container, deconvd_client.connect(container.target) as F:
        y = F.deconvolution_2d(X, W)
        check = health_check(image)
        passed = container.run(*check)
        measured = [container.run("python", "-c", PROCESSOR, *check) for _ in range(3)]

    assert (y == 2 * X).all()
    assert (passed.returncode, passed.stdout.split()[-1]) == (0, "SERVING")
    assert {each.stdout.splitlines()[-1].split()[0] for each in measured} == {"0"}
    assert min(float(each.stdout.split()[-1]) for each in measured) < 0.1


def test_it_has_no_privilege_and_cannot_write_to_its_root(image: Image) -> None:
    with image.serve("--insecure") as container:
        user = container.run("id", "-u")
        written = container.run("touch", "/opt/deconvd/file")
        status = container.run("cat", "/proc/1/status")

    fields = dict(line.split(":\t", 1) for line in status.stdout.splitlines())
    assert user.stdout.strip() == fields["Uid"].split()[0] == "10001"
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert written.returncode != 0
    assert "Read-only file system" in written.stderr


def test_with_tls_and_tokens_only_the_right_token_gets_in(
    image: Image, keys: Path, authority: Authority
) -> None:
    made = image.run(
        *("token", "new", "alice", "--tokens", "/keys/tokens.txt"),
        options=["--volume", f"{keys}:/keys"],
    )
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    options = ("--tls-cert", "/keys/cert.pem", "--tls-key", "/keys/key.pem")
    with image.serve(*options, "--tokens", "/keys/tokens.txt", keys=keys) as container:
        tls = Tls(ca=authority.ca)
        with deconvd_client.connect(container.target, tls=tls, token=token) as F:
            y = F.deconvolution_2d(X, W)
        for wrong in (token[:-1], None):
            with (
                deconvd_client.connect(container.target, tls=tls, token=wrong) as F,
                pytest.raises(UnauthenticatedError),
            ):
                F.deconvolution_2d(X, W)
        with (
            deconvd_client.connect(container.target, tls=False, fail_fast=True) as F,
            pytest.raises(UnavailableError),
        ):
            F.deconvolution_2d(X, W)
        passed = container.run(*health_check(image))

    assert (y == 2 * X).all()
    assert passed.returncode == 0


def test_the_lines_of_the_readme_make_a_server_that_knows_its_caller(
    image: Image, keys: Path, authority: Authority
) -> None:
    section = README.partition("\n## In a container\n")[2]
    lines = re.findall(r"^    docker (run .*)", section.replace("\\\n", ""), flags=re.MULTILINE)
    make_token, serve = [line.replace("deconvd:cpu", image.name) for line in lines[:2]]
    name, port = f"deconvd-test-{uuid.uuid4()}", free_port()
    assert "-p 50051:50051 -p 50052:50052" in serve
    serve = serve.replace("-p 50052:50052", f"--name {name}").replace(
        "50051:50051", f"{port}:50051"
    )
    runner = " ".join(image.runner)

    made = subprocess.run(
        f"{runner} {make_token}",
        shell=True,
        cwd=keys.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    with (
        running(f"exec {runner} {serve}", keys.parent, image, name),
        deconvd_client.connect(
            f"127.0.0.1:{port}", tls=Tls(ca=authority.ca), token=made.stdout.strip()
        ) as F,
    ):
        y = F.deconvolution_2d(X, W)

    assert (y == 2 * X).all()


@contextmanager
def running(command: str, directory: Path, image: Image, name: str) -> Iterator[None]:
    """Run a line of a shell that serves in the container `name` for the block."""
    with subprocess.Popen(
        command, shell=True, cwd=directory, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert address_in_startup_line(process.stdout.readline()) == "0.0.0.0:50051"
            yield
        finally:
            subprocess.run([*image.runner, "rm", "--force", name], capture_output=True, check=False)


def test_sigterm_lets_a_running_call_end_and_turns_health_off(image: Image) -> None:
    with image.serve("--insecure", "--threads", "1") as container:
        with deconvd_client.connect(container.target) as F:
            call = F.submit(F.deconvolution_2d, *long_call())
            wait_until(lambda: F.server_info().devices[0].running_calls_count == 1)
            container.send_signal("TERM")
            wait_until(lambda: not is_healthy(image, container))
            assert not call.done()
            y = call.result()
        code = container.end()

    assert y.shape == (16, 256, 66, 66)
    assert code == ExitCode.DRAINED


def long_call() -> tuple[np.ndarray, np.ndarray]:
    """Return x and W that one thread needs some seconds for."""
    return np.ones((16, 256, 64, 64), "f4"), np.ones((256, 256, 3, 3), "f4")


def is_healthy(image: Image, container: Container) -> bool:
    return container.run(*health_check(image)).returncode == 0


def test_a_server_that_stands_still_is_not_healthy(image: Image) -> None:
    with image.serve("--insecure") as container:
        container.send_signal("STOP")
        failed = container.run(*health_check(image))
        container.send_signal("CONT")
        passed = container.run(*health_check(image))

    assert (failed.returncode, passed.returncode) == (1, 0)
    assert "timed out" in failed.stderr


def test_its_list_of_packages_is_what_is_installed(image: Image) -> None:
    sbom = json.loads(image.run(SBOM, options=["--entrypoint", "cat"]).stdout)
    installed = image.run("-c", INSTALLED, options=["--entrypoint", "python"]).stdout

    components = [sbom["metadata"]["component"], *sbom["components"]]
    assert sbom["bomFormat"] == "CycloneDX"
    assert sorted([each["name"], each["version"]] for each in components) == sorted(
        json.loads(installed)
    )
    assert ["deconvd", deconvd.__version__] in json.loads(installed)


def test_it_has_nothing_that_builds_or_installs(image: Image) -> None:
    script = "import importlib.util as u; print([n for n in ('pip', 'hatchling', 'cyclonedx_py') if u.find_spec(n)])"
    modules = image.run("-c", script, options=["--entrypoint", "python"])
    folders = image.run("/opt", "/src", options=["--entrypoint", "ls"])

    assert modules.stdout == "[]\n"
    assert folders.stdout.split() == ["/opt:", "deconvd"]


def test_its_labels_tell_the_version_and_the_commit(image: Image) -> None:
    labels = image.configuration()["Labels"]

    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == "deconvd"
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert labels[f"{prefix}version"] == deconvd.__version__
    assert re.fullmatch("[0-9a-f]{40}", labels[f"{prefix}revision"])
