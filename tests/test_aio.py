"""`deconvd_client.aio`: every function of a connection, to be awaited, and cancelled with its task."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

import deconvd_client
import deconvd_client.aio
from deconvd.model.dtypes import Array
from deconvd_client import (
    CallCancelledError,
    Connection,
    DeadlineError,
    InvalidArgumentError,
    Pullback,
    Remote,
    RemoteTensor,
)
from deconvd_client.aio import (
    AsyncConnection,
    AsyncPullback,
    AsyncRemote,
    AsyncRemoteTensor,
)
from deconvd_client.operations import Operations
from tests.held_servers import HeldServer, held_server
from tests.processes import exit_code
from tests.servers import ServerProcess

_T = TypeVar("_T")

_INTERNAL = {"belongs_to", "resident_for"}
"""Public names that calls use, and users do not."""

_FOR_FRAMEWORKS = {"options", "shares_memory", "using_defaults"}
"""What the adapters of frameworks ask, within a call that a thread makes."""

TIMEOUT_S = 30.0
SOON_S = 10.0

X = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
LARGE_X = np.ones((24, 2, 256, 256), np.float32)
W = np.ones((2, 1, 1, 1), np.float32)
Y = X.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldServer]:
    with held_server(tmp_path_factory.mktemp("held")) as server:
        yield server


def run(main: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run(asyncio.wait_for(main, TIMEOUT_S))


def assert_equal(array: Any, expected: Array) -> None:
    np.testing.assert_array_equal(array, expected, strict=True)


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    until_s = time.monotonic() + SOON_S
    while not await condition():
        assert time.monotonic() < until_s, "it did not come true"


async def load(F: AsyncConnection) -> tuple[int, int, int]:
    """Return how many calls run and wait on a server, and how much of its memory they use."""
    (device,) = (await F.server_info()).devices
    return device.running_calls_count, device.waiting_calls_count, device.used_bytes


@asynccontextmanager
async def held_call(
    held: HeldServer, transport: str, x: Array
) -> AsyncIterator[tuple[AsyncConnection, asyncio.Task[Array]]]:
    """Give the block a task whose call runs on the server. Afterwards the server must be free and serve others."""
    async with deconvd_client.aio.connect(held.target(transport), transport=transport) as F:
        await F.deconvolution_2d(X, W)
        held.hold()
        try:
            task = asyncio.create_task(F.deconvolution_2d(x, W))

            async def is_running() -> bool:
                return (await load(F))[0] == 1

            async def is_free() -> bool:
                return await load(F) == (0, 0, 0)

            await wait_until(is_running)
            yield F, task
            await wait_until(is_free)
        finally:
            held.release()
        assert_equal(await F.deconvolution_2d(x, W), x.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("of_asyncio", "of_threads", "left_out"),
    [
        # a task does what a submitted call does
        (AsyncConnection, Connection, {"submit", *_FOR_FRAMEWORKS}),
        (AsyncConnection, Operations, _FOR_FRAMEWORKS),
        (AsyncRemote, Remote, set[str]()),
        (AsyncPullback, Pullback, set[str]()),
        (AsyncRemoteTensor, RemoteTensor, set[str]()),
    ],
)
def test_no_function_is_forgotten(of_asyncio: type, of_threads: type, left_out: set[str]) -> None:
    names = {name for name in vars(of_threads) if name == "__call__" or name[0] != "_"}
    assert names
    for name in names - left_out - _INTERNAL:
        function, expected = getattr(of_asyncio, name), getattr(of_threads, name)
        if isinstance(expected, property):
            assert isinstance(function, property), name
        else:
            parameters = inspect.signature(function).parameters
            assert parameters == inspect.signature(expected).parameters, name


@pytest.mark.parametrize(
    "name",
    sorted(
        {name for name, _ in inspect.getmembers(Connection, inspect.isfunction) if name[0] != "_"}
        - {"ledgers", "submit", "using_config", "using_request_id", *_FOR_FRAMEWORKS}
    ),
)
def test_whatever_talks_to_the_server_is_awaited(name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(AsyncConnection, name))
    assert getattr(AsyncConnection, name).__doc__


def test_connect_has_the_same_options() -> None:
    assert (
        inspect.signature(deconvd_client.aio.connect).parameters
        == inspect.signature(deconvd_client.connect).parameters
    )


def test_every_function_returns_what_the_connection_of_threads_returns(
    server: ServerProcess,
) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target) as F:
            assert F.target == server.target
            y = await F.deconvolution_2d(X, W)
            assert_equal(y, Y)
            gradients = await F.deconvolution_2d_grad(X, W, None, y, wanted={"gW"})
            assert gradients.gx is None
            assert gradients.gW is not None

            returned, pullback = await F.vjp(X, W)
            with pullback:
                assert_equal(returned, Y)
                assert_equal((await pullback(y)).gW, gradients.gW)
            with pytest.raises(InvalidArgumentError, match="closed"):
                await pullback(y)

            with await F.put(X) as x:
                assert isinstance(x, RemoteTensor)
                assert (x.shape, x.dtype, x.nbytes) == (X.shape, X.dtype, X.nbytes)
                assert_equal(await x.numpy(), X)
                assert_equal(await F.deconvolution_2d(x, W), Y)
                with await F.put(x) as again, await F.remote.deconvolution_2d(again, W) as kept:
                    assert_equal(await kept.numpy(), Y)
                kept_gradients = await F.remote.deconvolution_2d_grad(x, W, None, y)
                assert kept_gradients.gW is not None
                assert kept_gradients.gb is None
                assert_equal(await kept_gradients.gW.numpy(), gradients.gW)

            assert (await F.empty((2, 3), "f4")).shape == (2, 3)
            assert await F.health() == "SERVING"
            assert (await F.server_info()).version == deconvd_client.__version__
        with pytest.raises(CallCancelledError):
            await F.deconvolution_2d(X, W)
        await F.close()

    run(main())


def test_errors_are_those_of_the_connection_of_threads(server: ServerProcess) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target) as F:
            with pytest.raises(InvalidArgumentError, match="stride"):
                await F.deconvolution_2d(X, W, stride=0)
            misspelt: Any = F.deconvolution_2d
            with pytest.raises(TypeError, match="did you mean 'pad' for 'padding'"):
                await misspelt(X, W, padding=1)
            with pytest.raises(InvalidArgumentError, match="must be one of"):
                with F.using_config("no such", 1):
                    pass
        with pytest.raises(InvalidArgumentError, match="max_concurrent_calls"):
            deconvd_client.aio.connect(server.target, max_concurrent_calls=0)

    run(main())


def test_numpy_says_how_to_await_the_elements(server: ServerProcess) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target) as F:
            with pytest.raises(TypeError, match=r"await tensor\.numpy\(\)"):
                np.asarray(await F.put(X))

    run(main())


def test_a_tensor_of_another_connection_is_fetched_and_sent(server: ServerProcess) -> None:
    async def main() -> None:
        connect = deconvd_client.aio.connect
        async with connect(server.target) as F, connect(server.target) as G:
            with await F.put(X) as x, await G.put(x) as copied:
                assert_equal(await copied.numpy(), X)

    run(main())


def test_options_and_ledgers_belong_to_tasks(server: ServerProcess) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target) as F:
            assert F.last_ledger == {}
            both_are_set = asyncio.Barrier(2)
            config = F._adapted._config

            async def call(value: str) -> str:
                async with F.using_config("use_cudnn", value):
                    await both_are_set.wait()
                    await F.deconvolution_2d(X, W)
                    assert F.last_ledger["server_us"] > 0
                    option = await F._awaiter.call(lambda: config.options.use_cudnn)
                assert config.options.use_cudnn == "auto"
                return str(option)

            options = await asyncio.gather(call("never"), call("always"))
            assert [*options] == ["never", "always"]
            assert F.last_ledger == {}  # those were other tasks
            await F.deconvolution_2d(X, W)
            with F.using_config("autotune", True):
                await F.server_info()  # has no ledger
                assert F.last_ledger["server_us"] > 0

    run(main())


@pytest.mark.parametrize("x", [X, LARGE_X], ids=["small", "large"])
@pytest.mark.parametrize("transport", ["shared_memory", "unix", "tcp", "grpc"])
def test_a_cancelled_task_frees_the_server(held: HeldServer, transport: str, x: Array) -> None:
    async def main() -> None:
        async with held_call(held, transport, x) as (_, task):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_a_timeout_frees_the_server(held: HeldServer) -> None:
    async def main() -> None:
        async with held_call(held, "unix", X) as (F, task):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await task
            assert task.cancelled()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await F.deconvolution_2d(LARGE_X, W)

    run(main())


def test_a_task_group_that_fails_frees_the_server(held: HeldServer) -> None:
    async def main() -> None:
        async with held_call(held, "unix", X) as (F, task):
            waiting: list[asyncio.Task[Array]] = []

            async def fail() -> None:
                async with asyncio.TaskGroup() as group:
                    waiting.extend(group.create_task(F.deconvolution_2d(X, W)) for _ in range(3))
                    group.create_task(F.deconvolution_2d(X, W, stride=0))

            with pytest.raises(ExceptionGroup) as raised:
                await fail()
            assert [type(error) for error in raised.value.exceptions] == [InvalidArgumentError]
            assert all(t.cancelled() for t in waiting)
            task.cancel()

    run(main())


def test_a_coroutine_that_is_dropped_frees_the_server(held: HeldServer) -> None:
    async def main() -> None:
        async with held_call(held, "unix", X) as (F, task):
            task.cancel()
            call = F.deconvolution_2d(X, W)
            call.send(None)  # it waits for its result, and no task has it
            call.close()

    run(main())


def test_calls_beyond_the_limit_wait_and_can_be_cancelled(held: HeldServer) -> None:
    async def main() -> None:
        connect = deconvd_client.aio.connect
        async with (
            connect(held.unix_target, max_concurrent_calls=1, timeout_s=20) as F,
            connect(held.unix_target) as other,
        ):
            held.hold()
            first = asyncio.create_task(F.deconvolution_2d(X, W))

            async def is_running() -> bool:
                return (await load(other))[0] == 1

            await wait_until(is_running)
            second = asyncio.create_task(F.deconvolution_2d(X, W))
            third = asyncio.create_task(F.deconvolution_2d(X, W))
            await asyncio.sleep(0)  # both begin
            second.cancel()
            assert (await load(other))[:2] == (1, 0)
            held.release()
            for task in (first, third):
                assert_equal(await task, Y)
            assert second.cancelled()

    run(main())


def test_the_deadline_bounds_the_wait_for_a_turn(held: HeldServer) -> None:
    async def main() -> None:
        connect = deconvd_client.aio.connect
        async with connect(held.unix_target, max_concurrent_calls=1, timeout_s=0.5) as F:
            may_end = threading.Event()
            busy = asyncio.create_task(F._awaiter.call(may_end.wait, TIMEOUT_S))
            await asyncio.sleep(0)  # it begins
            with pytest.raises(DeadlineError, match="max_concurrent_calls"):
                await F.deconvolution_2d(X, W)
            may_end.set()
            assert await busy

    run(main())


def test_close_ends_calls_without_cancelling_their_tasks(held: HeldServer) -> None:
    async def main() -> None:
        F = deconvd_client.aio.connect(held.unix_target, max_concurrent_calls=2)
        held.hold()
        tasks = [asyncio.create_task(F.deconvolution_2d(X, W)) for _ in range(5)]
        await asyncio.sleep(0)  # they begin
        await F.close()
        held.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [CallCancelledError] * 5

    run(main())


def test_one_connection_serves_several_loops(server: ServerProcess) -> None:
    F = deconvd_client.aio.connect(server.target, max_concurrent_calls=2)

    async def call() -> None:
        for y in await asyncio.gather(*(F.deconvolution_2d(X, W) for _ in range(8))):
            assert_equal(y, Y)

    threads = [threading.Thread(target=run, args=(call(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    run(call())
    for thread in threads:
        thread.join()
    run(F.close())


def test_nobody_holds_results_that_nobody_takes(server: ServerProcess) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target) as F:
            x = X.copy()
            alive = weakref.ref(x)
            await F.deconvolution_2d(x, W)
            with pytest.raises(InvalidArgumentError):
                await F.deconvolution_2d(x, W, stride=0)
            del x

            async def is_gone() -> bool:
                await asyncio.sleep(0)
                return alive() is None

            gc.disable()
            try:
                await wait_until(is_gone)
            finally:
                gc.enable()

    run(main())


@pytest.mark.parametrize(
    "duplicate", [lambda F: pickle.loads(pickle.dumps(F)), copy.copy, copy.deepcopy]
)
def test_a_copy_connects_by_itself(server: ServerProcess, duplicate: Callable[[Any], Any]) -> None:
    async def main() -> None:
        async with deconvd_client.aio.connect(server.target, max_concurrent_calls=3) as F:
            assert_equal(await F.deconvolution_2d(X, W), Y)
            tensor, (_, pullback) = await F.put(X), await F.vjp(X, W)
            again = duplicate(F)
            for bound in (tensor, pullback, F.remote):
                with pytest.raises(TypeError, match="cannot be pickled or copied"):
                    duplicate(bound)
        async with again:
            assert again.target == F.target
            assert again._adapted._max_concurrent_calls == 3
            assert_equal(await again.deconvolution_2d(X, W), Y)

    run(main())


def test_a_forked_child_can_call(server: ServerProcess) -> None:
    F = deconvd_client.aio.connect(server.target)

    async def call() -> None:
        assert_equal(await F.deconvolution_2d(X, W), Y)

    run(call())

    def call_in_child() -> bool:
        run(call())
        return True

    assert exit_code(call_in_child) == 0
    run(call())
    run(F.close())


EXIT = """
import asyncio, sys
import numpy as np
import deconvd_client.aio

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no fault
    F = deconvd_client.aio.connect(sys.argv[1], timeout_s=60)
    x, W = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 1, 1, 1), np.float32)
    call = asyncio.create_task(F.deconvolution_2d(x, W))
    while not (await F.server_info()).devices[0].running_calls_count:
        pass
    if sys.argv[2] == "timeout":
        try:
            await asyncio.wait_for(call, 0.1)
        except TimeoutError:
            print("timeout")

asyncio.run(main())
print("exits", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "output"), [("timeout", "timeout\nexits\n"), ("end of main", "exits\n")]
)
def test_a_process_exits_with_a_call_that_was_cancelled(
    held: HeldServer, how: str, output: str
) -> None:
    held.hold()
    try:
        exited = subprocess.run(
            [sys.executable, "-W", "error", "-X", "dev", "-c", EXIT, held.unix_target, how],
            check=False,
            capture_output=True,
            text=True,
            timeout=45,
        )
    finally:
        held.release()
    assert (exited.returncode, exited.stdout, exited.stderr) == (0, output, "")
