"""The connection to a server for asyncio: the functions of `deconvd_client.Connection`, to be awaited.

::

    import deconvd_client.aio

    async with deconvd_client.aio.connect("gpu-host:50051") as F:
        y = await F.deconvolution_2d(x, W, b, stride=2, pad=1)

The functions have the arguments, results and errors of those of `Connection`, which they call in background threads. If
a task is cancelled (by ``Task.cancel``, ``asyncio.timeout`` or a task group), its call ends, the server stops computing
it, and the connection stays usable. At most ``max_concurrent_calls`` of `connect` run at the same time; the others
wait for their turn. It works with every event loop of asyncio, uvloop's among them, and with anyio on asyncio.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, NamedTuple, NoReturn, ParamSpec, TypeVar

import numpy.typing as npt

from deconvd.model.dtypes import Array
from deconvd_client import connector
from deconvd_client.calls.ledgers import CallLedger
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.connection import Connection
from deconvd_client.pullback import Pullback
from deconvd_client.remote import Remote
from deconvd_client.residents import RemoteGradients, RemoteTensor

__all__ = [
    "AsyncConnection",
    "AsyncPullback",
    "AsyncRemote",
    "AsyncRemoteGradients",
    "AsyncRemoteTensor",
    "OptionBlock",
    "connect",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_R = TypeVar("_R")
_Adapted_co = TypeVar("_Adapted_co", covariant=True)


class _Awaiter:
    """Awaits functions that run in the background threads of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ledger: ContextVar[Mapping[str, int]] = ContextVar("ledger")

    async def call(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what the function returns. If the task is cancelled, cancel the calls that the function makes."""
        work = partial(function, *args, **kwargs)
        future = self._connection.submit(_call_with_ledger, self._connection, work)
        try:
            value, ledger = await asyncio.wrap_future(future)
        except BaseException:
            future.cancel()  # also if the coroutine is closed, of which asyncio says nothing to the future
            raise
        finally:
            del (
                future
            )  # an error's traceback refers to this frame: a cycle, which would keep the arrays
        if ledger:  # GetServerInfo has none, say
            self._ledger.set(ledger)
        return value

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """The ledger of this task's last call."""
        return self._ledger.get({})


def _call_with_ledger(F: Connection, work: Callable[[], _T]) -> tuple[_T, Mapping[str, int]]:
    """Return what `work` returns, and the ledger of its last call, which only this thread knows."""
    return work(), F.last_ledger


class _Adapter(Generic[_Adapted_co]):
    """An object whose methods are to be awaited."""

    def __init__(self, adapted: _Adapted_co, awaiter: _Awaiter) -> None:
        self._adapted = adapted
        self._awaiter = awaiter


def _make_awaitable(
    method: Callable[Concatenate[_Adapted_co, _P], _T], convert: Callable[[_T, _Awaiter], _R]
) -> Callable[
    [Callable[..., None]], Callable[Concatenate[_Adapter[_Adapted_co], _P], Coroutine[Any, Any, _R]]
]:
    """Return a decorator that gives a name to a coroutine function with the signature of a method.

    A decorator, since type checkers take no types from an assignment. The decorated function itself is not called.

    Args:
        convert: Returns the result for the caller, whose methods can be awaited, too.
    """

    @wraps(method)
    async def call(self: _Adapter[_Adapted_co], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        value = await self._awaiter.call(method, self._adapted, *args, **kwargs)
        return convert(value, self._awaiter)

    return lambda _: call


def _keep(value: _T, _: _Awaiter) -> _T:
    return value


class AsyncRemoteTensor(RemoteTensor):
    """A tensor that the server keeps. It is a `RemoteTensor` whose elements are awaited: ``await tensor.numpy()``.

    Functions of both kinds of connection accept it, if it belongs to them.
    """

    def __init__(self, tensor: RemoteTensor, awaiter: _Awaiter) -> None:
        super().__init__(tensor._store, tensor._resident)
        self._awaiter = awaiter

    async def numpy(self) -> Array:  # type: ignore[override]  # an awaitable instead of an array is its purpose
        """Fetch the elements from the server. See `RemoteTensor.numpy`."""
        return await self._awaiter.call(super().numpy)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> NoReturn:
        raise TypeError(
            "the elements of an AsyncRemoteTensor are on the server, and numpy cannot await them. "
            "Use await tensor.numpy()"
        )

    def __enter__(self) -> AsyncRemoteTensor:
        return self


class AsyncRemoteGradients(NamedTuple):
    """The gradients with respect to x, W and b, kept on the server. None for a gradient that was not requested."""

    gx: AsyncRemoteTensor | None
    gW: AsyncRemoteTensor | None
    gb: AsyncRemoteTensor | None


def _convert_gradients(gradients: RemoteGradients, awaiter: _Awaiter) -> AsyncRemoteGradients:
    kept = (None if g is None else AsyncRemoteTensor(g, awaiter) for g in gradients)
    return AsyncRemoteGradients(*kept)


class AsyncRemote(_Adapter[Remote]):
    """The functions of a connection, with results that stay on the server. See `Remote`."""

    @_make_awaitable(Remote.deconvolution_2d, AsyncRemoteTensor)
    def deconvolution_2d(self) -> None:
        """See `Remote.deconvolution_2d`."""

    @_make_awaitable(Remote.deconvolution_2d_grad, _convert_gradients)
    def deconvolution_2d_grad(self) -> None:
        """See `Remote.deconvolution_2d_grad`."""

    def __reduce__(self) -> NoReturn:
        self._adapted.__reduce__()


class AsyncPullback(_Adapter[Pullback]):
    """A coroutine function that returns the gradients of one deconvolution for a given gy. See `Pullback`."""

    @_make_awaitable(Pullback.__call__, _keep)
    def __call__(self) -> None:
        """See `Pullback`."""

    def close(self) -> None:
        """Let the server drop x and W. Closing it twice is harmless. The server is not waited for."""
        self._adapted.close()

    def __enter__(self) -> AsyncPullback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        self._adapted.__reduce__()

    def __repr__(self) -> str:
        return repr(self._adapted).replace("Pullback", "aio.AsyncPullback", 1)


def _convert_vjp(result: tuple[Array, Pullback], awaiter: _Awaiter) -> tuple[Array, AsyncPullback]:
    y, pullback = result
    return y, AsyncPullback(pullback, awaiter)


class OptionBlock(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """A block with another option or request id, for ``with`` and ``async with``."""

    def __init__(self, block: AbstractContextManager[None]) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._block.__enter__()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.__exit__(exc_type, exc, traceback)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


class AsyncConnection(_Adapter[Connection]):
    """A connection to a server, for asyncio. `deconvd_client.aio.connect` makes it.

    Several tasks, threads and event loops can use one connection. As an asynchronous context manager it closes itself.
    It can be pickled and copied, and used in forked children, as a `Connection`. Its functions raise the errors of
    `Connection`, and asyncio.CancelledError if the task is cancelled.

    Args:
        F: The connection whose functions it calls. It can still be used by itself.
    """

    def __init__(self, F: Connection) -> None:
        super().__init__(F, _Awaiter(F))
        self._remote = AsyncRemote(F.remote, self._awaiter)

    @_make_awaitable(Connection.deconvolution_2d, _keep)
    def deconvolution_2d(self) -> None:
        """See `Connection.deconvolution_2d`."""

    @_make_awaitable(Connection.deconvolution_2d_grad, _keep)
    def deconvolution_2d_grad(self) -> None:
        """See `Connection.deconvolution_2d_grad`."""

    @_make_awaitable(Connection.deconvolution_2d_double_grad, _keep)
    def deconvolution_2d_double_grad(self) -> None:
        """See `Connection.deconvolution_2d_double_grad`."""

    @_make_awaitable(Connection.vjp, _convert_vjp)
    def vjp(self) -> None:
        """See `Connection.vjp`."""

    @_make_awaitable(Connection.put, AsyncRemoteTensor)
    def put(self) -> None:
        """See `Connection.put`."""

    @_make_awaitable(Connection.empty, _keep)
    def empty(self) -> None:
        """See `Connection.empty`."""

    @_make_awaitable(Connection.server_info, _keep)
    def server_info(self) -> None:
        """See `Connection.server_info`."""

    @_make_awaitable(Connection.health, _keep)
    def health(self) -> None:
        """See `Connection.health`."""

    @property
    def target(self) -> str:
        """Address of the server, as it was given to `connect`."""
        return self._adapted.target

    @property
    def remote(self) -> AsyncRemote:
        """The same functions with results that stay on the server, as AsyncRemoteTensors."""
        return self._remote

    def using_config(self, name: str, value: object) -> OptionBlock:
        """Set an option for a ``with`` or ``async with`` block of this task. See `Connection.using_config`."""
        return OptionBlock(self._adapted.using_config(name, value))

    def using_request_id(self, request_id: str) -> OptionBlock:
        """Give the calls of a ``with`` or ``async with`` block a name. See `Connection.using_request_id`."""
        return OptionBlock(self._adapted.using_request_id(request_id))

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """Where the time of this task's last successful call went on the server. See `Connection.last_ledger`."""
        return self._awaiter.last_ledger

    def ledgers(self) -> AbstractContextManager[list[CallLedger]]:
        """Collect the ledgers of the calls in a ``with`` block of this task. See `Connection.ledgers`."""
        return self._adapted.ledgers()

    async def close(self) -> None:
        """Close the connection, within a second. Closing it twice is harmless.

        Running calls and later ones raise CallCancelledError. The server drops the tensors that it keeps for this
        connection. If the task is cancelled meanwhile, the connection is closed all the same.
        """
        future: Future[None] = Future()
        run_in_background(partial(_close, self._adapted, future))  # never waits for its turn
        await asyncio.wrap_future(future)

    async def __aenter__(self) -> AsyncConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(
        self,
    ) -> tuple[Callable[[Callable[[], Connection]], AsyncConnection], tuple[partial[Connection]]]:
        again, _ = self._adapted.__reduce__()
        return _connect_again, (again,)

    def __repr__(self) -> str:
        return repr(self._adapted).replace("Connection", "aio.AsyncConnection", 1)


def _connect_again(connect_again: Callable[[], Connection]) -> AsyncConnection:
    return AsyncConnection(connect_again())


def _close(F: Connection, future: Future[None]) -> None:
    is_awaited = future.set_running_or_notify_cancel()
    try:
        F.close()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
        if is_awaited:
            future.set_exception(error)
    else:
        if is_awaited:
            future.set_result(None)


def _make_connect(
    connect: Callable[_P, Connection],
) -> Callable[[Callable[[], None]], Callable[_P, AsyncConnection]]:
    """Return a decorator that gives a name to `connect` for asyncio, as `_make_awaitable` does."""

    @wraps(connect)
    def connect_for_asyncio(*args: _P.args, **kwargs: _P.kwargs) -> AsyncConnection:
        return AsyncConnection(connect(*args, **kwargs))

    signature = inspect.signature(connect)
    connect_for_asyncio.__signature__ = signature.replace(return_annotation="AsyncConnection")  # type: ignore[attr-defined]  # inspect reads it
    return lambda _: connect_for_asyncio


@_make_connect(connector.connect)
def connect() -> None:
    """See `deconvd_client.connect`."""
