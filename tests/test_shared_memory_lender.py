"""The lender: what it lends is sealed, counted and taken back, and no client can harm it or another."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import resource
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deconvd.errors import InvalidArgumentError, StaleRegionError
from deconvd.lending.protocol import LendingOperation, LendingReply, LendingRequest, ReplyStatus
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.resources.socket_file import Access
from deconvd_server.resources.unix_listener import (
    SideSocket,
    SocketPurpose,
    open_private_socket,
    open_side_sockets,
)
from deconvd_server.shared_memory import Lender, LoanLimits
from tests.lenders import (
    MIB,
    MappingRecorder,
    RawBorrower,
    lend_tensor,
    memory_listener,
    start_borrower_process,
    start_lender,
)
from tests.processes import leaves_no_descriptor, wait_until
from tests.servers import ServerProcess, server_process
from tests.soak.hostile.by_memory import Borrower

FLOATS = TensorSpec((4, 8), np.dtype(np.float32))
TIMEOUT_S = 30

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


Connect = Callable[..., RawBorrower]


@pytest.fixture
def connect(path: Path) -> Iterator[Connect]:
    with ExitStack() as peers:

        def connect() -> RawBorrower:
            peer = RawBorrower(path)
            peers.callback(peer.close)
            return peer

        yield connect


@contextmanager
def used(lender: Lender, region: bytes, offset: int = 0) -> Iterator[np.ndarray]:
    with lend_tensor(lender, "x", SharedSlice(region, offset), FLOATS) as array:
        yield array


def test_both_sides_see_the_same_memory(lender: Lender, connect: Connect) -> None:
    client = connect()
    region = client.borrow(MIB)
    with mmap.mmap(client.descriptors[0], MIB) as theirs:
        theirs[64:192] = np.arange(32, dtype=np.float32).tobytes()

        with used(lender, region, 64) as ours:
            np.testing.assert_array_equal(ours, np.arange(32).reshape(4, 8))
            ours[...] = 7

        assert theirs[64:192] == np.full(32, 7, np.float32).tobytes()


def test_memory_is_zero_at_first_and_counted_in_pages(lender: Lender, connect: Connect) -> None:
    client = connect()
    reply = client.lend(5000)

    assert reply.size_bytes == 2 * mmap.PAGESIZE == lender.lent_bytes
    assert os.pread(client.descriptors[0], 9000, 0) == bytes(2 * mmap.PAGESIZE)


@pytest.mark.parametrize("size_bytes", [0, MIB // 2, 2 * MIB])
def test_a_client_cannot_resize_what_it_has(
    lender: Lender, connect: Connect, size_bytes: int
) -> None:
    client = connect()
    client.borrow(MIB)

    with pytest.raises(PermissionError):
        os.ftruncate(client.descriptors[0], size_bytes)


def test_a_client_cannot_seal_against_the_server(lender: Lender, connect: Connect) -> None:
    client = connect()
    client.borrow(MIB)

    with pytest.raises(PermissionError):
        fcntl.fcntl(client.descriptors[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_hole_that_a_client_punches_reads_as_zeros(lender: Lender, connect: Connect) -> None:
    client = connect()
    region = client.borrow(MIB)
    keep_size_and_punch_hole = 3
    with used(lender, region) as ours:
        ours[...] = 7

        punched = ctypes.CDLL(None).fallocate(
            client.descriptors[0], keep_size_and_punch_hole, ctypes.c_long(0), ctypes.c_long(MIB)
        )

        assert punched == 0
        assert ours.max() == 0
        ours[...] = 8
        assert os.pread(client.descriptors[0], 4, 0) == np.float32(8).tobytes()


def test_names_are_secrets_of_their_own(lender: Lender, connect: Connect) -> None:
    client = connect()
    names = {client.borrow(1) for _ in range(20)}

    assert len(names) == 20
    assert all(len(name) == 16 for name in names)


class TestSlices:
    """What a call may name."""

    @pytest.mark.parametrize("offset", [-1, -128, MIB - 127, MIB, 2**62, -(2**63), 2**63 - 1])
    def test_a_slice_beyond_its_region_is_refused(
        self, lender: Lender, connect: Connect, offset: int
    ) -> None:
        region = connect().borrow(MIB)

        with pytest.raises(InvalidArgumentError, match=r"x must be inside its region") as raised:
            with used(lender, region, offset):
                pass
        assert raised.value.argument == "x"
        assert not isinstance(raised.value, StaleRegionError)

    @pytest.mark.parametrize("offset", [1, 2, 3, 127])
    def test_a_slice_that_is_not_aligned_is_refused(
        self, lender: Lender, connect: Connect, offset: int
    ) -> None:
        region = connect().borrow(MIB)

        with pytest.raises(InvalidArgumentError, match=r"x must start at a multiple of .* 4 bytes"):
            with used(lender, region, offset):
                pass

    def test_the_first_and_the_last_bytes_can_be_used(
        self, lender: Lender, connect: Connect
    ) -> None:
        region = connect().borrow(MIB)

        for offset in (0, MIB - FLOATS.nbytes):
            with used(lender, region, offset) as array:
                array[...] = 1

    @pytest.mark.parametrize("shape", [(), (0, 3), (2, 0)])
    def test_a_tensor_may_be_a_scalar_or_empty(
        self, lender: Lender, connect: Connect, shape: tuple[int, ...]
    ) -> None:
        place = SharedSlice(connect().borrow(MIB), 0)

        with lend_tensor(lender, "b", place, TensorSpec(shape, np.dtype(np.float64))) as array:
            assert array.shape == shape

    @given(region=st.binary(max_size=40))
    @settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    def test_a_region_of_no_one_is_refused(self, lender: Lender, region: bytes) -> None:
        with pytest.raises(
            StaleRegionError, match="must be in shared memory that this server lends"
        ):
            with used(lender, region):
                pass

    def test_a_region_that_was_given_back_is_refused(
        self, lender: Lender, connect: Connect
    ) -> None:
        client = connect()
        region = client.borrow(MIB)

        assert (
            client.ask(LendingRequest(LendingOperation.RETURN, region=region)).status
            is ReplyStatus.DONE
        )

        with pytest.raises(StaleRegionError):
            with used(lender, region):
                pass
        assert lender.wait_until_unused(TIMEOUT_S)

    def test_another_client_cannot_give_it_back(self, lender: Lender, connect: Connect) -> None:
        region = connect().borrow(MIB)
        thief = connect()

        assert (
            thief.ask(LendingRequest(LendingOperation.RETURN, region=region)).status
            is ReplyStatus.MALFORMED
        )

        with used(lender, region):
            pass


class TestLife:
    """Memory is lent for as long as the connection is open, and mapped for as long as it is used."""

    def test_a_region_in_use_outlives_its_client(self, path: Path, connect: Connect) -> None:
        watch = MappingRecorder()
        with start_lender(path, on_map=watch) as lender:
            client = connect()
            region = client.borrow(MIB)
            with used(lender, region) as array:
                client.close()
                other = connect()
                other.borrow(MIB)  # answered after the mapper has seen the first one off
                array[...] = 3
                assert list(watch.mapped.values()) == [MIB, MIB]
                with pytest.raises(StaleRegionError):
                    with used(lender, region):
                        pass
            assert list(watch.mapped.values()) == [MIB]
            assert lender.lent_bytes == MIB
        assert watch.mapped == {}

    def test_closing_waits_for_no_call_and_unmaps_nothing_under_it(
        self, path: Path, connect: Connect
    ) -> None:
        watch = MappingRecorder()
        lender = Lender([memory_listener(path)], LoanLimits(MIB, MIB), on_map=watch)
        region = connect().borrow(MIB)
        with used(lender, region) as array:
            lender.close()
            array[...] = 3
            assert list(watch.mapped.values()) == [MIB]
        assert watch.mapped == {}
        assert lender.lent_bytes == 0

    def test_a_region_is_kept_ready_for_the_next_client(self, path: Path, connect: Connect) -> None:
        watch = MappingRecorder()
        with start_lender(path, on_map=watch, spare_bytes=MIB) as lender:
            wait_until(lambda: [*watch.mapped.values()] == [MIB])
            (address,) = watch.mapped
            assert lender.lent_bytes == 0

            region = connect().borrow(MIB)
            with used(lender, region) as array:
                assert not np.any(array)
                assert array.ctypes.data == address
            wait_until(lambda: [*watch.mapped.values()] == [MIB, MIB])
            assert lender.lent_bytes == MIB

            connect().borrow(2 * MIB)
            wait_until(lambda: [*watch.mapped.values()] == [MIB, MIB, 2 * MIB])
            assert lender.lent_bytes == 3 * MIB
        assert watch.mapped == {}

    def test_where_none_can_be_kept_ready_a_client_gets_its_own(
        self, path: Path, connect: Connect
    ) -> None:
        watch = MappingRecorder()
        asked: list[int] = []

        def map_at_last(address: int, size_bytes: int) -> Callable[[], None]:
            asked.append(size_bytes)
            if len(asked) < 3:
                raise MemoryError("the card registers no more")
            return watch(address, size_bytes)

        with start_lender(path, on_map=map_at_last, spare_bytes=MIB):
            wait_until(lambda: len(asked) == 1)
            assert connect().lend(MIB).status is ReplyStatus.FAILED
            wait_until(lambda: len(asked) == 3)  # asked for again after each request
            connect().borrow(MIB)
            wait_until(lambda: len(asked) == 4)

    def test_a_closed_lender_has_neither_threads_nor_a_file(self, path: Path) -> None:
        before = set(threading.enumerate())
        with leaves_no_descriptor(), start_lender(path, spare_bytes=MIB):
            assert set(threading.enumerate()) - before
        assert set(threading.enumerate()) <= before
        assert os.listdir(path.parent) == []

    def test_closing_twice_is_harmless(self, path: Path) -> None:
        with start_lender(path) as lender:
            lender.close()

    def test_clients_see_the_end_of_the_lender(self, path: Path, connect: Connect) -> None:
        with start_lender(path):
            client = connect()
            client.borrow(MIB)
        assert client.is_dropped()

    def test_a_lender_that_withdrew_serves_those_it_has(
        self, lender: Lender, connect: Connect, path: Path
    ) -> None:
        client = connect()
        region = client.borrow(MIB)

        lender.withdraw()

        assert not path.exists()
        with used(lender, region):
            pass
        client.borrow(MIB)

    def test_a_successor_takes_the_path_and_keeps_it(self, path: Path, connect: Connect) -> None:
        first = Lender([memory_listener(path)], LoanLimits(MIB, MIB))
        with start_lender(path, LoanLimits(2 * MIB, 2 * MIB)):
            first.close()
            connect().borrow(2 * MIB)

    def test_what_a_lender_has_left_is_the_successors_whatever_its_inode(self, path: Path) -> None:
        spare = path.with_name("spare")
        first = Lender([memory_listener(path)], LoanLimits(MIB, MIB))
        spare.hardlink_to(path)
        first.withdraw()
        spare.rename(
            path
        )  # as a successor's that gets the number of the inode, which is free by then

        first.close()

        assert path.is_socket()

    def test_the_socket_of_a_dead_lender_is_replaced(self, path: Path, connect: Connect) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(path))
        with start_lender(path):
            connect().borrow(1)

    def test_a_file_that_is_no_socket_is_left_alone(self, path: Path) -> None:
        path.write_text("precious")

        with pytest.raises(FileExistsError):
            Lender([memory_listener(path)], LoanLimits(1, 1))

        assert path.read_text() == "precious"
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("seed", range(5))
    def test_clients_killed_at_any_moment_leave_nothing_mapped(
        self, path: Path, connect: Connect, seed: int
    ) -> None:
        script = """
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(path)
say("begun")
while True:
    link.send(LendingRequest(LendingOperation.LEND, 1 << 20).pack())
    packet, fds, _, _ = socket.recv_fds(link, 1024, 1)
    if fds:
        os.pwrite(fds[0], b"x" * 65536, 0)
        os.close(fds[0])
    else:
        link.close()
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(path)
"""
        watch = MappingRecorder()
        with start_lender(path, LoanLimits(40 * MIB, 8 * MIB), on_map=watch) as lender:
            with (
                start_borrower_process(script, path) as first,
                start_borrower_process(script, path) as second,
            ):
                assert first.read_line() == second.read_line() == "begun"
                witness = connect()
                for _ in range(random.Random(seed).randrange(60)):
                    witness.give_back(witness.borrow(4096))
                    witness.close_descriptors()
                for victim in (first, second):
                    victim.process.send_signal(signal.SIGKILL)
                    victim.process.wait()
            witness.close()
            assert lender.wait_until_unused(TIMEOUT_S)
            assert lender.lent_bytes == 0
            assert watch.mapped == {}


class TestLimits:
    """Nobody gets more than is allowed."""

    def test_a_client_gets_its_quota_and_no_more(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(4 * MIB, 2 * MIB)):
            greedy = connect()
            first = greedy.borrow(MIB)
            greedy.borrow(MIB)

            reply = greedy.lend(1)
            assert reply.status is ReplyStatus.OVER_CLIENT_LIMIT
            assert str(2 * MIB) in reply.text
            assert greedy.lend(2**64 - 1).status is ReplyStatus.OVER_CLIENT_LIMIT

            greedy.give_back(first)
            assert greedy.lend(MIB).status is ReplyStatus.OVER_CLIENT_LIMIT  # it has it still
            greedy.close_descriptors()
            greedy.borrow(MIB)

    def test_all_clients_together_get_no_more_than_all(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(24 * MIB, 16 * MIB)):
            connect().borrow(16 * MIB)
            second = connect()

            reply = second.lend(8 * MIB)
            assert reply.status is ReplyStatus.OVER_SERVER_LIMIT
            assert str(24 * MIB) in reply.text
            second.borrow(5 * MIB)  # an eighth is for other processes

    def test_regions_are_counted_too(self, path: Path, connect: Connect) -> None:
        limits = LoanLimits(MIB, MIB, client_regions_count=2, all_regions_count=3)
        with start_lender(path, limits):
            first, second = connect(), connect()
            first.borrow(1)
            first.borrow(1)

            assert first.lend(1).status is ReplyStatus.OVER_CLIENT_LIMIT
            second.borrow(1)
            assert second.lend(1).status is ReplyStatus.OVER_SERVER_LIMIT

    def test_what_calls_still_use_counts_until_they_end(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(MIB, MIB)) as lender:
            client = connect()
            region = client.borrow(MIB)
            with used(lender, region):
                client.give_back(region)
                client.close_descriptors()
                assert client.lend(MIB).status is ReplyStatus.OVER_CLIENT_LIMIT
            client.borrow(MIB)

    def test_of_many_threads_no_two_get_the_same_bytes(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(10 * MIB, MIB)):
            clients = [connect() for _ in range(20)]
            with ThreadPoolExecutor(20) as threads:
                answers = [r.status for r in threads.map(lambda client: client.lend(MIB), clients)]

        assert answers.count(ReplyStatus.DONE) == 8  # 1.25 MiB are for other processes
        assert answers.count(ReplyStatus.OVER_SERVER_LIMIT) == 12

    def test_memory_that_cannot_be_shown_to_a_device_is_not_lent(
        self, path: Path, connect: Connect
    ) -> None:
        def fail(address: int, size_bytes: int) -> Callable[[], None]:
            raise RuntimeError("secret text of a driver")

        with start_lender(path, on_map=fail) as lender:
            reply = connect().lend(MIB)

            assert reply.status is ReplyStatus.FAILED
            assert "secret" not in reply.text
            assert lender.lent_bytes == 0

    def test_a_device_that_cannot_let_go_stops_nothing(self, path: Path, connect: Connect) -> None:
        def undo() -> None:
            raise RuntimeError("cannot")

        with start_lender(path, on_map=lambda _address, _size: undo):
            connect().borrow(MIB)
            connect().borrow(MIB)


class TestStrangers:
    """Whoever comes to the side socket disturbs nobody else."""

    @given(packet=st.binary(min_size=1, max_size=80))
    @settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    def test_garbage_ends_its_connection_alone(
        self, lender: Lender, path: Path, packet: bytes
    ) -> None:
        stranger, friend = RawBorrower(path), RawBorrower(path)
        try:
            assert stranger.ask_raw(packet).status is ReplyStatus.MALFORMED
            assert stranger.is_dropped()
            friend.borrow(1)
        finally:
            stranger.close()
            friend.close()

    def test_descriptors_that_a_client_sends_are_not_kept(
        self, lender: Lender, connect: Connect
    ) -> None:
        client = connect()
        receiver, sender = os.pipe()
        socket.send_fds(client.socket, [LendingRequest(LendingOperation.LEND, 1).pack()], [sender])
        os.close(sender)
        socket.recv_fds(client.socket, 1024, 0)

        assert os.read(receiver, 1) == b""  # no one holds the other end
        os.close(receiver)

    def test_a_client_that_never_speaks_makes_room(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(MIB, MIB, clients_count=3)):
            busy = connect()
            busy.borrow(1)
            mute = [connect() for _ in range(10)]
            newcomer = connect()

            newcomer.borrow(1)

            assert all(client.is_dropped() for client in mute[:8])
            busy.borrow(1)

    def test_clients_that_borrow_do_not(self, path: Path, connect: Connect) -> None:
        with start_lender(path, LoanLimits(MIB, MIB, clients_count=2)):
            busy = [connect(), connect()]
            for client in busy:
                client.borrow(1)
            late = connect()

            assert LendingReply.parse(late.socket.recv(1024)).status is ReplyStatus.REFUSED
            assert late.is_dropped()
            busy[0].close()
            second_try = connect()
            while (
                second_try.lend(1).status is not ReplyStatus.DONE
            ):  # the lender sees the end in its time
                second_try = connect()

    def test_a_client_that_never_listens_stops_nobody(
        self, lender: Lender, connect: Connect
    ) -> None:
        deaf = connect()
        deaf.socket.setblocking(False)
        packet = LendingRequest(LendingOperation.LEND, 2**63).pack()
        with suppress(OSError):  # its own socket is full, or it was dropped
            while True:
                deaf.socket.send(packet)

        connect().borrow(1)

    def test_a_request_may_wait_behind_another(self, lender: Lender, connect: Connect) -> None:
        client = connect()
        for size in (1, MIB):
            client.socket.send(LendingRequest(LendingOperation.LEND, size).pack())

        sizes = []
        for _ in range(2):
            packet, descriptors, _, _ = socket.recv_fds(client.socket, 1024, 1)
            client.descriptors += descriptors
            sizes.append(LendingReply.parse(packet).size_bytes)
        assert sizes == [mmap.PAGESIZE, MIB]

    def test_want_of_descriptors_passes(self, path: Path, connect: Connect) -> None:
        with start_lender(path):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            client = connect()
            client.borrow(1)
            waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            waiting.settimeout(TIMEOUT_S)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                waiting.connect(str(path))
                waiting.send(LendingRequest(LendingOperation.LEND, 2**63).pack())
                assert client.lend(1).status is ReplyStatus.FAILED
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert LendingReply.parse(waiting.recv(1024)).status is ReplyStatus.OVER_CLIENT_LIMIT
            waiting.close()


class TestUsers:
    """Memory is lent to the users that it is meant for."""

    ASK = """
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    link.connect(path)
    link.send(LendingRequest(LendingOperation.LEND, 4096).pack())
except OSError as error:
    say(type(error).__name__)
try:
    say(LendingReply.parse(link.recv(1024)).status.name)
except OSError as error:
    say(type(error).__name__)
"""

    @pytest.fixture
    def open_directory(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="shm-", dir="/tmp") as name:
            Path(name).chmod(0o755)
            yield Path(name)

    @needs_root
    def test_another_user_cannot_even_connect(self, open_directory: Path) -> None:
        with start_lender(open_directory / "memory"):
            with start_borrower_process(
                self.ASK, open_directory / "memory", user=54321
            ) as stranger:
                assert stranger.read_line() == "PermissionError"

    @needs_root
    @pytest.mark.parametrize(("user", "answer"), [(54321, "REFUSED"), (12345, "DONE"), (0, "DONE")])
    def test_of_other_users_those_named_are_served(
        self, open_directory: Path, user: int, answer: str
    ) -> None:
        users, access = frozenset({0, 12345}), Access(0o666)
        with start_lender(open_directory / "memory", users=users, access=access):
            with start_borrower_process(self.ASK, open_directory / "memory", user=user) as running:
                lines = [running.read_line(), running.read_line()]
        assert answer in lines

    @needs_root
    @pytest.mark.parametrize("listen", ["unix", "127.0.0.1:0"])
    @pytest.mark.parametrize(("user", "answer"), [(54321, "REFUSED"), (12345, "DONE")])
    def test_a_server_can_be_told_whom_it_serves(
        self,
        open_directory: Path,
        listen: str,
        user: int,
        answer: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_directory))
        users = ("--shared-memory-users", "11111,12345")
        with (
            server_process(open_directory, *users, listen=(listen,)) as server,
            grpc.insecure_channel(server.target) as channel,
        ):
            stub = pb_grpc.DeconvolutionServiceStub(channel)
            socket = stub.GetServerInfo(pb.GetServerInfoRequest()).shared_memory_socket
            with start_borrower_process(self.ASK, Path(socket), user=user) as running:
                lines = [running.read_line(), running.read_line()]
        assert answer in lines

    def test_those_not_named_are_refused(self, path: Path, connect: Connect) -> None:
        with start_lender(path, users=frozenset({54321})):
            assert LendingReply.parse(connect().socket.recv(1024)).status is ReplyStatus.REFUSED


class TestPlace:
    """Where side sockets are."""

    @pytest.fixture
    def sides(self) -> Iterator[list[SideSocket]]:
        """A list of sockets that are closed at the end."""
        sides: list[SideSocket] = []
        yield sides
        for side in sides:
            side.remove()
            side.socket.close()

    @pytest.mark.parametrize("purpose", SocketPurpose)
    @pytest.mark.parametrize("length", [60, 99, 100, 101, 104, 107])
    def test_they_are_beside_each_unix_socket_whatever_the_length_of_its_path(
        self,
        sides: list[SideSocket],
        socket_directory: Path,
        length: int,
        purpose: SocketPurpose,
    ) -> None:
        grpc_paths = [Path(f"{socket_directory}/{x}".ljust(length, "x")) for x in "ab"]

        opened = open_side_sockets(grpc_paths, purpose, None)
        sides += opened.values()

        assert list(opened) == grpc_paths
        assert len({side.path for side in opened.values()}) == 2
        for side in opened.values():
            assert side.path.parent == socket_directory
            assert side.path.is_socket()

    def test_without_room_there_it_is_in_a_private_directory(
        self,
        sides: list[SideSocket],
        monkeypatch: pytest.MonkeyPatch,
        socket_directory: Path,
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_directory))
        deep = Path(f"{socket_directory}/".ljust(105, "d"))
        deep.mkdir()
        sides += [
            *open_side_sockets([deep / "s"], SocketPurpose.MEMORY, None).values(),
            open_private_socket(SocketPurpose.MEMORY, None),
        ]

        assert len(sides) == 2
        for side in sides:
            assert side.path.parent.parent == socket_directory
            assert side.path.parent.stat().st_mode & 0o777 == 0o700
            side.remove()
            assert not side.path.parent.exists()

    def test_a_socket_for_grpc_is_never_replaced(
        self, sides: list[SideSocket], socket_directory: Path
    ) -> None:
        grpc_paths = [socket_directory / "a", socket_directory / "a.memory"]
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(grpc_paths[1]))
            inode = grpc_paths[1].stat().st_ino

            opened = open_side_sockets(grpc_paths, SocketPurpose.MEMORY, None)

        sides += opened.values()
        assert len({side.path for side in sides}) == 2
        assert grpc_paths[1].stat().st_ino == inode

    def test_what_a_killed_server_left_is_removed_by_the_next_and_nothing_else(
        self, monkeypatch: pytest.MonkeyPatch, socket_directory: Path
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_directory))
        unborn = socket_directory / "deconvd-memory-unborn"
        unborn.mkdir()

        def serving(name: str) -> AbstractContextManager[ServerProcess]:
            (socket_directory / name).mkdir()
            return server_process(socket_directory / name, listen=("127.0.0.1:0",))

        def private() -> set[Path]:
            return set(socket_directory.glob("deconvd-memory-*")) - {unborn}

        with serving("living"):
            of_the_living = private()
            with serving("killed") as killed:
                of_the_killed = private() - of_the_living
                killed.end(signal.SIGKILL)
                assert private() == of_the_living | of_the_killed
            with serving("next"):
                assert len(private() - of_the_living) == 1
                assert not private() & of_the_killed
                assert of_the_living <= private()
        assert unborn.exists()


_FAILING_ONCE = """
from deconvd_server.shared_memory.loans import LoanRegistry

def fail_once(self, account, size_bytes):
    LoanRegistry.reserve = reserve
    raise RuntimeError("unforeseen")

reserve, LoanRegistry.reserve = LoanRegistry.reserve, fail_once
"""


def test_an_unforeseen_error_of_a_request_is_answered_and_logged(tmp_path: Path) -> None:
    request = LendingRequest(LendingOperation.LEND, MIB).pack()
    with server_process(tmp_path, prelude=_FAILING_ONCE) as server:
        with Borrower(f"{server.target.removeprefix('unix:')}.memory") as borrower:
            assert borrower.ask(request).status is ReplyStatus.FAILED
            assert borrower.ask(request).status is ReplyStatus.DONE

        assert "a request for shared memory failed" in server.log.read_text()
