"""Each expression that users write with deconvd_client, and the type that a checker must see.

mypy reads this with all other tests, and pyright in `tests.test_typing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import deconvd_client
import deconvd_client.aio
from deconvd_client import (
    CacheState,
    CallLedger,
    Connection,
    DeviceDescription,
    DoubleGradients,
    Gradients,
    Pullback,
    Remote,
    RemoteGradients,
    RemoteTensor,
    ServerInfo,
)
from deconvd_client.aio import (
    AsyncConnection,
    AsyncPullback,
    AsyncRemote,
    AsyncRemoteGradients,
    AsyncRemoteTensor,
    OptionBlock,
)

Array = npt.NDArray[Any]


class Photographs:
    """A user's own collection, of which numpy makes an array."""

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.zeros((1, 3, 4, 4), dtype)


def connections() -> None:
    F = deconvd_client.connect("host:50051", timeout_s=3, transport="tcp", tenant_key=b"secret")
    assert_type(F, Connection)
    with F as entered:
        assert_type(entered, Connection)
    assert_type(F.target, str)
    assert_type(F.health(), str)
    assert_type(F.last_ledger, Mapping[str, int])
    with F.ledgers() as ledgers:
        assert_type(ledgers, list[CallLedger])
    assert_type(ledgers[0].call, str)
    assert_type(ledgers[0].stages_ms, Mapping[str, float])
    assert_type(ledgers[0].total_ms - ledgers[0].server_ms, float)
    F.close()
    assert_type(deconvd_client.connect(), Connection)
    assert_type(deconvd_client.__version__, str)


def shapes(x: Array) -> None:
    shape = deconvd_client.output_shape(x.shape, (1, 1, 2, 2), 2, outsize=(None, 8), groups=1)
    assert_type(shape, tuple[int, int, int, int])


def results_are_arrays(F: Connection, x: npt.NDArray[np.float32], W: Array, gy: Array) -> None:
    assert_type(F.deconvolution_2d(x, W), Array)
    assert_type(F.deconvolution_2d(x, W, None, 2, (1, 1), (None, 8), dilate=2, groups=4), Array)
    assert_type(F.deconvolution_2d(x, W, stride=np.int64(2), pad=[1, 2]), Array)
    assert_type(F.empty((1, 2, 3, 4), np.float16), Array)
    assert_type(F.empty(5, "float32"), Array)

    assert_type(F.deconvolution_2d(x, W.tolist(), [0.5, 1.5]), Array)
    assert_type(F.deconvolution_2d(Photographs(), (W, W)), Array)
    assert_type(F.put([1.0, 2.0]), RemoteTensor)

    gradients = F.deconvolution_2d_grad(x, W, None, gy, wanted={"gx"})
    assert_type(gradients, Gradients)
    assert_type(gradients.gx, Array | None)
    gx, gW, gb = gradients
    assert_type((gx, gW, gb), tuple[Array | None, Array | None, Array | None])


def double_gradients(F: Connection, x: Array, W: Array, gy: Array) -> None:
    gradients = F.deconvolution_2d_double_grad(x, W, gy, x, None, stride=2, wanted=["gW"])
    assert_type(gradients, DoubleGradients)
    assert_type(gradients.ggy, Array | None)


def pullbacks(F: Connection, x: Array, W: Array, gy: Array) -> None:
    y, pullback = F.vjp(x, W, stride=2)
    assert_type(y, Array)
    assert_type(pullback, Pullback)
    with pullback as entered:
        assert_type(entered, Pullback)
    assert_type(pullback(gy), Gradients)
    assert_type(pullback(F.put(gy), wanted=["gW"]).gW, Array | None)


def remote_tensors(F: Connection, x: Array, gy: Array) -> None:
    W = F.put(x)
    assert_type(W, RemoteTensor)
    assert_type(F.put(W), RemoteTensor)
    with W as entered:
        assert_type(entered, RemoteTensor)
    assert_type(W.shape, tuple[int, ...])
    assert_type(W.dtype, np.dtype[Any])
    assert_type(W.nbytes, int)
    assert_type(W.numpy(), Array)
    assert_type(np.asarray(W), Array)
    assert_type(F.deconvolution_2d(W, W, W), Array)
    assert_type(F.vjp(W, x), tuple[Array, Pullback])

    assert_type(F.remote, Remote)
    assert_type(F.remote.deconvolution_2d(x, W), RemoteTensor)
    assert_type(F.remote.deconvolution_2d(W, W).numpy(), Array)
    gradients = F.remote.deconvolution_2d_grad(x, W, None, gy)
    assert_type(gradients, RemoteGradients)
    assert_type(gradients.gW, RemoteTensor | None)


def options(F: Connection) -> None:
    assert_type(F.using_config("use_cudnn", "never"), AbstractContextManager[None])
    with F.using_config("autotune", True) as nothing:
        assert_type(nothing, None)


def futures(F: Connection, x: Array, W: Array) -> None:
    assert_type(F.submit(F.deconvolution_2d, x, W, stride=2), Future[Array])
    assert_type(F.submit(F.put, W).result(), RemoteTensor)


async def coroutines(x: Array, gy: Array) -> None:
    F = deconvd_client.aio.connect("host:50051", max_concurrent_calls=4)
    assert_type(F, AsyncConnection)
    async with F as entered:
        assert_type(entered, AsyncConnection)
    assert_type(await F.deconvolution_2d(x, x, None, 2, (1, 1), dilate=2), Array)
    assert_type(await F.deconvolution_2d_grad(x, x, None, gy, wanted=["gx"]), Gradients)
    y, pullback = await F.vjp(x, x)
    assert_type(y, Array)
    assert_type(pullback, AsyncPullback)
    assert_type(await pullback(gy), Gradients)
    W = await F.put(x)
    assert_type(W, AsyncRemoteTensor)
    assert_type(await W.numpy(), Array)
    assert_type(await F.deconvolution_2d(W, W), Array)
    assert_type(F.remote, AsyncRemote)
    assert_type(await F.remote.deconvolution_2d(x, W), AsyncRemoteTensor)
    gradients = await F.remote.deconvolution_2d_grad(x, W, None, gy)
    assert_type(gradients, AsyncRemoteGradients)
    assert_type(gradients.gW, AsyncRemoteTensor | None)
    assert_type(await F.empty((1, 2), "f4"), Array)
    assert_type(await F.server_info(), ServerInfo)
    assert_type(await F.health(), str)
    assert_type(F.using_config("autotune", True), OptionBlock)
    assert_type(F.last_ledger, Mapping[str, int])
    await F.close()


def descriptions(F: Connection) -> None:
    info = F.server_info()
    assert_type(info, ServerInfo)
    assert_type(info.element_types, tuple[str, ...])
    assert_type(info.devices[0], DeviceDescription)
    assert_type(info.devices[0].caches[0], CacheState)


def errors(F: Connection, x: Array) -> None:
    try:
        F.deconvolution_2d(x, x)
    except deconvd_client.UnavailableError as error:
        assert_type(error.retry_after_s, float | None)
    except deconvd_client.InvalidArgumentError as error:
        assert_type(error.argument, str)
        wrong: ValueError = error
        assert_type(str(wrong), str)
    except (deconvd_client.DeadlineError, deconvd_client.ExhaustedError) as error:
        any_of_ours: deconvd_client.DeconvdError = error
        assert_type(any_of_ours.status, str)
