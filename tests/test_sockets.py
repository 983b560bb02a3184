"""The Unix sockets of a real server: each is equal, stays, opens to whom it is for, and is nobody's to take hostage."""

from __future__ import annotations

import asyncio
import fcntl
import grp
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection
from tests.direct_calls import get_server_info
from tests.lenders import is_in_shared_memory
from tests.processes import wait_until
from tests.servers import ServerProcess, call_until_served, only_server, server_process

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)
LARGE = np.ones((4, 2, 64, 64), np.float32)
STRANGER, FRIEND, GROUP = 54321, 12345, 23456

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may read, and nobody else may change."""
    with tempfile.TemporaryDirectory(prefix="sockets-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def has_all(F: Connection) -> bool:
    """Return whether a connection has direct calls and shared memory."""
    wait_until(
        lambda: (
            F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
            and only_server(F).route.target_stub.is_direct
        )
    )
    direct = only_server(F).route.target_stub.direct
    assert direct is not None
    wait_until(lambda: bool(F.deconvolution_2d(X, W).size and direct._idle))
    return is_in_shared_memory(F.deconvolution_2d(LARGE, W))


def sockets_of(server: ServerProcess) -> set[str]:
    """Return the paths at which a server has bound sockets, as the kernel tells them."""
    inodes = set()
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
        except FileNotFoundError:
            continue
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[7] for row in rows if len(row) > 7 and row[6] in inodes}


@contextmanager
def forwarding(path: Path, to: Path) -> Iterator[str]:
    """Run a proxy at one Unix socket before another for the block, and give its target."""
    loop = asyncio.new_event_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(to)
        try:
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
        finally:
            writer.close()
            back.close()

    async def serve() -> None:
        async with await asyncio.start_unix_server(forward, path):
            begun.set()
            await ended.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed is let go in the next round

    begun, ended = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert begun.wait(30)
        yield f"unix:{path}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


class TestEach:
    """Shared memory and direct calls are had by every Unix socket."""

    def test_two_unix_sockets_are_equal(self, socket_directory: Path) -> None:
        listen = tuple(f"unix:{socket_directory}/{name}.sock" for name in "ab")
        with server_process(socket_directory, listen=listen) as server:
            for target in server.targets:
                with deconvd_client.connect(target) as F:
                    assert has_all(F)

    def test_sockets_of_one_name_in_two_directories_are_equal(self, socket_directory: Path) -> None:
        for name in "ab":
            (socket_directory / name).mkdir()
        listen = tuple(f"unix:{socket_directory}/{name}/deconvd.sock" for name in "ab")
        with server_process(socket_directory, listen=listen) as server:
            for target in server.targets:
                with deconvd_client.connect(target) as F:
                    assert has_all(F)

    @pytest.mark.parametrize("length", [100, 101, 104, 107])
    def test_a_path_may_be_as_long_as_a_socket_may_have(
        self, socket_directory: Path, length: int
    ) -> None:
        path = f"{socket_directory}/".ljust(length, "x")
        with server_process(socket_directory, listen=(f"unix:{path}",)) as server:
            with deconvd_client.connect(server.target) as F:
                assert has_all(F)

    def test_a_name_too_short_for_others_beside_it_has_them_elsewhere(
        self, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_directory))
        deep = Path(f"{socket_directory}/".ljust(105, "d"))
        deep.mkdir()
        with server_process(socket_directory, listen=(f"unix:{deep}/s",)) as server:
            with deconvd_client.connect(server.target) as F:
                assert has_all(F)
            assert server.end() == 0
        assert sorted(os.listdir(socket_directory)) == [deep.name, "server.log"]

    @pytest.mark.parametrize("of", ["the socket", "its directory"])
    def test_a_link_does_as_well(self, socket_directory: Path, of: str) -> None:
        real, link = socket_directory / "real", socket_directory / "link"
        real.mkdir()
        with server_process(socket_directory, listen=(f"unix:{real}/deconvd.sock",)):
            link.symlink_to(real if of == "its directory" else real / "deconvd.sock")
            path = link / "deconvd.sock" if of == "its directory" else link
            with deconvd_client.connect(f"unix:{path}") as F:
                assert has_all(F)

    def test_the_directory_may_have_another_path_for_the_client(
        self, socket_directory: Path
    ) -> None:
        ours, theirs = socket_directory / "ours", socket_directory / "theirs"
        ours.mkdir()
        with server_process(socket_directory, listen=(f"unix:{ours}/deconvd.sock",)):
            ours.rename(theirs)  # as a volume that is mounted elsewhere
            with deconvd_client.connect(f"unix:{theirs}/deconvd.sock") as F:
                assert has_all(F)

    def test_without_either_all_goes_by_grpc(self, socket_directory: Path) -> None:
        options = ("--no-direct-calls", "--shared-memory-bytes", "0")
        with server_process(socket_directory, *options) as server:
            sides = get_server_info(server).side_sockets
            with deconvd_client.connect(server.target) as F:
                assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
                assert not is_in_shared_memory(F.deconvolution_2d(LARGE, W))
        assert [(side.calls, side.memory) for side in sides] == [("", "")]

    def test_who_calls_a_proxy_is_not_misled_to_another_server_beside_it(
        self, socket_directory: Path
    ) -> None:
        here, there = socket_directory / "here", socket_directory / "there"
        here.mkdir()
        there.mkdir()
        listen = (f"unix:{there}/deconvd.sock",)
        with (
            server_process(there, "--log-level", "debug", listen=listen) as meant,
            server_process(here, "--log-level", "debug") as other,
        ):
            # a proxy, beside the sockets of another server of the same names
            with (
                forwarding(here / "proxy.sock", there / "deconvd.sock") as proxy,
                deconvd_client.connect(proxy) as F,
            ):
                for _ in range(3):
                    assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
                    F.deconvolution_2d(LARGE, W)
                assert "Deconvolve from unix:" in meant.log.read_text()
        assert "Deconvolve" not in other.log.read_text()
        assert "borrow" not in other.log.read_text()


class TestStaying:
    """Programs that clear up directories see that the sockets are alive."""

    @pytest.mark.parametrize("listen", [("unix",), ("127.0.0.1:0",), ("unix", "127.0.0.1:0")])
    def test_the_kernel_knows_every_socket_by_its_path(
        self, socket_directory: Path, monkeypatch: pytest.MonkeyPatch, listen: tuple[str, ...]
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_directory))
        with server_process(socket_directory, listen=listen) as server:
            files = {str(path) for path in socket_directory.rglob("*") if path.is_socket()}
            assert len(files) == (3 if "unix" in listen else 1)
            assert files == sockets_of(server)

    def test_so_it_does_where_the_path_is_relative_or_goes_by_a_link(
        self, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = socket_directory.resolve() / "real"
        directory.mkdir()
        (socket_directory / "link").symlink_to(directory)
        monkeypatch.chdir(directory)
        listen = ("unix:a.sock", f"unix:{socket_directory}/link/b.sock")
        with server_process(socket_directory, listen=listen) as server:
            files = {str(path) for path in directory.iterdir()}
            assert len(files) == 6
            assert files == sockets_of(server)
            assert server.targets == list(listen)
            with deconvd_client.connect("unix:a.sock") as F:
                assert has_all(F)

    def test_those_that_someone_removes_are_made_anew_and_say_so(
        self, socket_directory: Path
    ) -> None:
        with server_process(socket_directory, "--socket-mode", "0640") as server:
            sides = [
                Path(f"{server.target.removeprefix('unix:')}.{x}") for x in ("calls", "memory")
            ]
            with deconvd_client.connect(server.target) as before:
                assert has_all(before)
                for side in sides:
                    side.unlink()
                wait_until(lambda: all(side.is_socket() for side in sides))
                assert {side.stat().st_mode & 0o777 for side in sides} == {0o640}
                with deconvd_client.connect(server.target) as after:
                    assert has_all(after)
                assert has_all(before)
            assert server.log.read_text().count("was removed, and has been made again") == 2
            assert server.end() == 0
        assert os.listdir(socket_directory) == ["server.log"]

    def test_a_client_finds_those_of_a_successor(self, socket_directory: Path) -> None:
        with server_process(socket_directory) as killed:
            F = deconvd_client.connect(killed.target, timeout_s=20)
            assert has_all(F)
            killed.end(signal.SIGKILL)
        with F, server_process(socket_directory):
            call_until_served(F, X, W)
            assert has_all(F)

    def test_a_killed_servers_sockets_are_replaced_and_a_drained_ones_are_gone(
        self, socket_directory: Path
    ) -> None:
        for number in (signal.SIGKILL, signal.SIGTERM):
            with server_process(socket_directory) as server:
                with deconvd_client.connect(server.target) as F:
                    assert has_all(F)
                server.end(number)
        assert os.listdir(socket_directory) == ["server.log"]


TRY_ALL = """
import os, sys
import numpy as np
import deconvd_client
from deconvd_client.shared_memory import Borrower
deconvd_client.connect  # imports the modules, which the other user may not read
target, user, group = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([])
os.setgid(group)
os.setuid(user)
x, W = np.ones((4, 2, 64, 64), np.float32), np.ones((2, 2, 2, 2), np.float32)
with deconvd_client.connect(target, timeout_s=20, fail_fast=True) as F:
    try:
        there = F.put(W)
        y, pullback = F.vjp(x, there)
        pullback(y)
        F.remote.deconvolution_2d(x, there).numpy()
        S = F._server.entry; print(F.health(), S.route.target_stub.is_direct, S.borrower.borrowed_bytes > 0)
    except deconvd_client.UnavailableError as error:
        print("refused", error)
"""


def tried_by(target: str, user: int, group: int = 65534) -> str:
    """Return what comes of all kinds of calls that another user makes."""
    return subprocess.run(
        [sys.executable, "-c", TRY_ALL, target, str(user), str(group)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=True,
    ).stdout.strip()


@needs_root
class TestUsers:
    """The sockets open to whom they are for."""

    @pytest.mark.parametrize(
        ("options", "user", "group", "expected"),
        [
            ((), STRANGER, STRANGER, "refused"),
            (("--shared-memory-users", f"{FRIEND}"), FRIEND, FRIEND, "SERVING True True"),
            (("--shared-memory-users", f"{FRIEND}"), STRANGER, FRIEND, "SERVING True False"),
            (("--socket-mode", "0666"), STRANGER, STRANGER, "SERVING True False"),
            (("--socket-mode", "0600"), STRANGER, STRANGER, "refused"),
            (("--socket-group", f"{GROUP}"), STRANGER, GROUP, "SERVING True False"),
            (("--socket-group", f"{GROUP}"), STRANGER, STRANGER, "refused"),
            (
                ("--socket-group", f"{GROUP}", "--shared-memory-users", f"{FRIEND}"),
                FRIEND,
                GROUP,
                "SERVING True True",
            ),
            (
                ("--socket-mode", "600", "--shared-memory-users", f"{FRIEND}"),
                FRIEND,
                FRIEND,
                "refused",
            ),
        ],
    )
    def test_who_may_open_one_may_open_all(
        self, open_directory: Path, options: tuple[str, ...], user: int, group: int, expected: str
    ) -> None:
        with server_process(open_directory, *options) as server:
            assert tried_by(server.target, user, group).startswith(expected)

    def test_mode_and_group_are_those_of_every_socket(
        self, open_directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DECONVD_SOCKET_MODE", "0620")
        monkeypatch.setenv("DECONVD_SOCKET_GROUP", grp.getgrgid(1).gr_name)
        with server_process(open_directory):
            found = [path.stat() for path in open_directory.iterdir() if path.is_socket()]
        assert [(each.st_mode & 0o777, each.st_gid) for each in found] == 3 * [(0o620, 1)]

    def test_a_group_that_a_user_is_not_in_is_said(self, open_directory: Path) -> None:
        (open_directory / "run").mkdir()
        os.chown(open_directory / "run", STRANGER, STRANGER)
        result = ended_server(
            f"unix:{open_directory}/run/s", "--socket-group", f"{GROUP}", user=STRANGER
        )
        assert result.returncode == 1
        assert f"cannot be given to group {GROUP}: this user is not a member of it" in result.stderr
        assert os.listdir(open_directory / "run") == []

    def test_a_directory_that_may_not_be_written_is_said(self, open_directory: Path) -> None:
        result = ended_server(f"unix:{open_directory}/s", user=STRANGER)

        assert result.returncode == 1
        assert "cannot listen there: Permission denied" in result.stderr

    @pytest.mark.skipif(
        int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) < 2,
        reason="here anyone may have any port",
    )
    def test_a_port_that_is_for_root_is_said(self) -> None:
        result = ended_server("127.0.0.1:1", user=STRANGER)

        assert result.returncode == 1
        assert "cannot listen there: Permission denied: '127.0.0.1:1'" in result.stderr

    def test_another_users_socket_is_said(self, open_directory: Path) -> None:
        open_directory.chmod(0o777)
        with server_process(open_directory) as server:
            result = ended_server(server.target, user=STRANGER)

        assert result.returncode == 1
        assert "this user may not open the socket there" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--socket-mode", "rw"), "'rw' is not a file mode in octal digits, as in 0660"),
        (("--socket-mode", "0888"), "'0888' is not a file mode"),
        (("--socket-mode", "1777"), "'1777' is not a file mode"),
        (("--socket-group", "no such group"), "there is no group 'no such group'"),
        (("--socket-group", "4294967295"), "there is no group '4294967295'"),
    ],
)
def test_what_is_no_mode_or_group_is_said(
    socket_directory: Path, options: tuple[str, ...], message: str
) -> None:
    result = ended_server(f"unix:{socket_directory}/s", *options)

    assert result.returncode == 2
    assert message in result.stderr


def command(address: str, *options: str, user: int | None = None) -> list[str]:
    """Return the command that runs a server. Another user becomes one once it has this code, which it may not read."""
    start = (
        "import encodings.idna, os, sys, deconvd_server.daemon\n"
        "from deconvd_server.__main__ import main; user = int(sys.argv.pop())\n"
    )
    become = "if user: os.setgroups([]); os.setgid(user); os.setuid(user)\n"
    words = ["--device", "cpu", "--listen", address, *options, str(user or 0)]
    return [sys.executable, "-c", f"{start}{become}main()", *words]


def ended_server(
    address: str, *options: str, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a server that cannot start to its end."""
    return subprocess.run(
        command(address, *options, user=user),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_root
def test_a_directory_that_may_not_be_written_any_more_keeps_no_server_from_ending(
    open_directory: Path,
) -> None:
    run = open_directory / "run"
    run.mkdir()
    os.chown(run, STRANGER, STRANGER)
    with subprocess.Popen(
        command(f"unix:{run}/s", user=STRANGER),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert "listening on" in server.stdout.readline()
        os.chown(run, 0, 0)
        server.terminate()
        try:
            _, log = server.communicate(timeout=90)
        finally:
            server.kill()

    assert server.returncode == 0
    assert "Traceback" not in log
    assert "the file of a Unix socket cannot be removed: " in log


HOLD_LOCKS = """
import fcntl, os, sys
os.setgid(54321)
os.setuid(54321)
held = []
for path in sys.argv[1:]:
    held.append(os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666))
    fcntl.flock(held[-1], fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@needs_root
def test_locks_that_a_stranger_holds_keep_no_server_from_starting_or_ending(
    open_directory: Path,
) -> None:
    open_directory.chmod(0o1777)
    paths = [open_directory, open_directory / ".deconvd.sock.lock"]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCKS, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "held\n"
        for number in (signal.SIGKILL, signal.SIGTERM):  # a dead one's socket, then none
            with server_process(open_directory) as server:
                with deconvd_client.connect(server.target) as F:
                    assert has_all(F)
                assert server.end(number) == (0 if number == signal.SIGTERM else -number)
        stranger.kill()
    assert not (open_directory / "deconvd.sock").exists()


@pytest.mark.slow  # it is waited for
def test_a_lock_that_is_never_left_keeps_no_server_from_ending(socket_directory: Path) -> None:
    with server_process(socket_directory) as server:
        lock = os.open(socket_directory / ".deconvd.sock.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert server.end() == 0
        os.close(lock)
