"""Tensors that stay on the server: the same results, sent once, and there again when they were lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from benchmarks.wire import CountingProxy, count_traffic
from deconvd.model.dtypes import Array
from deconvd_client import Connection, InvalidArgumentError, LostTensorError, RemoteTensor
from tests.golden import GoldenCase, golden_cases
from tests.processes import memory_bytes, wait_until
from tests.servers import ServerProcess, call_until_served, only_server, server_process
from tests.session_clients import open_session

MIB = 1 << 20
TCP = "127.0.0.1:0"
CASES = [case for case in golden_cases() if not case.rejected and not case.gradients_fail]


def operands(seed: int = 0, n: int = 4) -> tuple[Array, Array, Array]:
    """x of n / 8 MiB, W of 144 KiB and b."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, 32, 32, 32)).astype(np.float32)
    W = random.standard_normal((32, 32, 6, 6)).astype(np.float32)
    return x, W, random.standard_normal(32).astype(np.float32)


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on both kinds of addresses."""
    with server_process(tmp_path_factory.mktemp("tcp"), listen=(TCP, "unix")) as running:
        yield running


@pytest.fixture(params=["tcp", "unix", "shared_memory"])
def way(request: pytest.FixtureRequest, tcp_server: ServerProcess) -> Iterator[Connection]:
    """A connection by each way in turn. Otherwise it learns when slices pay, and they change the order of sums."""
    target = tcp_server.targets[0 if request.param == "tcp" else 1]
    with (
        deconvd_client.connect(target, transport=request.param) as connection,
        connection.using_config("cudnn_deterministic", True),
    ):
        yield connection


@pytest.fixture
def wire(tcp_server: ServerProcess) -> Iterator[CountingProxy]:
    """A counting way to the server."""
    with count_traffic(tcp_server.target) as wire:
        yield wire


@pytest.fixture
def far(wire: CountingProxy) -> Iterator[Connection]:
    """A connection by the counting way alone."""
    with deconvd_client.connect(wire.target, transport="tcp") as connection:
        connection.put(np.ones(1))  # opens the session, which other calls do not wait for
        yield connection


@contextmanager
def mortal_server(directory: Path, *options: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run a server, and give its target and what kills it and starts another in its place."""
    with ExitStack() as stack:
        first = stack.enter_context(server_process(directory, *options, listen=(TCP,)))

        def succeed() -> None:
            first.end(signal.SIGKILL)
            second = directory / "second"
            second.mkdir()
            stack.enter_context(server_process(second, *options, listen=(first.target,)))

        yield first.target, succeed


class TestResults:
    """Numbers are the same to the last bit, wherever operands and results lie."""

    @pytest.mark.parametrize("case", CASES[::12], ids=str)
    def test_of_tensors_that_were_put(self, way: Connection, case: GoldenCase) -> None:
        a = case.arrays
        b = a.get("b")
        x, W, gy = (way.put(a[name]) for name in ("x", "W", "gy"))
        there = None if b is None else way.put(b)

        y = way.deconvolution_2d(x, W, there, **case.params)
        gradients = way.deconvolution_2d_grad(x, W, there, gy, **case.params)

        assert_same(y, way.deconvolution_2d(a["x"], a["W"], b, **case.params))
        plain = way.deconvolution_2d_grad(a["x"], a["W"], b, a["gy"], **case.params)
        for ours, theirs in zip(gradients, plain, strict=True):
            assert_same(ours, theirs)

    @pytest.mark.parametrize("case", CASES[::12], ids=str)
    def test_of_a_pullback(self, way: Connection, case: GoldenCase) -> None:
        a = case.arrays
        arguments = a["x"], a["W"], a.get("b")

        y, pullback = way.vjp(*arguments, **case.params)

        assert_same(y, way.deconvolution_2d(*arguments, **case.params))
        plain = way.deconvolution_2d_grad(*arguments, a["gy"], **case.params)
        for ours, theirs in zip(pullback(a["gy"]), plain, strict=True):
            assert_same(ours, theirs)

    @pytest.mark.parametrize("case", CASES[::12], ids=str)
    def test_that_stay_on_the_server(self, way: Connection, case: GoldenCase) -> None:
        a = case.arrays
        arguments = a["x"], a["W"], a.get("b")

        y = way.remote.deconvolution_2d(*arguments, **case.params)
        gradients = way.remote.deconvolution_2d_grad(*arguments, a["gy"], **case.params)

        plain = way.deconvolution_2d(*arguments, **case.params)
        assert (y.shape, y.dtype, y.nbytes) == (plain.shape, plain.dtype, plain.nbytes)
        assert_same(y.numpy(), plain)
        expected = way.deconvolution_2d_grad(*arguments, a["gy"], **case.params)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert_same(None if ours is None else ours.numpy(), theirs)

    @pytest.mark.parametrize("n", [4, 80], ids=["in messages", "in streams"])
    def test_of_a_chain(self, way: Connection, n: int) -> None:
        x, W, b = operands(n=n)

        there = way.remote.deconvolution_2d(x, W, b, 2, 2)
        gx = way.remote.deconvolution_2d_grad(x, W, b, there, 2, 2, wanted=["gx"]).gx
        assert gx is not None
        chained = way.deconvolution_2d(gx, W)

        y = way.deconvolution_2d(x, W, b, 2, 2)
        expected = way.deconvolution_2d_grad(x, W, b, y, 2, 2, wanted=["gx"]).gx
        assert_same(there.numpy(), y)
        assert_close(gx.numpy(), expected)
        assert_close(chained, way.deconvolution_2d(gx.numpy(), W))

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
    @pytest.mark.parametrize("shape", [(), (3,), (0, 4), (40, 1024, 64)], ids=str)
    def test_what_is_put_comes_back(
        self, way: Connection, shape: tuple[int, ...], dtype: Any
    ) -> None:
        array = np.random.default_rng(0).standard_normal(shape).astype(dtype)

        there = way.put(array)

        assert (there.shape, there.dtype, there.nbytes) == (shape, array.dtype, array.nbytes)
        assert_same(there.numpy(), array)
        assert there.numpy() is not array

    @pytest.mark.parametrize("layout", ["reversed", "big-endian", "fortran"])
    def test_any_layout_is_put(self, way: Connection, layout: str) -> None:
        x = operands()[0]
        odd = {"reversed": x[::-1, :, ::-2], "big-endian": x.astype(">f4")}
        array = odd.get(layout, np.asfortranarray(x))

        assert_same(way.put(array).numpy(), array.astype(np.float32))


def assert_same(ours: Array | None, theirs: Array | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def assert_close(ours: Array, theirs: Array | None) -> None:
    """Where slices are cut in another way, sums of 1,000 products have another order."""
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-2)


class TestOnTheWire:
    """What is sent, counted."""

    def test_what_was_put_is_not_sent_again(self, far: Connection, wire: CountingProxy) -> None:
        x, W, b = operands()
        x_there, W_there, b_there = (far.put(array) for array in (x, W, b))
        y_bytes = far.deconvolution_2d(x_there, W_there, b_there).nbytes
        before = wire.sent_bytes, wire.received_bytes

        far.deconvolution_2d(x_there, W_there, b_there)

        assert wire.sent_bytes - before[0] < 2000
        assert wire.received_bytes - before[1] < y_bytes * 1.01 + 2000

    def test_a_chain_moves_nothing(self, far: Connection, wire: CountingProxy) -> None:
        x, W, b = (far.put(array) for array in operands())
        far.remote.deconvolution_2d(x, W, b)
        before = wire.total_bytes

        y = far.remote.deconvolution_2d(x, W, b)
        gradients = far.remote.deconvolution_2d_grad(x, W, b, y)
        again = far.remote.deconvolution_2d(y, W, gradients.gb)

        assert wire.total_bytes - before < 10_000
        assert again.shape == (4, 32, 42, 42)

    def test_a_pullback_sends_gy_alone(self, far: Connection, wire: CountingProxy) -> None:
        x, W, b = operands()
        y, pullback = far.vjp(x, W, b)
        before = wire.sent_bytes

        for _ in range(3):
            pullback(y)

        assert wire.sent_bytes - before < 3 * y.nbytes * 1.01 + 10_000

    @pytest.mark.parametrize("n", [1, 80], ids=["in messages", "in streams"])
    def test_W_is_sent_once(self, far: Connection, wire: CountingProxy, n: int) -> None:
        x, W, b = operands(n=n)
        y = far.deconvolution_2d(x, W, b)
        before = wire.sent_bytes

        far.deconvolution_2d(x, W, b)
        far.deconvolution_2d_grad(x, W, b, y, wanted=["gx"])

        assert wire.sent_bytes - before < (x.nbytes + y.nbytes) * 1.01 + W.nbytes / 2

    def test_a_pullback_sends_W_once_too(self, far: Connection, wire: CountingProxy) -> None:
        x, W, b = operands(n=1)
        far.deconvolution_2d(x, W, b)
        before = wire.sent_bytes

        pullbacks = [far.vjp(x, W, b)[1] for _ in range(2)]

        assert len(pullbacks) == 2
        assert wire.sent_bytes - before < 2 * x.nbytes * 1.01 + W.nbytes / 2

    def test_what_lies_in_shared_memory_is_not_named_by_its_content(
        self, server: ServerProcess
    ) -> None:
        x, W, b = operands(n=1)
        with deconvd_client.connect(server.target) as F:
            F.deconvolution_2d(x, W, b)

            assert not only_server(F).residents.has_session  # without which nothing is kept

    @pytest.mark.parametrize("n", [1, 80], ids=["in messages", "in streams"])
    def test_two_connections_of_one_tenant_share_large_contents(
        self,
        tcp_server: ServerProcess,
        wire: CountingProxy,
        n: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        x, W, b = operands(seed=n, n=n)
        module = "deconvd_client.residents.known_digests"
        monkeypatch.setattr(f"{module}._MIN_HOPED_BYTES", W.nbytes)
        key = "a tenant's secret"
        options: dict[str, Any] = {"transport": "tcp", "tenant_key": key}
        with deconvd_client.connect(tcp_server.target, **options) as first:
            first.put(np.ones(1))  # opens the session, which other calls do not wait for
            expected = first.deconvolution_2d(x, W, b)
            with deconvd_client.connect(wire.target, **options) as second:
                second.put(np.ones(1))
                assert_same(second.deconvolution_2d(x, W, b), expected)
                assert wire.sent_bytes < x.nbytes * 1.01 + W.nbytes

                W += 1  # which the server has from nobody: it is sent once the server has said so
                assert_same(second.deconvolution_2d(x, W, b), first.deconvolution_2d(x, W + 0, b))

    def test_two_tenants_share_nothing(
        self, tcp_server: ServerProcess, wire: CountingProxy
    ) -> None:
        x, W, b = operands(seed=2, n=1)
        target = tcp_server.target
        with deconvd_client.connect(target, transport="tcp", tenant_key="one") as first:
            first.put(np.ones(1))
            expected = first.deconvolution_2d(x, W, b)
            with deconvd_client.connect(wire.target, transport="tcp") as second:
                assert_same(second.deconvolution_2d(x, W, b), expected)
        assert wire.sent_bytes > W.nbytes


class TestContent:
    """A tensor means what its array held when it was given."""

    def test_an_array_changed_after_put_is_another(self, way: Connection) -> None:
        x, W, b = operands()
        expected = way.deconvolution_2d(x, W, b)
        there = way.put(W)
        W[...] = 0

        assert_same(way.deconvolution_2d(x, there, b), expected)

    def test_an_operand_changed_after_vjp_is_another(self, way: Connection) -> None:
        x, W, b = operands()
        y, pullback = way.vjp(x, W, b)
        expected = way.deconvolution_2d_grad(x, W, b, y)
        x[...] = 0
        W[...] = 0

        for ours, theirs in zip(pullback(y), expected, strict=True):
            assert_same(ours, theirs)

    def test_a_filter_changed_between_calls_is_seen(self, far: Connection) -> None:
        x, W, b = operands(n=1)
        for step in range(5):
            W[step, 0, 0, step] += 1
            expected = far.deconvolution_2d(x, far.put(W), b)
            assert_same(far.deconvolution_2d(x, W, b), expected)

    def test_the_same_bytes_in_another_shape_are_another(self, far: Connection) -> None:
        x, W, _ = operands(n=1)
        turned = W.reshape(32, 32, 4, 9)

        y, other = far.deconvolution_2d(x, W), far.deconvolution_2d(x, turned)

        assert_same(y, far.deconvolution_2d(x, far.put(W)))
        assert_same(other, far.deconvolution_2d(x, far.put(turned)))


class TestLoss:
    """What the server loses is sent again, where it still can be."""

    def test_tensors_come_back_after_a_restart(self, tmp_path: Path) -> None:
        x, W, b = operands()
        with (
            mortal_server(tmp_path) as (target, restart),
            deconvd_client.connect(target, timeout_s=20) as F,
        ):
            x_there, W_there, b_there = (F.put(array) for array in (x.astype(">f4"), W, b))
            y, pullback = F.vjp(x, W, b)
            gradients = pullback(y)
            restart()
            call_until_served(F, x, W)

            assert_same(x_there.numpy(), x)
            assert_same(F.deconvolution_2d(x_there, W_there, b_there), y)
            for ours, theirs in zip(pullback(y), gradients, strict=True):
                assert_same(ours, theirs)

    def test_content_is_sent_again_after_a_restart(self, tmp_path: Path) -> None:
        x, W, b = operands()
        with (
            mortal_server(tmp_path) as (target, restart),
            deconvd_client.connect(target, timeout_s=20, transport="tcp") as F,
        ):
            y = F.deconvolution_2d(x, W, b)
            assert_same(F.deconvolution_2d(x, W, b), y)
            restart()
            call_until_served(F, x, W)

            for _ in range(3):
                assert_same(F.deconvolution_2d(x, W, b), y)

    def test_a_loss_beyond_repair_names_the_argument_and_why(self, tmp_path: Path) -> None:
        x, W, b = operands()
        with (
            mortal_server(tmp_path) as (target, restart),
            deconvd_client.connect(target, timeout_s=20) as F,
        ):
            changed = F.put(W)
            y, pullback = F.vjp(x, W, b)
            result = F.remote.deconvolution_2d(x, W, b)
            W[0, 0, 0, 0] += 1
            restart()
            call_until_served(F, x, W)

            for call in (
                lambda: F.deconvolution_2d(x, changed),
                lambda: F.remote.deconvolution_2d(x, changed),
                lambda: pullback(y),
            ):
                with pytest.raises(
                    LostTensorError, match=r"W is lost.*has changed since: call put\(\)"
                ) as raised:
                    call()
                assert raised.value.argument == "W"
            with pytest.raises(
                LostTensorError,
                match=r"gy is lost.*result that only the server had: compute it again",
            ):
                F.deconvolution_2d_grad(x, W, b, result)
            with pytest.raises(LostTensorError, match=r"the tensor is lost.*result"):
                result.numpy()
            with pytest.raises(LostTensorError, match=r"the tensor is lost.*changed since"):
                changed.numpy()
            assert pullback(y, wanted=["gW"]).gW is not None  # which takes no W

    def test_what_was_evicted_is_sent_again(self, tmp_path: Path) -> None:
        memory = ("--resident-memory-bytes", str(4 * MIB), "--spill-memory-bytes", "0")
        with (
            server_process(tmp_path, *memory) as server,
            deconvd_client.connect(server.target) as F,
            deconvd_client.connect(server.target) as other,
        ):
            inputs = [operands(seed) for seed in range(5)]
            expected = [F.deconvolution_2d(*given) for given in inputs]
            result = F.remote.deconvolution_2d(*inputs[0])
            there = [(F.put(x), F.put(W), F.put(b)) for x, W, b in inputs[:4]]
            theirs = [other.put(x) for x, _, _ in inputs[:4]]  # half of the memory is theirs

            with pytest.raises(LostTensorError):
                result.numpy()
            for _ in range(2):
                for given, kept, y in zip(inputs[:4], there, expected, strict=False):
                    assert_same(F.deconvolution_2d(*kept), y)
                    assert_same(kept[0].numpy(), given[0])
            for x, kept_x in zip(inputs[:4], theirs, strict=True):
                assert_same(kept_x.numpy(), x[0])

    def test_a_session_outlives_a_broken_way(self, wire: CountingProxy) -> None:
        x, W, b = operands()
        with deconvd_client.connect(wire.target, transport="tcp", timeout_s=20) as F:
            result = F.remote.deconvolution_2d(x, W, b)
            expected = result.numpy()
            for _ in range(3):
                wire.cut()
                assert_same(result.numpy(), expected)
                time.sleep(0.3)  # a new session is opened meanwhile, and is cut as well

    def test_calls_go_on_over_a_way_that_breaks(self, wire: CountingProxy) -> None:
        # whole numbers, whose sums are the same in any order: how a call is sliced depends on the link and on its cuts
        x, W, b = (np.round(2 * array) for array in operands(n=40))
        with deconvd_client.connect(wire.target, transport="tcp", timeout_s=30) as F:
            there = F.put(x)
            y = F.deconvolution_2d(x, W, b)
            gradients = F.deconvolution_2d_grad(x, W, b, y)

            def work(_: int) -> None:
                again, pullback = F.vjp(there, W, b)
                assert_same(again, y)
                for ours, theirs in zip(pullback(y), gradients, strict=True):
                    assert_same(ours, theirs)

            with ThreadPoolExecutor(2) as threads:
                done = threads.map(work, range(6))
                for _ in range(3):
                    time.sleep(0.2)  # calls are under way again
                    wire.cut()
                assert list(done) == [None] * 6

    def test_displaced_contents_are_sent_again(self, tmp_path: Path) -> None:
        x, _, b = operands(n=1)
        filters = [operands(seed)[1] for seed in range(3)]  # two of which are over the quota
        with server_process(tmp_path, "--tenant-bytes", str(MIB // 4)) as server:
            with deconvd_client.connect(server.target, transport="unix") as F:
                first = [F.deconvolution_2d(x, W, b) for W in filters]
                second = [F.deconvolution_2d(x, W, b) for W in filters]
        for ours, theirs in zip(second, first, strict=True):
            assert_same(ours, theirs)

    def test_a_session_outlives_its_lease_for_as_long_as_the_client_lives(
        self, tmp_path: Path
    ) -> None:
        x, W, b = operands()
        with server_process(tmp_path, "--session-lease-s", "1") as server:
            with deconvd_client.connect(server.target) as F:
                result = F.remote.deconvolution_2d(x, W, b)
                time.sleep(3)  # three leases
                assert_same(result.numpy(), F.deconvolution_2d(x, W, b))


class TestLife:
    """Tensors go when nobody can use them, and nothing else does."""

    @pytest.mark.usefixtures("unmeasured")
    def test_ten_thousand_put_and_dropped_leave_nothing(self, tmp_path: Path) -> None:
        array = np.ones(4096, np.float32)
        with server_process(tmp_path) as server, deconvd_client.connect(server.target) as F:

            def put_many(count: int) -> tuple[int, int]:
                for i in range(count):
                    array[0] = i
                    F.put(array)
                wait_until(lambda: kept_count(F) == 0)
                return memory_bytes(os.getpid()), memory_bytes(server.process.pid)

            before = put_many(2000)
            after = put_many(8000)

        # 8,000 tensors would be 128 MiB
        assert after[0] - before[0] < 16 * MIB
        assert after[1] - before[1] < 16 * MIB

    def test_what_is_collected_is_dropped(self, server: ServerProcess) -> None:
        x, W, b = operands()
        with deconvd_client.connect(server.target) as F:
            kept: list[object] = [F.put(x), F.remote.deconvolution_2d(x, W, b), F.vjp(x, W, b)[1]]
            assert kept_count(F) == 4
            kept.clear()
            gc.collect()
            wait_until(lambda: kept_count(F) == 0)

    def test_a_block_closes_what_it_puts(self, F: Connection) -> None:
        x, W, b = operands()
        with F.put(x) as there, F.vjp(x, W, b)[1] as pullback:
            y = F.deconvolution_2d(there, W, b)
        wait_until(lambda: kept_count(F) == 0)

        with pytest.raises(
            InvalidArgumentError,
            match=r"x was closed before this call\. Call put\(\) again",
        ):
            F.deconvolution_2d(there, W)
        with pytest.raises(InvalidArgumentError, match="closed"):
            there.numpy()
        with pytest.raises(InvalidArgumentError, match="the pullback was closed before this call"):
            pullback(y)
        assert "closed" in repr(there)
        there.close()

    def test_a_pullback_keeps_what_its_caller_closes(self, F: Connection) -> None:
        x, W, b = operands()
        with F.put(x) as there:
            y, pullback = F.vjp(there, W, b)

        assert_same(pullback(y).gW, F.deconvolution_2d_grad(x, W, b, y).gW)

    def test_a_closed_connection_keeps_nothing(self, tmp_path: Path) -> None:
        x, _, _ = operands()
        with server_process(tmp_path) as server, open_session(server.target, b"key") as other:
            with deconvd_client.connect(server.target, tenant_key="key") as F:
                there = F.put(x)
                assert other.resident_count() == 1
            wait_until(lambda: other.resident_count() == 0)
            with pytest.raises(deconvd_client.CallCancelledError):
                there.numpy()

    def test_a_connection_that_is_collected_keeps_nothing(self, tcp_server: ServerProcess) -> None:
        with open_session(tcp_server.target, b"collected") as other:
            F = deconvd_client.connect(tcp_server.target, transport="tcp", tenant_key="collected")
            there = F.put(operands()[0])
            assert other.resident_count() == 1
            del F, there
            gc.collect()
            wait_until(lambda: other.resident_count() == 0)

    def test_a_client_that_dies_leaves_nothing(self, tmp_path: Path) -> None:
        script = (
            "import sys, numpy, deconvd_client\n"
            "F = deconvd_client.connect(sys.argv[1], tenant_key='key')\n"
            "there = F.put(numpy.ones(9000, 'f4'))\n"
            "print('put', flush=True)\n"
            "sys.stdin.read()\n"
        )
        with server_process(tmp_path) as server, open_session(server.target, b"key") as other:
            with subprocess.Popen(
                [sys.executable, "-W", "error", "-c", script, server.target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as child:
                assert child.stdout is not None
                assert child.stdout.readline() == b"put\n"
                assert other.resident_count() == 1
                child.kill()
            wait_until(lambda: other.resident_count() == 0)

    def test_a_session_does_not_keep_its_process_alive(self, server: ServerProcess) -> None:
        script = (
            "import sys, numpy, deconvd_client\n"
            "F = deconvd_client.connect(sys.argv[1], transport='unix')\n"
            "there = F.put(numpy.ones(9000, 'f4'))\n"
            "y, pullback = F.vjp(*numpy.ones((2, 1, 1, 9, 9), 'f4'))\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, server.target],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.usefixtures("unmeasured")
    def test_a_forked_child_leaves_its_parents_tensors_alone(self, server: ServerProcess) -> None:
        script = (
            "import gc, os, sys, time, numpy, deconvd_client\n"
            "F = deconvd_client.connect(sys.argv[1], tenant_key='both')\n"
            "x = numpy.ones((1, 4, 9, 9), 'f4')\n"
            "W = numpy.ones((1, 64, 9, 9), 'f4')\n"
            "there = F.remote.deconvolution_2d(x, x[0, :, None])\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    for use in (there.numpy, lambda: F.put(x), lambda: F.deconvolution_2d(there, W)):\n"
            "        try:\n"
            "            use()\n"
            "        except deconvd_client.UnavailableError as error:\n"
            "            assert 'a forked child' in str(error)\n"
            "        else:\n"
            "            os._exit(1)\n"
            "    there = use = None\n"
            "    gc.collect()\n"
            "    os._exit(0)\n"
            "assert os.waitpid(child, 0)[1] == 0\n"
            "time.sleep(0.5)  # what the child may have said to the server takes effect meanwhile\n"
            "print(there.numpy().sum())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, server.target],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "26244.0\n"), done.stderr

    def test_threads_share_tensors(self, way: Connection) -> None:
        x, W, b = operands(n=1)
        there = way.put(W)
        inputs = [x + i for i in range(24)]
        expected = [way.deconvolution_2d(x, W, b) for x in inputs]

        def work(x: Array) -> tuple[Array, Array, Array]:
            y, pullback = way.vjp(x, there, b)
            result = way.remote.deconvolution_2d(x, W, way.put(b))
            gW = pullback(result).gW
            assert gW is not None
            return y, result.numpy(), gW

        with ThreadPoolExecutor(8) as threads:
            for x, y, (ours, fetched, gW) in zip(
                inputs, expected, threads.map(work, inputs), strict=True
            ):
                assert_same(ours, y)
                assert_same(fetched, y)
                assert_same(gW, way.deconvolution_2d_grad(x, W, b, y).gW)


def kept_count(F: Connection) -> int:
    """Return how many tensors the server keeps for a connection's tenant."""
    (device,) = F.server_info().devices
    return sum(cache.count for cache in device.caches if cache.name.startswith("resident"))


class TestArguments:
    """What cannot be is said before it is sent."""

    def test_a_tensor_of_another_connection_is_refused(
        self, F: Connection, server: ServerProcess
    ) -> None:
        x, W, b = operands()
        with deconvd_client.connect(server.target) as other:
            there = other.put(W)
            for call in (F.deconvolution_2d, F.remote.deconvolution_2d, F.vjp):
                with pytest.raises(InvalidArgumentError, match="another connection") as raised:
                    call(x, there, b)
                assert raised.value.argument == "W"

    def test_shapes_are_checked_as_of_arrays(self, F: Connection) -> None:
        x, W, b = (F.put(array) for array in operands())

        with pytest.raises(InvalidArgumentError, match="x must have 4 dimensions"):
            F.deconvolution_2d(b, W)
        with pytest.raises(InvalidArgumentError, match="W must have as many input channels"):
            F.remote.deconvolution_2d(x, F.put(np.ones((2, 1, 1, 1), np.float32)))
        with pytest.raises(InvalidArgumentError, match="b must have 1 dimension"):
            F.vjp(x, W, x)
        with pytest.raises(InvalidArgumentError, match="gy must have the shape"):
            F.vjp(x, W, b)[1](x)
        with pytest.raises(InvalidArgumentError, match="wanted must"):
            F.vjp(x, W, b)[1](F.remote.deconvolution_2d(x, W, b), wanted=["gz"])

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (["1.0"], "array must have one of the element types"),
            (np.ones(3, int), "array must have one of the element types"),
        ],
    )
    def test_what_no_operand_can_be_is_not_put(
        self, F: Connection, value: Any, message: str
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            F.put(value)

    @pytest.mark.parametrize("key", ["k" * 65, b"k" * 65, 5])
    def test_a_tenant_key_is_a_short_secret(self, key: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="tenant_key must be a str or bytes of at"):
            deconvd_client.connect("gpu-host:50051", tenant_key=key)

    def test_a_tensor_says_what_it_is(self, F: Connection) -> None:
        there: RemoteTensor = F.put(np.ones((2, 3), np.float16))

        assert repr(there) == "<deconvd_client.RemoteTensor, float16 of shape (2, 3)>"

    def test_what_is_over_the_quota_is_refused(self, tmp_path: Path) -> None:
        x, W, b = operands()
        with server_process(tmp_path, "--tenant-bytes", str(MIB // 4)) as server:
            with deconvd_client.connect(server.target, transport="unix") as F:
                with pytest.raises(deconvd_client.ExhaustedError):
                    F.put(x)
                with pytest.raises(deconvd_client.ExhaustedError):
                    F.vjp(x, W, b)
                assert F.deconvolution_2d(x, W, b).shape == (4, 32, 37, 37)
                for _ in range(20):  # what is dropped makes room
                    F.put(x[:1])
