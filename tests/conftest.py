"""Fixtures that several test modules share."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import deconvd_client
from deconvd_client.shared_memory import Borrower
from deconvd_server.device.cuda.execution import graph_cache
from deconvd_server.shared_memory import Lender
from tests.environments import ROOT, fresh_environment
from tests.lenders import start_lender
from tests.servers import GRAPHS_SOON, ServerProcess, server_process

if TYPE_CHECKING:
    from tests.certificates import Authority, CertificateFiles

_NEED_CUPY = [
    "cupy",
    "device",
    "kernel_loading",
    "kernels",
    "operator",
    "overlapped",
    "stage_timer",
]
collect_ignore = [] if find_spec("cupy") else [f"test_cuda_{name}.py" for name in _NEED_CUPY]
"""Modules that import CuPy, torch or jax at their head: for a GPU, all of them."""

collect_ignore += [f"test_cuda_{name}.py" for name in ("jax", "torch") if not find_spec(name)]


# how long an example takes says more about what else the machine does than about the code
settings.register_profile(
    "patient", settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
)
settings.load_profile("patient")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes run without coverage: traced, a server takes too long over thousands of calls at once."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have first calls over TCP wait for what is found out about the server, however slow this machine is."""
    monkeypatch.setattr("deconvd_client.server._DISCOVERY_PATIENCE_S", 10.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls give up a server that has never answered after half a second, not after five."""
    monkeypatch.setattr("deconvd_client.transports.retry_policy._FIRST_CONTACT_TIMEOUT_S", 0.5)


@pytest.fixture
def obeys_signals() -> Iterator[None]:
    """Have this process, and those that a test starts, obey signals that this one ignores, as under nohup."""
    ignored = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        is_interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="fail if a test is skipped, for want of a package, say",
    )
    parser.addoption("--image", help="the container image that tests with the marker `image` run")
    parser.addoption(
        "--runner", default="docker", help="the command that runs containers: docker or podman"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # pytest-xdist's workers report to the process that started them
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    fails = session.config.getoption("--fail-on-skip") and "skipped" in reporter.stats
    if fails and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line("")
        reporter.write_line("failed: tests were skipped, see --fail-on-skip", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on the CPU, shared by the tests that leave it as it was."""
    with server_process(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def F(server: ServerProcess) -> Iterator[deconvd_client.Connection]:
    """A connection to the shared server."""
    with deconvd_client.connect(server.target) as connection:
        yield connection


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs certificates that tests trust."""
    from tests.certificates import Authority  # trustme is not in the environments of frameworks

    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def loopback_certificate(authority: Authority) -> CertificateFiles:
    """A certificate of a server at the loopback addresses, and localhost."""
    return authority.issue("127.0.0.1", "::1", "localhost")


@pytest.fixture
def socket_directory(tmp_path: Path) -> Path:
    """A directory whose path is short enough for a Unix socket."""
    assert len(str(tmp_path)) < 90
    return tmp_path


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server on each kind of device in turn, for tests of what both must compute."""
    directory = tmp_path_factory.mktemp("server")
    with server_process(directory, device=request.param, constants=GRAPHS_SOON) as running:
        yield running


@pytest.fixture(autouse=True)
def graphs_come_soon(request: pytest.FixtureRequest) -> None:
    """Capture a card's work the second time that it comes in tests of cards, which make few calls."""
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("monkeypatch").setattr(graph_cache, "_CAPTURE_S", 0.0)


@pytest.fixture
def device_F(device_server: ServerProcess) -> Iterator[deconvd_client.Connection]:
    """A connection to a server on each kind of device in turn."""
    with deconvd_client.connect(device_server.target) as connection:
        yield connection


@pytest.fixture(scope="module")
def card_F(tmp_path_factory: pytest.TempPathFactory) -> Iterator[deconvd_client.Connection]:
    """A connection to a server on a card, for tests of a framework's arrays: calls give the same bits each time."""
    with (
        server_process(tmp_path_factory.mktemp("server"), device="cuda") as running,
        deconvd_client.connect(running.target) as connection,
        connection.using_config("cudnn_deterministic", True),
    ):
        yield connection


@pytest.fixture
def path(socket_directory: Path) -> Path:
    """Where memory is lent."""
    return socket_directory / "memory"


@pytest.fixture
def lender(path: Path) -> Iterator[Lender]:
    """A lender of shared memory that must get everything back."""
    with start_lender(path) as lender:
        yield lender


@pytest.fixture
def borrower(path: Path) -> Iterator[Borrower]:
    """A client of the lender."""
    borrower = Borrower(lambda _: str(path))
    yield borrower
    borrower.close()


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source package beside it, once for all processes that run tests."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # which all of them have
    packages = directory / "packages"
    with (directory / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not packages.exists():
            environment = fresh_environment(tmp_path_factory.mktemp("build"))
            environment.install("build")
            built = tmp_path_factory.mktemp("built")
            environment.output("python", "-m", "build", "--outdir", str(built), str(ROOT))
            built.rename(packages)
    (wheel,) = packages.glob("*.whl")
    return wheel
