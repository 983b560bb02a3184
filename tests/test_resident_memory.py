"""Memory that was given back: it counts until its client has let go of it, however the client keeps it."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from deconvd.lending.protocol import FIRST_REGION_BYTES, ReplyStatus
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd_client import ExhaustedError, connect
from deconvd_client.shared_memory import Borrower
from deconvd_server.shared_memory import Lender, LoanLimits
from deconvd_server.shared_memory.loans import RESERVED_PART
from deconvd_server.shared_memory.memfd_watcher import MemfdWatcher
from deconvd_server.shared_memory.memory import SealedMemory
from tests.cgroups import cgroup
from tests.deadlines import short_deadline
from tests.lenders import (
    MIB,
    MappingRecorder,
    RawBorrower,
    is_in_shared_memory,
    start_borrower_process,
    start_lender,
)
from tests.processes import descriptors_count, lent_bytes, wait_until
from tests.servers import GRAPHS_SOON, server_process

LIMIT_BYTES = 64 * MIB
REGION_BYTES = 16 * MIB
REGIONS_COUNT = 12
TIMEOUT_S = 30
SIDE = 2048  # of an image of 16 MiB
X = np.ones((1, 8, 16, 16), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)


@pytest.fixture
def peers(path: Path) -> Iterator[Callable[[], RawBorrower]]:
    with ExitStack() as stack:

        def peer() -> RawBorrower:
            made = RawBorrower(path)
            stack.callback(made.close)
            return made

        yield peer


def fill(stub: pb_grpc.DeconvolutionServiceStub, region: bytes) -> None:
    """Have the server write to every page of a region: one pixel makes an image of zeros, of 16 MiB."""
    one = pb.Tensor(
        element_type=pb.ELEMENT_TYPE_FLOAT32, shape=(1, 1, 1, 1), raw=np.ones(1, "f4").tobytes()
    )
    wide = pb.Geometry(stride=pb.Pair(h=SIDE, w=SIDE), outsize=pb.OutputSize(h=SIDE, w=SIDE))
    place = pb.SharedSlice(region=region)
    stub.Deconvolve(pb.DeconvolveRequest(x=one, w=one, geometry=wide, y_place=place), timeout=30)


def hoard(path: Path, stub: pb_grpc.DeconvolutionServiceStub, keep: ExitStack) -> list[mmap.mmap]:
    """Borrow, have the server fill it, give back and keep it, twelve times over; return what is kept."""
    kept = []
    for _ in range(REGIONS_COUNT):
        peer = RawBorrower(path)
        keep.callback(peer.close_descriptors)
        reply = peer.lend(REGION_BYTES)
        if reply.status is ReplyStatus.DONE:
            fill(stub, reply.region)
            kept.append(keep.enter_context(mmap.mmap(peer.descriptors[0], REGION_BYTES)))
            assert peer.give_back(reply.region).status is ReplyStatus.DONE
        peer.socket.close()
    return kept


def test_what_a_client_keeps_of_what_it_gave_back_stays_within_the_limit(tmp_path: Path) -> None:
    with (
        cgroup(memory_bytes=600_000_000) as group,
        server_process(tmp_path, "--shared-memory-bytes", str(LIMIT_BYTES), within=group) as server,
        grpc.insecure_channel(server.target) as channel,
        connect(server.target) as F,
    ):
        stub = pb_grpc.DeconvolutionServiceStub(channel)
        path = Path(stub.GetServerInfo(pb.GetServerInfoRequest()).shared_memory_socket)
        F.deconvolution_2d(X, W)
        before_bytes = group.kept_memory_bytes
        with ExitStack() as keep:
            kept = hoard(path, stub, keep)

            assert len(kept) == (LIMIT_BYTES - LIMIT_BYTES // RESERVED_PART) // REGION_BYTES
            for mapping in kept:
                mapping[:] = bytes(REGION_BYTES)
            assert group.kept_memory_bytes - before_bytes < LIMIT_BYTES + 32 * MIB
            assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)  # by messages
        with ExitStack() as keep:
            peer = RawBorrower(path)
            keep.callback(peer.close)
            assert peer.lend(LIMIT_BYTES // 2).status is ReplyStatus.DONE
        assert group.kills_count == 0


def dup(descriptor: int) -> Callable[[], None]:
    kept = os.dup(descriptor)
    return lambda: os.close(kept)


def open_again(flags: int) -> Callable[[int], Callable[[], None]]:
    def keep(descriptor: int) -> Callable[[], None]:
        kept = os.open(f"/proc/self/fd/{descriptor}", flags)
        return lambda: os.close(kept)

    return keep


def map_it(descriptor: int) -> Callable[[], None]:
    return mmap.mmap(descriptor, MIB).close


def map_for_reading(descriptor: int) -> Callable[[], None]:
    return mmap.mmap(descriptor, MIB, prot=mmap.PROT_READ).close


def leave_in_a_message(descriptor: int) -> Callable[[], None]:
    one, other = socket.socketpair()
    socket.send_fds(one, [b"."], [descriptor])

    def let_go() -> None:
        one.close()
        other.close()

    return let_go


def leave_to_a_child(descriptor: int) -> Callable[[], None]:
    script = (
        "import mmap, os, sys\n"
        "descriptor = int(sys.argv[1])\n"
        f"kept = mmap.mmap(descriptor, {MIB})\n"
        "os.close(descriptor)\n"
        "print(flush=True)\n"
        "input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(descriptor)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor],
    )
    assert child.stdout is not None
    assert child.stdout.readline()

    def let_go() -> None:
        child.communicate(b"\n", TIMEOUT_S)

    return let_go


@pytest.mark.parametrize("leaves", ["gives back", "goes"])
@pytest.mark.parametrize(
    "keep",
    [
        dup,
        open_again(os.O_RDONLY),
        open_again(os.O_PATH),
        map_it,
        map_for_reading,
        leave_in_a_message,
        leave_to_a_child,
    ],
    ids=["descriptor", "to read", "path only", "mapping", "to look", "message", "child"],
)
def test_memory_counts_until_its_client_has_let_go_of_it(
    path: Path,
    peers: Callable[[], RawBorrower],
    keep: Callable[[int], Callable[[], None]],
    leaves: str,
) -> None:
    half_bytes = 7 * MIB // 2  # of what one process may have
    with start_lender(path, LoanLimits(8 * MIB, half_bytes)) as lender:
        keeper, other = peers(), peers()
        region = keeper.borrow(half_bytes)
        let_go = keep(keeper.descriptors[0])
        if leaves == "gives back":
            assert keeper.give_back(region).status is ReplyStatus.DONE
            keeper.close_descriptors()
            assert keeper.lend(1).status is ReplyStatus.OVER_CLIENT_LIMIT
        else:
            keeper.close()
        assert lender.wait_until_unused(TIMEOUT_S)

        assert lender.lingering_bytes == half_bytes
        other.borrow(half_bytes)
        refused = peers().lend(1)
        assert refused.status is ReplyStatus.OVER_SERVER_LIMIT
        assert f"all clients of process {os.getpid()} at most" in refused.text
        let_go()
        assert lender.lingering_bytes == 0
        peers().borrow(half_bytes)


def test_what_a_client_keeps_it_cannot_make_larger(
    path: Path, lender: Lender, peers: Callable[[], RawBorrower]
) -> None:
    client = peers()
    assert client.give_back(client.borrow(MIB)).status is ReplyStatus.DONE

    for change in (
        lambda file: os.ftruncate(file, 2 * MIB),
        lambda file: os.posix_fallocate(file, MIB, MIB),
        lambda file: os.pwrite(file, b"more", MIB),
    ):
        with pytest.raises(PermissionError):
            change(client.descriptors[0])
    assert lender.lingering_bytes == MIB


def test_memory_of_a_client_that_is_killed_counts_no_more(path: Path, lender: Lender) -> None:
    script = """
borrower = Borrower(find)
array = borrower.empty((1 << 20,), np.float32, soon())
array[...] = 1
say("borrowed")
input()
"""
    with start_borrower_process(script, path) as victim:
        assert victim.read_line() == "borrowed"
        assert lender.lent_bytes > 0

        victim.process.kill()
        victim.process.wait()

        assert lender.wait_until_unused(TIMEOUT_S)
        wait_until(lambda: lender.lingering_bytes == 0)


def test_results_outlive_their_connection_and_count_until_they_go(tmp_path: Path) -> None:
    with server_process(tmp_path, "--shared-memory-bytes", "128Mi") as server:
        with connect(server.target) as F:
            x = F.empty((1, 8, 256, 256), np.float32)
            x[...] = 1
            y = F.deconvolution_2d(x, W)
        assert is_in_shared_memory(y)
        assert y.max() == 8 * 16

        with connect(server.target, transport="shared_memory") as F:
            with pytest.raises(ExhaustedError, match="are lent or still mapped"):
                F.deconvolution_2d(np.ones((1, 1, 4096, 4096), np.float32), W[:1, :1, :1, :1])
        assert y.max() == 8 * 16

        del x, y
        with connect(server.target, transport="shared_memory") as F:
            assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)


def test_memory_that_cannot_be_made_or_watched_leaves_nothing_behind() -> None:
    """With each number of descriptors from none to enough: the memfd's, the mapping's and the watch's."""
    shown, ends = MappingRecorder(), MemfdWatcher()
    made: list[SealedMemory] = []
    shown_count = 0

    def show(address: int, size_bytes: int) -> Callable[[], None]:
        nonlocal shown_count
        shown_count += 1
        return shown(address, size_bytes)

    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = [os.dup(0) for _ in range(64)]
    before = descriptors_count()
    try:
        for spare_count in range(4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1 + spare_count, hard))
            with suppress(OSError):
                made.append(SealedMemory(MIB, show, ends))
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert made or not shown.mapped
            assert made or descriptors_count() <= before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for filler in fillers:
            os.close(filler)

    (memory,) = made
    assert shown_count == 2  # so it was mapped once before it could not be watched
    memory.close_descriptor()
    memory.unmap()
    assert shown.mapped == {}
    ends.close()


def test_memory_that_is_let_go_of_a_moment_after_it_was_given_back_is_borrowed_anew(
    path: Path, lender: Lender, borrower: Borrower
) -> None:
    """The first region has 64 MiB, and a client may have 256."""
    array = borrower.empty((MIB,), np.float16, short_deadline())
    lies_at = borrower.locate(array)
    assert lies_at is not None
    use = lender.use("x", lies_at.region)
    ending = threading.Timer(0.3, use.end)
    ending.start()
    del array

    array = borrower.empty((100 * MIB,), np.float16, short_deadline())

    assert is_in_shared_memory(array)
    ending.join()


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
def test_neither_end_keeps_mapped_what_was_given_back(tmp_path: Path, device: str) -> None:
    """A first call may search plans, a second captures a graph, and those after it launch that."""
    filters = np.ones((8, 1, 1, 1), np.float32)
    ready_bytes = FIRST_REGION_BYTES if device == "cuda" else 0  # for the next client
    with server_process(tmp_path, device=device, constants=GRAPHS_SOON) as server:
        for calls_count in (1, 2, 4):
            with connect(server.target, transport="shared_memory") as F:
                x = F.empty((4, 8, 256, 256), np.float32)
                x[...] = 1
                for _ in range(calls_count):
                    y = F.deconvolution_2d(x, filters)
                assert lent_bytes(os.getpid()) > 0
                wait_until(
                    lambda: lent_bytes(server.process.pid) == lent_bytes(os.getpid()) + ready_bytes
                )
                del x, y
            wait_until(lambda: lent_bytes(os.getpid()) == 0)
            wait_until(lambda: lent_bytes(server.process.pid) == ready_bytes)


@DEVICES
def test_what_was_let_go_is_borrowed_again(tmp_path: Path, device: str) -> None:
    """Two clients have all there is, so those before must be gone, to a card too; so must what one gave back."""
    filters = np.ones((8, 1, 1, 1), np.float32)
    limit = ("--shared-memory-bytes", "256Mi")
    with server_process(tmp_path, *limit, device=device) as server:
        for value in range(4):
            with connect(server.target, transport="shared_memory") as F:
                for samples_count in (4, 50):  # in a region of 64 MiB, and instead of it one of 100
                    x = F.empty((samples_count, 8, 256, 256), np.float32)
                    x[...] = value
                    y = F.deconvolution_2d(x, filters)
                    assert is_in_shared_memory(x)
                    assert (y == 8 * value).all()
                    del x, y
