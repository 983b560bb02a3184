"""The tensors of a call on the server, and corners of memory's life that take a peer of our own to reach."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deconvd.errors import InvalidArgumentError, StaleRegionError
from deconvd.host.array_address import address_of
from deconvd.lending.protocol import LendingOperation, LendingReply, LendingRequest, ReplyStatus
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope
from deconvd.wire.messages import messages_for
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.tensor import message_from_spec
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.shared_memory import Borrower, SharedCall, call_with_shared_memory
from deconvd_client.shared_memory.link import Link, LinkLostError
from deconvd_client.shared_memory.region import HostRegion
from deconvd_server.device.cpu.tensor import array_of
from deconvd_server.shared_memory import Lender, LoanLimits, SharedTensors
from deconvd_server.shared_memory.loans import BorrowerAccount, LoanRegistry
from deconvd_server.shared_memory.memfd_watcher import MemfdWatcher
from deconvd_server.shared_memory.memory import SealedMemory
from tests.deadlines import short_deadline
from tests.interrupts import interrupt_everywhere
from tests.lenders import MIB, MappingRecorder, memory_listener, start_lender
from tests.processes import descriptors_count, wait_until

SPEC = TensorSpec((4, 8), np.dtype(np.float32))
TIMEOUT_S = 30


def located(borrower: Borrower, array: Array) -> SharedSlice:
    place = borrower.locate(array)
    assert place is not None
    return place


def slice_of(message: pb.Tensor | None) -> SharedSlice:
    assert message is not None
    return SharedSlice.from_message(message.shared)


def test_an_operand_in_shared_memory_is_found_and_not_to_be_written(
    lender: Lender, borrower: Borrower
) -> None:
    theirs = borrower.empty(SPEC.shape, SPEC.dtype, short_deadline())
    theirs[...] = 3
    with SharedTensors(lender) as tensors:
        x = array_of(tensors.operand("x", SPEC, located(borrower, theirs)))

        assert (x == 3).all()
        assert not x.flags.writeable


def test_a_place_is_to_be_written(lender: Lender, borrower: Borrower) -> None:
    theirs = borrower.empty(SPEC.shape, SPEC.dtype, short_deadline())
    with SharedTensors(lender) as tensors:
        array_of(tensors.place("y_place", SPEC, located(borrower, theirs)))[...] = 5

    assert (theirs == 5).all()


def test_a_tensor_there_knows_where_it_lies(lender: Lender, borrower: Borrower) -> None:
    place = located(borrower, borrower.empty((3, *SPEC.shape), SPEC.dtype, short_deadline()))
    with SharedTensors(lender) as tensors:
        whole = tensors.host_place("x", replace(SPEC, shape=(3, *SPEC.shape)), place)
        for array in (whole, whole[1:], whole[::2], whole.view(np.uint8)):
            assert address_of(array) == array.__array_interface__["data"][0]


def test_what_a_call_uses_is_free_after_it(path: Path) -> None:
    watch = MappingRecorder()
    with start_lender(path, on_map=watch) as lender:
        borrower = Borrower(lambda _: str(path))
        place = located(borrower, borrower.empty(SPEC.shape, SPEC.dtype, short_deadline()))
        with SharedTensors(lender) as tensors:
            tensors.operand("x", SPEC, place)
            borrower.close()
            assert len(watch.mapped) == 1
        assert lender.wait_until_unused(TIMEOUT_S)
        assert watch.mapped == {}


def test_without_a_lender_no_memory_is_known() -> None:
    place = SharedSlice(bytes(16), 0)
    with SharedTensors(None) as tensors:
        with pytest.raises(StaleRegionError) as raised:
            tensors.operand("x", SPEC, place)
        assert raised.value.argument == "x"
        with pytest.raises(StaleRegionError):
            tensors.place("y_place", SPEC, place)


def test_a_wrong_place_is_named(lender: Lender, borrower: Borrower) -> None:
    place = located(borrower, borrower.empty(SPEC.shape, SPEC.dtype, short_deadline()))
    with SharedTensors(lender) as tensors, pytest.raises(InvalidArgumentError) as raised:
        tensors.place("y_place", SPEC, place._replace(offset_bytes=2))
    assert raised.value.argument == "y_place"


def test_memory_that_is_ready_after_its_client_has_gone_is_freed_at_once() -> None:
    watch = MappingRecorder()
    loans: LoanRegistry[SealedMemory] = LoanRegistry(LoanLimits(MIB, MIB))
    account = BorrowerAccount()
    loans.reserve(account, MIB)
    memory = SealedMemory(MIB, watch, MemfdWatcher())
    loans.close(account)

    name = loans.lend(account, memory)
    memory.close_descriptor()

    assert watch.mapped == {}
    assert loans.size_bytes == 0
    assert loans.use(name) is None


def test_a_lender_that_closes_while_it_maps_keeps_no_descriptor(path: Path) -> None:
    is_mapping, may_go_on = threading.Event(), threading.Event()

    def on_map(address: int, size_bytes: int) -> Callable[[], None]:
        is_mapping.set()
        assert may_go_on.wait(TIMEOUT_S)
        return lambda: None

    before = descriptors_count()
    lender = Lender([memory_listener(path)], LoanLimits(MIB, MIB), on_map=on_map)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(str(path))
        client.send(LendingRequest(LendingOperation.LEND, 1).pack())
        assert is_mapping.wait(TIMEOUT_S)
        closer = threading.Thread(target=lender.close)
        closer.start()
        assert client.recv(1) == b""  # the lender's thread is at its end
        may_go_on.set()
        closer.join(TIMEOUT_S)

    assert lender.wait_until_unused(TIMEOUT_S)
    wait_until(lambda: descriptors_count() <= before)


def test_a_copy_for_a_call_is_its_own_until_it_ends(lender: Lender, borrower: Borrower) -> None:
    x, other = np.full(MIB, 3, np.float32), np.full(MIB, 4, np.float32)
    with SharedCall(borrower, short_deadline()) as call:
        messages = [call.operand_message(array) for array in (x, other)]
        call.copy_operands()
        later = borrower.empty(MIB, np.float32, short_deadline())
        later[...] = 5
        with SharedTensors(lender) as tensors:
            operands = [tensors.operand("x", spec_of(x), slice_of(m)) for m in messages]
            found = [array_of(operand).mean() for operand in operands]
    assert found == [3, 4]


def test_an_operand_that_its_owner_drops_stays_until_the_call_ends(
    lender: Lender, borrower: Borrower
) -> None:
    with SharedCall(borrower, short_deadline()) as call:
        x = borrower.empty(MIB, np.float32, short_deadline())
        x[...] = 3
        spec, message = spec_of(x), call.operand_message(x)
        del x
        borrower.empty(MIB, np.float32, short_deadline())[...] = 5
        with SharedTensors(lender) as tensors:
            assert array_of(tensors.operand("x", spec, slice_of(message))).mean() == 3


def test_a_call_whose_memory_the_server_does_not_know_is_to_be_made_in_another_way(
    lender: Lender, borrower: Borrower
) -> None:
    def rpc(
        _: CallSpec,
        request: Envelope[Any],
        *,
        placed: Mapping[str, Array],
        overlapped_copy: OverlappedCopy | None,
        is_brief: bool,
    ) -> CallResult:
        assert is_brief
        assert placed.keys() == {"y"}
        assert request.message.x.WhichOneof("payload") == "shared"
        assert overlapped_copy is None  # x is small
        raise StaleRegionError("x must be in shared memory that this server lends", argument="x")

    x = np.zeros((1, 1, 100, 100), np.float32)
    problem = Problem(spec_of(x), spec_of(x), Geometry())
    request = pb.DeconvolveRequest(x=message_from_spec(problem.x))

    answered = call_with_shared_memory(
        borrower,
        rpc,
        CallSpec(DECONVOLVE, request, problem, {"x": x}, {"y": problem.y}, short_deadline()),
    )

    assert answered is None
    assert request.x.WhichOneof("payload") is None


@pytest.mark.usefixtures("lender")
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("operation", [DECONVOLVE, DECONVOLVE_GRAD])
def test_operands_have_the_places_of_the_call_before(
    borrower: Borrower, operation: Operation, *, keeps: bool
) -> None:
    # W, x and all gradients have the same size, so that each could take another's place
    spec = TensorSpec((64, 64, 4, 4), np.dtype(np.float32))
    problem = Problem(spec, spec, Geometry(pad=(2, 2), outsize=(3, 3)))
    wanted = ("y",) if operation is DECONVOLVE else ("gx", "gw")
    fields = operation.operands_for(wanted)
    arrays = {field: np.zeros(spec_of_field(problem, field).shape, np.float32) for field in fields}
    results = {field: spec_of_field(problem, field) for field in wanted}
    request: Any = messages_for(operation).request()
    response: Any = messages_for(operation).response()
    places: list[tuple[Sequence[int], Sequence[int]]] = []

    def rpc(
        _: CallSpec, request: Envelope[Any], *, placed: Mapping[str, Array], **__: object
    ) -> CallResult:
        read = [getattr(request.message, field).shared.offset_bytes for field in fields]
        written = [getattr(request.message, f"{field}_place").offset_bytes for field in wanted]
        places.append((read, written))
        return CallResult(response, dict(placed), "")

    kept: object = None
    for _ in range(6):
        call_spec = CallSpec(operation, request, problem, arrays, results, short_deadline())
        result = call_with_shared_memory(borrower, rpc, call_spec)
        assert result is not None
        kept = result.arrays if keeps else None
        del result

    assert kept is None or keeps
    assert len({tuple(read) for read, _ in places}) == 1
    own = [set(read) | set(written) for read, written in places]
    assert all(len(offsets) == len(fields) + len(wanted) for offsets in own)
    if keeps:  # the last result is there while the next is written
        assert places[::2] == [places[0]] * 3
        assert places[1::2] == [places[1]] * 3
        assert not set(places[0][1]) & set(places[1][1])
    else:
        assert places == [places[0]] * 6


def test_a_region_holds_what_lies_wholly_in_it() -> None:
    region = HostRegion(bytes(16), mmap.mmap(-1, 8192))
    begin, end = region.address, region.address + 8192

    assert region.contains(begin, 8192)
    assert region.contains(end - 4, 4)
    assert not region.contains(begin - 4, 4)
    assert not region.contains(end - 4, 8)
    assert not region.contains(end, 4)
    assert not region.contains(begin, 8196)


def test_a_block_that_went_is_taken_again_for_what_has_its_size() -> None:
    region = HostRegion(bytes(16), mmap.mmap(-1, 1 << 20))
    block, other = region.allocate(5000), region.allocate(5000)
    assert block is not None
    assert other is not None
    offset = block.offset
    assert region.reuse(5000) is None
    del block

    for size in (300, 4999, 5001, 9000):
        assert region.reuse(size) is None
    again = region.reuse(5000)

    assert again is not None
    assert again.offset == offset
    assert region.reuse(5000) is None
    del again
    region.collect()
    assert region.reuse(5000) is None
    assert region.allocate(5000) is not None
    region.close()
    del other
    assert region.reuse(5000) is None


def test_a_block_that_went_serves_the_same_field_alone() -> None:
    region = HostRegion(bytes(16), mmap.mmap(-1, 1 << 20))
    offsets: dict[str, int] = {}
    for field in ("w", "x", ""):
        block = region.allocate(5000)
        assert block is not None
        block.reference.field = field
        offsets[field] = block.offset
        del block

    assert region.reuse(5000, "y") is None
    again = {field: region.reuse(5000, field) for field in ("x", "", "w")}

    assert {field: block and block.offset for field, block in again.items()} == offsets
    del again
    assert region.reuse(4999, "x") is None
    assert region.reuse(5000, "x") is not None  # the field stays with the place


def test_what_a_call_may_still_write_is_not_taken_again() -> None:
    region = HostRegion(bytes(16), mmap.mmap(-1, 1 << 20))
    doubtful, sure = region.allocate(5000), region.allocate(9000)
    assert doubtful is not None
    assert sure is not None
    doubtful.reference.is_in_doubt = True
    del doubtful, sure

    assert region.reuse(9000) is None
    region.collect()

    assert region.allocate(100) is None  # it is closed
    assert region.is_empty


def test_blocks_never_overlap_or_are_lost_wherever_an_interrupt_strikes() -> None:
    region = HostRegion(bytes(16), mmap.mmap(-1, 1 << 20))
    held = region.allocate(5000)
    assert held is not None

    def use() -> None:
        blocks = [
            (held, 5000),
            *((region.allocate(size), size) for size in (100, 70000, 9000, 100)),
        ]
        del blocks[4], blocks[2]
        again = region.reuse(70000)
        assert again is not None
        region.collect()
        blocks += [(again, 70000), *((region.allocate(size), size) for size in (5000, 300))]
        places = sorted((block.offset, size) for block, size in blocks if block is not None)
        assert len(places) == len(blocks)
        assert all(offset + size <= other for (offset, size), (other, _) in pairwise(places))

    for _ in interrupt_everywhere(use):
        region.recover()
        assert region.allocated_bytes == 5056
    assert region.allocate((1 << 20) - 8192) is not None


class TestFalseLenders:
    """What a client takes from the other end of the socket."""

    @pytest.fixture
    def listener(self, path: Path) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(TIMEOUT_S)
            listener.bind(str(path))
            listener.listen()
            yield listener

    def serve(
        self, listener: socket.socket, packet: bytes, descriptors: list[int]
    ) -> threading.Thread:
        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                socket.send_fds(connection, [packet], descriptors)

        thread = threading.Thread(target=answer)
        thread.start()
        return thread

    @pytest.mark.parametrize(
        ("packet", "file_bytes", "complaint"),
        [
            (LendingReply(ReplyStatus.DONE, MIB, bytes(16)).pack(), MIB, "it is not sealed"),
            (
                LendingReply(ReplyStatus.DONE, MIB, bytes(16)).pack(),
                None,
                "it came without a descriptor",
            ),
            (b"HTTP/1.1 400 Bad Request", None, "does not answer"),
            (
                LendingReply(ReplyStatus.MALFORMED, text="what?").pack(),
                None,
                "the server refuses: what?",
            ),
        ],
    )
    def test_memory_that_is_of_no_use_is_refused(
        self,
        listener: socket.socket,
        path: Path,
        packet: bytes,
        file_bytes: int | None,
        complaint: str,
    ) -> None:
        descriptors = []
        if file_bytes is not None:
            descriptors.append(os.memfd_create("unsealed"))
            os.ftruncate(descriptors[0], file_bytes)
        before = descriptors_count()
        thread = self.serve(listener, packet, descriptors)
        link = Link(str(path))

        with pytest.raises(LinkLostError, match=complaint):
            link.borrow(MIB)

        link.close()
        thread.join()
        wait_until(lambda: descriptors_count() <= before)
        for descriptor in descriptors:
            os.close(descriptor)

    def test_sealed_memory_of_another_size_is_refused(
        self, listener: socket.socket, path: Path
    ) -> None:
        memory = SealedMemory(4096, MappingRecorder(), MemfdWatcher())
        thread = self.serve(
            listener, LendingReply(ReplyStatus.DONE, MIB, bytes(16)).pack(), [memory.descriptor]
        )
        link = Link(str(path))

        with pytest.raises(LinkLostError, match="it has another size"):
            link.borrow(MIB)

        link.close()
        thread.join()
        memory.close_descriptor()
        memory.unmap()
