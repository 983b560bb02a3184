"""A card's side of overlapped calls: results leave part by part, from memory that the card reaches by itself."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.errors import CallCancelledError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.daemon import Daemon
from deconvd_server.device import Departing, Operand, Place
from deconvd_server.device import arriving as device_arriving
from deconvd_server.device.arriving import ArrivalTimeoutError
from deconvd_server.device.cuda.api.registered_pool import SMALLEST_REGISTERED_BYTES
from deconvd_server.engine.engine import Engine
from deconvd_server.resources.budgets import budgets
from deconvd_server.settings import Settings
from tests.devices import Departure, make_arriving
from tests.processes import wait_until

if TYPE_CHECKING:
    from deconvd_server.device.cuda import device as cuda_device
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.execution import call_kind, pipeline
    from deconvd_server.device.cuda.execution.staging import Staging
else:
    pytest.importorskip("cupy")
    from deconvd_server.device.cuda import device as cuda_device
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.execution import call_kind, pipeline
    from deconvd_server.device.cuda.execution.staging import Staging

pytestmark = pytest.mark.gpu

F32 = np.dtype(np.float32)
OPTIONS = Options(cudnn_deterministic=True)
PARTS_COUNT = 8
MIB = 1 << 20


@pytest.fixture(scope="module")
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    yield device
    device.close()


def problem_of(dtype: DType = F32, n: int = 64) -> Problem:
    """Return a problem of which x and y have at least 16 MiB each."""
    return Problem(
        TensorSpec((n, 32, 64, 64), dtype),
        TensorSpec((32, 32, 3, 3), dtype),
        Geometry(pad=(1, 1)),
    )


def random_array(spec: TensorSpec, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


class Feed:
    """Operands that are received while the card waits for them, one behind the other.

    Args:
        pairs: Each operand, and what is received of it.
        step_bytes: How much comes at a time.
        stop_bytes: Where the sender pauses, once: a wait for more ends as if it had taken too long.
        error: What is raised there instead.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Array, Array]],
        step_bytes: int,
        stop_bytes: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self._targets = [target.reshape(-1).view(np.uint8) for target, _ in pairs]
        self._source = np.concatenate([s.reshape(-1).view(np.uint8) for _, s in pairs])
        self._step_bytes = step_bytes
        self._stop_bytes = self._source.size if stop_bytes is None else stop_bytes
        self._error = error
        self.there_bytes = 0

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        while timeout_s > 0 and self.there_bytes < min(size_bytes, self._stop_bytes):
            self._receive(self._step_bytes)
        if timeout_s > 0 and self.there_bytes < size_bytes:
            self._stop_bytes = self._source.size  # from the next wait on
            if self._error is not None:
                raise self._error
            return False
        return self.there_bytes >= size_bytes

    def receive_all(self) -> None:
        self._receive(self._source.size)

    def _receive(self, size_bytes: int) -> None:
        end = min(self.there_bytes + size_bytes, self._stop_bytes)
        begin = 0
        for target in self._targets:
            first, last = max(self.there_bytes - begin, 0), min(end - begin, target.size)
            if first < last:
                target[first:last] = self._source[begin + first : begin + last]
            begin += target.size
        self.there_bytes = end


def host_array(cuda: CudaDevice, spec: TensorSpec) -> Array:
    """Return an array that the card reaches, with elements that are no result."""
    array = cuda.allocate_host_array(spec)
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    return array


def expect(
    cuda: CudaDevice, operation: Operation, problem: Problem, sources: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the results of a call whose arrays are all there, where the card reaches them."""
    operands: dict[str, Operand] = {}
    for field, source in sources.items():
        operands[field] = there = host_array(cuda, spec_of(source))
        there[...] = source
    places = {f: host_array(cuda, spec_of_field(problem, f)) for f in operation.all_results}
    cuda.run(operation, problem, operands, places, OPTIONS, CallContext())
    return places


class Overlapped:
    """An overlapped call: its operands arrive in memory that the card reaches, and its results leave from there."""

    def __init__(
        self,
        cuda: CudaDevice,
        operation: Operation,
        problem: Problem,
        sources: Mapping[str, Array],
        step_bytes: int,
        stop_bytes: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self._operation, self._problem = operation, problem
        fields = [field for field in operation.write_order if field in sources]
        targets = [host_array(cuda, spec_of(sources[field])) for field in fields]
        pairs = [(t, sources[f]) for t, f in zip(targets, fields, strict=True)]
        self.feed = Feed(pairs, step_bytes, stop_bytes, error)
        arriving = make_arriving(self.feed, *targets)
        self.operands: dict[str, Operand] = dict(zip(fields, arriving, strict=True))
        self.departures = {
            field: Departure(host_array(cuda, spec_of_field(problem, field)))
            for field in operation.all_results
        }

    def run(self, runner: CudaDevice | Engine, call: CallContext | None = None) -> None:
        """Run it; the device itself need not tell of all."""
        places: dict[str, Place] = {f: d.place for f, d in self.departures.items()}
        runner.run(
            self._operation, self._problem, self.operands, places, OPTIONS, call or CallContext()
        )


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call wait for operands while they come, however long the plans take that it needs first."""
    monkeypatch.setattr(device_arriving, "_GRACE_S", 10)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("comes", ["slowly", "at once", "before"])
def test_y_leaves_in_parts_and_has_the_same_bits(
    cuda: CudaDevice, dtype: DType, comes: str
) -> None:
    problem = problem_of(dtype)
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]
    part_bytes = expected.nbytes // PARTS_COUNT
    engine = Engine(cuda, waiting_count=1)
    for _ in range(4):  # until all that can be captured is
        step_bytes = 300_001 if comes == "slowly" else 1 << 40
        call = Overlapped(cuda, DECONVOLVE, problem, sources, step_bytes)
        if comes == "before":
            call.feed.receive_all()
        call.run(engine)
        departure = call.departures["y"]
        np.testing.assert_array_equal(departure.array, expected)
        assert departure.seen == expected.tobytes()
        if comes != "before":
            assert departure.sizes_bytes == [*range(part_bytes, expected.nbytes + 1, part_bytes)]


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("comes", ["slowly", "at once", "before"])
def test_gradients_leave_one_by_one_and_have_the_same_bits(
    cuda: CudaDevice, dtype: DType, comes: str
) -> None:
    problem = problem_of(dtype, n=32)
    sources = {
        "x": random_array(problem.x),
        "w": random_array(problem.W, 1),
        "gy": random_array(problem.y, 2),
    }
    expected = expect(cuda, DECONVOLVE_GRAD, problem, sources)
    engine = Engine(cuda, waiting_count=1)
    for _ in range(4):
        step_bytes = 300_001 if comes == "slowly" else 1 << 40
        call = Overlapped(cuda, DECONVOLVE_GRAD, problem, sources, step_bytes)
        if comes == "before":
            call.feed.receive_all()
        call.run(engine)
        for field, departure in call.departures.items():
            np.testing.assert_array_equal(departure.array, expected[field])
            assert departure.seen == expected[field].tobytes()
            assert departure.sizes_bytes == [departure.array.nbytes]


def test_small_filters_on_the_card_share_their_graphs(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of()
    captures_count = 0
    capture = call_kind._capture

    def count(*arguments: Any) -> Any:
        nonlocal captures_count
        captures_count += 1
        return capture(*arguments)

    monkeypatch.setattr(call_kind, "_capture", count)
    x = host_array(cuda, problem.x)
    x[...] = random_array(problem.x)
    y = host_array(cuda, problem.y)
    filters = [random_array(problem.W, seed) for seed in range(4)]
    expected = [expect(cuda, DECONVOLVE, problem, {"x": x, "w": W})["y"] for W in filters]
    tensors = [cuda.empty(problem.W) for _ in filters]
    counts: list[int] = []
    for W, tensor, expected_y in zip(filters, tensors, expected, strict=True):
        cuda.write(tensor, W, CallContext())
        for _ in range(3):
            y[...] = np.nan
            cuda.run(DECONVOLVE, problem, {"x": x, "w": tensor}, {"y": y}, OPTIONS, CallContext())
            np.testing.assert_array_equal(y, expected_y)
        counts.append(captures_count)
    for tensor in tensors:
        cuda.free(tensor)
    assert counts == [counts[0]] * len(filters)


def test_a_large_result_leaves_in_parts_even_if_all_operands_are_there(
    cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_EARLY_BYTES", MIB)
    problem = problem_of()
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]
    for _ in range(4):
        call = Overlapped(cuda, DECONVOLVE, problem, sources, MIB)
        call.feed.receive_all()
        call.run(cuda)
        assert len(call.departures["y"].sizes_bytes) == PARTS_COUNT
        assert call.departures["y"].seen == expected.tobytes()


def test_a_call_that_times_out_has_told_what_is_final_and_is_repeated_for_the_rest(
    cuda: CudaDevice,
) -> None:
    problem = problem_of()
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]
    stop_bytes = sources["w"].nbytes + sources["x"].nbytes * 5 // PARTS_COUNT + 7
    call = Overlapped(cuda, DECONVOLVE, problem, sources, MIB, stop_bytes)
    departure, told_bytes = call.departures["y"], expected.nbytes * 5 // PARTS_COUNT
    with pytest.raises(ArrivalTimeoutError):
        call.run(cuda)
    assert departure.sizes_bytes[-1] == told_bytes
    assert departure.seen == expected.tobytes()[:told_bytes]

    departure.array.reshape(-1).view(np.uint8)[:told_bytes] = 7  # nobody writes there again
    call.run(Engine(cuda, waiting_count=1))
    assert departure.seen == expected.tobytes()
    assert (departure.array.reshape(-1).view(np.uint8)[:told_bytes] == 7).all()

    whole = Overlapped(cuda, DECONVOLVE, problem, sources, MIB, stop_bytes)
    whole.run(Engine(cuda, waiting_count=1))  # both in one
    np.testing.assert_array_equal(whole.departures["y"].array, expected)
    assert whole.departures["y"].seen == expected.tobytes()


def test_gradients_that_time_out_are_repeated_for_the_rest(cuda: CudaDevice) -> None:
    problem = problem_of(n=32)
    sources = {
        "x": random_array(problem.x),
        "w": random_array(problem.W, 1),
        "gy": random_array(problem.y, 2),
    }
    expected = expect(cuda, DECONVOLVE_GRAD, problem, sources)
    stop_bytes = sources["w"].nbytes + sources["gy"].nbytes + 5  # gx needs no more
    call = Overlapped(cuda, DECONVOLVE_GRAD, problem, sources, MIB, stop_bytes)
    with pytest.raises(ArrivalTimeoutError):
        call.run(cuda)
    assert call.departures["gx"].sizes_bytes == [expected["gx"].nbytes]
    assert call.departures["gw"].sizes_bytes == []
    call.departures["gx"].array[...] = 7
    call.run(Engine(cuda, waiting_count=1))
    assert (call.departures["gx"].array == 7).all()
    for field, departure in call.departures.items():
        assert departure.seen == expected[field].tobytes()


def test_a_call_whose_client_goes_has_told_nothing_but_what_is_final(cuda: CudaDevice) -> None:
    problem = problem_of()
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]
    for part in range(PARTS_COUNT):
        stop_bytes = sources["w"].nbytes + sources["x"].nbytes * part // PARTS_COUNT
        error = ConnectionBrokenError("it has gone")
        call = Overlapped(cuda, DECONVOLVE, problem, sources, MIB, stop_bytes, error)
        with pytest.raises(ConnectionBrokenError):
            call.run(cuda)
        seen = call.departures["y"].seen
        assert len(seen) <= expected.nbytes * part // PARTS_COUNT
        assert expected.tobytes().startswith(seen)


def test_a_call_that_is_cancelled_tells_nothing(cuda: CudaDevice) -> None:
    problem = problem_of()
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    call, context = Overlapped(cuda, DECONVOLVE, problem, sources, MIB), CallContext()
    context.cancel()
    with pytest.raises(CallCancelledError):
        call.run(cuda, context)
    assert call.departures["y"].sizes_bytes == []


def test_whoever_is_told_may_fail(cuda: CudaDevice) -> None:
    problem = problem_of()
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]

    def fail(_size_bytes: int) -> None:
        raise ConnectionBrokenError("nobody listens")

    call = Overlapped(cuda, DECONVOLVE, problem, sources, MIB)
    place = Departing(host_array(cuda, problem.y), fail)
    with pytest.raises(ConnectionBrokenError):
        cuda.run(DECONVOLVE, problem, call.operands, {"y": place}, OPTIONS, CallContext())

    again = Overlapped(cuda, DECONVOLVE, problem, sources, MIB)
    again.run(cuda)
    assert again.departures["y"].seen == expected.tobytes()


@pytest.mark.parametrize("n", [1, 23], ids=["small", "not divided"])
def test_results_that_leave_in_no_parts_are_told_of_in_the_end(cuda: CudaDevice, n: int) -> None:
    problem = problem_of(n=n)
    sources = {"x": random_array(problem.x), "w": random_array(problem.W, 1)}
    expected = expect(cuda, DECONVOLVE, problem, sources)["y"]
    for is_plain in (False, True):
        call = Overlapped(cuda, DECONVOLVE, problem, sources, MIB)
        if is_plain:  # the card does not reach y
            call.departures["y"] = Departure(np.full_like(expected, 77))
        call.run(Engine(cuda, waiting_count=1))
        assert call.departures["y"].seen == expected.tobytes()


def test_host_arrays_are_reached_by_the_card_and_used_again(cuda: CudaDevice) -> None:
    spec = TensorSpec((101, 1000, 251), F32)
    array = cuda.allocate_host_array(spec)
    address = array.ctypes.data
    assert cuda_device._HOST_MEMORY.holds(array)
    del array
    registered_bytes = cuda._host_arrays.registered_bytes
    for size in (250, 252, 251):
        array = cuda.allocate_host_array(TensorSpec((101, 1000, size), F32))
        assert array.ctypes.data == address
        del array
    assert cuda._host_arrays.registered_bytes == registered_bytes


def test_twenty_thousand_sizes_of_host_arrays_stay_within_the_limit(cuda: CudaDevice) -> None:
    sizes = np.random.default_rng(0).integers(SMALLEST_REGISTERED_BYTES, MIB, 20_000)
    before_bytes = cuda._host_arrays.registered_bytes
    for size_bytes in sizes:
        cuda.allocate_host_array(TensorSpec((int(size_bytes),), np.dtype(np.uint8)))
    assert cuda._host_arrays.idle_bytes <= budgets().registered_bytes
    assert cuda._host_arrays.registered_bytes - before_bytes <= 17 * MIB


def test_a_lasting_host_array_is_unregistered_once_it_is_dropped(cuda: CudaDevice) -> None:
    spec = TensorSpec((5 * MIB + 3,), np.dtype(np.uint8))
    before_bytes = cuda._host_arrays.registered_bytes
    array = cuda.allocate_host_array(spec, is_lasting=True)
    assert cuda_device._HOST_MEMORY.holds(array)
    taken_bytes = cuda._host_arrays.registered_bytes - before_bytes
    assert spec.nbytes <= taken_bytes < spec.nbytes + mmap.PAGESIZE
    del array
    wait_until(lambda: cuda._host_arrays.registered_bytes == before_bytes)


def test_a_device_that_closes_leaves_nothing_registered_of_its_own() -> None:
    memory = cuda_device._HOST_MEMORY
    with_others = cuda_device._HOST_ARRAYS._users_count > 0
    device = CudaDevice(0)
    array = device.allocate_host_array(TensorSpec((MIB,), F32))
    assert memory.holds(array)
    device.close()
    assert memory.holds(array) == with_others
    array[...] = 7
    assert (array == 7).all()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_slices_of_streams_are_not_staged(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    staged: list[int] = []
    upload, download = Staging.upload, Staging.download

    def note(array: Array) -> None:
        if array.nbytes >= MIB and not cuda_device._HOST_MEMORY.holds(array):
            staged.append(array.nbytes)

    def noted_upload(self: Staging, source: Array, target: int, check: Callable[[], None]) -> None:
        note(source)
        upload(self, source, target, check)

    def noted_download(
        self: Staging, source: int, target: Array, check: Callable[[], None]
    ) -> None:
        note(target)
        download(self, source, target, check)

    monkeypatch.setattr(Staging, "upload", noted_upload)
    monkeypatch.setattr(Staging, "download", noted_download)
    x, W = random_array(problem_of().x), random_array(problem_of().W, 1)
    daemon = Daemon(Settings(["127.0.0.1:0"], 4 * MIB, drain_timeout_s=10), [])
    daemon.serve(lambda: [CudaDevice(0)])
    try:
        with deconvd_client.connect(daemon.addresses[0], transport=transport, timeout_s=60) as F:
            y = F.deconvolution_2d(x, W)
            F.deconvolution_2d_grad(x, W, None, y)
            staged.clear()
            again = F.deconvolution_2d(x, W)
            F.deconvolution_2d_grad(x, W, None, y)
    finally:
        daemon.drain()
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-4)
    assert staged == []
