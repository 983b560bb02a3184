"""In how many processes a server serves if no option says so, and what an option must not be then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.errors import InvalidArgumentError
from deconvd_server.exit_codes import ExitCode
from deconvd_server.supervision import devices
from deconvd_server.supervision.devices import may_be_several
from deconvd_server.supervision.layout import check_layout
from deconvd_server.supervision.plans_folder import _marked_name, temporary_plans_folder
from deconvd_server.supervision.process_choice import ProcessChoice, choose_processes
from tests.processes import wait_until
from tests.servers import free_port, server_process
from tests.two_cards import DEVICE, two_cards
from tests.worker_servers import ask, own_targets, pids, wait_for_serving

X = np.ones((2, 8, 4, 4), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)

_SHARED = ("127.0.0.1:0", "unix")


def host(
    directory: Path, nodes: str = "", pci: Mapping[str, tuple[str, str]] | None = None
) -> Path:
    """Make a folder that has the files of a host: those in ``/dev``, and PCI devices of a vendor and a class."""
    (directory / "dev").mkdir()
    for node in nodes.split():
        (directory / "dev" / node).touch()
    for name, (vendor, kind) in (pci or {}).items():
        device = directory / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return directory


@pytest.mark.parametrize(
    ("device", "visible", "nodes", "is_several"),
    [
        ("cpu", None, "nvidia0 nvidia1", False),
        ("cuda:1", None, "nvidia0 nvidia1", False),
        ("cuda:0,cuda:1", None, "", True),
        ("cuda", None, "nvidia0 nvidia1 nvidiactl nvidia-uvm", True),
        ("auto", None, "nvidia0 nvidia1", True),
        ("auto", None, "nvidia3 nvidiactl nvidia-uvm nvidia-modeset", False),
        ("auto", None, "nvidiactl null", False),
        ("auto", None, "dxg", True),
        ("cuda", "", "nvidia0 nvidia1", False),
        ("cuda", "1", "nvidia0 nvidia1", False),
        ("cuda", "-1", "nvidia0 nvidia1", False),
        ("cuda", "0,1", "nvidia0 nvidia1", True),
        ("cuda", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "nvidia0 nvidia1", False),
        ("cuda", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2", "nvidia0 nvidia1", False),
        ("cuda", "GPU-8932f937,GPU-1a2b3c4d", "nvidia0 nvidia1", True),
        ("cuda", "0,1", "nvidia0", False),
    ],
)
def test_files_and_variables_tell_that_there_is_one_card_at_most(
    tmp_path: Path, device: str, visible: str | None, nodes: str, is_several: bool
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert may_be_several(device, environment, host(tmp_path, nodes)) is is_several


@pytest.mark.parametrize(("kind", "is_several"), [("0x030200", True), ("0x040300", False)])
def test_before_the_first_use_of_a_card_the_hosts_devices_count(
    tmp_path: Path, kind: str, is_several: bool
) -> None:
    devices = {
        "0000:01:00.0": ("0x10de", "0x030000"),
        "0000:02:00.0": ("0x10de", kind),  # a card, or the sound of one
        "0000:03:00.0": ("0x8086", "0x030000"),
    }

    assert may_be_several("auto", {}, host(tmp_path, "null", devices)) is is_several


def options(**given: Any) -> dict[str, Any]:
    return {
        "addresses": ("127.0.0.1:50051",),
        "device": DEVICE,
        "direct_port": 0,
        "health_port": None,
        "max_message_bytes": None,
        "metrics_port": None,
        "parent": None,
        "processes": None,
        "takes_direct_calls": True,
        "worker_port": 0,
        **given,
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"direct_port": 50052, "health_port": 50053}, "--direct-port .* --health-port has 50053"),
        ({"direct_port": 50051}, "--direct-port .* --listen has 50051, got 50051"),
        ({"direct_port": 50061, "worker_port": 50060}, "--direct-port .* --worker-port has 50061"),
        ({"worker_port": 50053, "metrics_port": 50054}, "--worker-port .* --metrics-port has"),
        ({"worker_port": 65535}, "up to 65535"),
        ({"addresses": ("unix:/tmp/" + "a" * 101,)}, r"to which \.0 can be added"),
    ],
)
def test_ports_and_paths_that_processes_cannot_have_are_refused(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        check_layout(options(**given), 2)


@pytest.mark.parametrize(
    "given",
    [
        {"direct_port": 50052, "worker_port": 50054, "health_port": 50056, "metrics_port": 0},
        {"direct_port": 50051, "takes_direct_calls": False},
        {"direct_port": 65535, "worker_port": 65535, "addresses": ("unix:/tmp/a",)},
    ],
)
def test_ports_that_no_process_needs_twice_are_not(given: dict[str, Any]) -> None:
    check_layout(options(**given), 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parent": 7}, "it serves the process that has started it"),
        ({"direct_port": 50052}, "--direct-port names one port"),
    ],
)
def test_one_process_serves_where_others_would_be_of_no_use_or_out_of_reach(
    given: dict[str, Any], said: str
) -> None:
    choice = choose_processes(options(**given))  # and nobody counts the cards, which would fail

    assert choice.places == ()
    assert choice.reason.startswith(said)


def test_why_one_process_serves_cards_that_nobody_could_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = f"import os, sys\nif {devices.__name__!r} in sys.orig_argv: os._exit(9)\n"
    (tmp_path / "sitecustomize.py").write_text(end)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    choice = choose_processes(options())

    assert choice.places == ()
    assert "the cards cannot be counted" in choice.reason
    assert "exit status 9" in choice.reason


_HANGS_WHEN_IT_HAS_ANSWERED = f"""
import os, sys, time
if {devices.__name__!r} in sys.orig_argv:
    os.write(1, b'[["cuda:0", "cuda:1"], "", ""]')
    os.close(1)
    time.sleep(3600)
"""


def test_who_has_counted_the_cards_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may hold a process that ends. While it was waited for, nobody heeded signals."""
    (tmp_path / "sitecustomize.py").write_text(_HANGS_WHEN_IT_HAS_ANSWERED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert devices.devices_of("cuda") == ["cuda:0", "cuda:1"]


_HANGS_WHERE_CARDS_ARE_COUNTED = f"""
import os, pathlib, sys, time
if {devices.__name__!r} in sys.orig_argv:
    pathlib.Path(os.environ["COUNTER"]).write_text(str(os.getpid()))
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heeded_while_cards_are_counted(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HANGS_WHERE_CARDS_ARE_COUNTED)
    counter = tmp_path / "counter"
    server = subprocess.Popen(
        [sys.executable, "-m", "deconvd_server", "--device", DEVICE, "--listen", "127.0.0.1:0"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COUNTER": str(counter)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: counter.exists() and counter.read_text() != "")
        server.send_signal(number)
        _, said = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()

    assert server.returncode == ExitCode.DRAINED
    assert f"{number.name}: ends before it has started" in said
    assert not Path("/proc", counter.read_text()).exists()


def test_no_process_but_one_is_chosen_for_one_device() -> None:
    assert choose_processes(options(device="cpu")) == ProcessChoice()
    assert choose_processes(options(device="cuda:0")) == ProcessChoice()
    assert choose_processes(options(processes=0)) == ProcessChoice()


def test_by_default_each_of_several_cards_has_a_process(socket_directory: Path) -> None:
    with server_process(
        socket_directory,
        "--direct-calls",
        *("--direct-port", "0"),
        device=DEVICE,
        listen=_SHARED,
        environment=two_cards(socket_directory),
        chooses_processes=True,
    ) as server:
        workers = wait_for_serving(server, 2)
        infos = [ask(own_targets(worker)[0]) for worker in workers]
        with deconvd_client.connect(server.target) as F:
            assert F.deconvolution_2d(X, W).shape == (2, 4, 7, 7)
        code = server.end()

    assert [[device.id for device in info.devices] for info in infos] == [["cuda:0"], ["cuda:1"]]
    assert "1 process for each of cuda:0, cuda:1 (--processes)" in server.log.read_text()
    assert code == ExitCode.DRAINED


@pytest.mark.parametrize("processes", ["0", None])
def test_one_process_serves_all_cards_if_an_option_wants_it_or_names_one_port(
    socket_directory: Path, processes: str | None
) -> None:
    own = [] if processes is None else ["--processes", processes]
    with server_process(
        socket_directory,
        *("--direct-port", str(free_port())),
        *own,
        device=DEVICE,
        listen=_SHARED,
        environment=two_cards(socket_directory),
        chooses_processes=True,
    ) as server:
        info = ask(server.target)
        assert pids(server) == []

    assert [device.id for device in info.devices] == ["cuda:0", "cuda:1"]
    said = "one process serves all 2 GPUs: --direct-port names one port"
    assert (said in server.log.read_text()) is (processes is None)


def test_the_folder_of_plans_goes_with_the_server_or_with_the_next_one_if_that_is_killed(
    socket_directory: Path,
) -> None:
    temporary = socket_directory / "tmp"
    temporary.mkdir()
    of_another = temporary / "deconvd-workers-of-another"
    of_another.mkdir()  # by somebody who happens to like the name
    environment = two_cards(socket_directory) | {"TMPDIR": str(temporary)}

    def folders() -> list[Path]:
        return [path for path in temporary.iterdir() if path != of_another]

    def run() -> Any:
        return server_process(
            socket_directory, device=DEVICE, environment=environment, chooses_processes=True
        )

    with run() as killed:
        wait_for_serving(killed)
        (left,) = folders()
        started = pids(killed)
        killed.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    assert folders() == [left]
    with run() as server:
        wait_for_serving(server)
        (own,) = folders()
        assert own != left
        assert f"{left}, of a server that was killed, is removed" in server.log.read_text()
        assert server.end() == ExitCode.DRAINED

    assert list(temporary.iterdir()) == [of_another]


_AS_NOBODY = """
import os
from deconvd_server.supervision.plans_folder import temporary_plans_folder
if not os.geteuid():
    os.seteuid(65534)
with temporary_plans_folder() as folder:
    assert folder.path.is_dir()
    print(folder.path)
os.seteuid(os.getuid())  # whose files this process writes at its end
"""


@pytest.mark.parametrize("mode", [0o777, 0o333])  # where others may look, and where they may not
def test_a_folder_that_this_user_may_not_look_into_is_no_obstacle(mode: int) -> None:
    with TemporaryDirectory() as directory:
        locked = Path(directory, _marked_name("of_another"))
        locked.mkdir()
        locked.chmod(0)
        os.chmod(directory, mode)

        ended = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY],
            env={**os.environ, "TMPDIR": directory},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        os.chmod(directory, 0o700)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert Path(ended.stdout.strip()).parent == Path(directory)
        assert list(Path(directory).iterdir()) == [locked]
        locked.chmod(0o700)


_DIES_BEFORE_IT_LOCKS = """
import fcntl, os, signal
from deconvd_server.supervision.plans_folder import temporary_plans_folder
fcntl.flock = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with temporary_plans_folder():
    pass
"""


def test_the_folder_of_a_supervisor_that_was_killed_at_once_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _DIES_BEFORE_IT_LOCKS],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_plans_folder() as own:
        assert own is not None
        assert list(tmp_path.iterdir()) == [own.path]
        assert own.path != left


def test_without_a_place_for_plans_they_are_not_shared(socket_directory: Path) -> None:
    # as on a root that is read-only, which has no /tmp to write to
    prelude = (
        "import tempfile\n"
        "def refuse(): raise FileNotFoundError('No usable temporary directory found')\n"
        "tempfile.gettempdir = refuse"
    )
    with server_process(
        socket_directory,
        device=DEVICE,
        environment=two_cards(socket_directory),
        chooses_processes=True,
        prelude=prelude,
    ) as server:
        wait_for_serving(server)

    assert "processes share no plans" in server.log.read_text()


def test_a_server_of_ones_own_is_one_process(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in two_cards(socket_directory).items():
        monkeypatch.setenv(name, value)
    with deconvd_client.local(DEVICE) as F:
        info = F.server_info()

    assert len(info.devices) == 2
    assert info.workers == ()


def test_ports_that_meet_are_a_wrong_option_where_several_processes_are_asked_for() -> None:
    command = [sys.executable, "-m", "deconvd_server", "--device", "cpu", "--processes", "2"]
    ports = ["--direct-port", "50052", "--health-port", "50053"]

    ended = subprocess.run(
        [*command, *ports], capture_output=True, text=True, timeout=60, check=False
    )

    assert ended.returncode == ExitCode.WRONG_OPTION
    assert "--health-port has 50053" in ended.stderr
