"""The connection to a server: its options and its life, and the tensors and calls that belong to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ParamSpec, SupportsIndex, TypeVar

import numpy.typing as npt

from deconvd.errors import InvalidArgumentError
from deconvd.host.malloc import raise_mmap_threshold
from deconvd.model.dtypes import Array, element_type
from deconvd.model.problem import TensorSpec, check_extents, spec_of
from deconvd_client.arguments import TensorLike
from deconvd_client.calls.call_pool import CallPool
from deconvd_client.calls.ledgers import CallLedger
from deconvd_client.connect_options import (
    parse_dtype,
    parse_fail_fast,
    parse_max_concurrent_calls,
    parse_max_message_bytes,
    parse_shape,
    parse_tenant_key,
    parse_timeout,
    parse_transport,
)
from deconvd_client.credential_options import parse_credentials
from deconvd_client.credentials import Tls
from deconvd_client.frameworks.framework import (
    host_array,
)
from deconvd_client.operations import Operations
from deconvd_client.remote import Remote
from deconvd_client.residents import RemoteTensor
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo
from deconvd_client.server_set.server_set import ServerSet
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.targets import is_of_one_server, parse_targets, proxy_of
from deconvd_client.workers.host import Host

__all__ = ["Connection"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Connection(Operations):
    """A connection to a server. `deconvd_client.connect` makes it.

    Several threads can use one connection. As a context manager it closes itself.

    It can be a connection to several servers. Then a call is made at one of them, and at another one if that fails, and
    a large batch is split over all of them. A RemoteTensor is on one of them. A server with several processes is found
    to have them: calls are spread over these, too. See docs/several-servers.md.

    Every call can raise these errors, in addition to those that its own description lists:

    - DeadlineError (a TimeoutError): the call took longer than ``timeout_s``.
    - UnavailableError (a ConnectionError): the server cannot be reached, or is full, and retries did not help.
    - ExhaustedError (a MemoryError): the request or the result exceeds a limit. The message names the limit.
    - UnauthenticatedError (a PermissionError): the server does not know who calls, or no longer.
    - CallCancelledError: the connection was closed.
    - UnimplementedError (a NotImplementedError): the server is too old for this call.
    - InternalError (a RuntimeError): a fault of the server, whose log says more.

    All of them are DeconvdErrors.

    A connection can be pickled and copied. The copy has the same target and options, and connects by itself. Paths of
    files with certificates, keys and tokens are options. Secrets are not: the copy takes its tenant key and a token
    from the environment variables DECONVD_TENANT_KEY and DECONVD_TOKEN of its own process. It has none of the
    RemoteTensors of the original, and no options that `using_config` has set.

    Attributes:
        target: Address of the server, as it was given to `connect`. Several addresses have commas between them.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        timeout_s: float,
        max_message_bytes: int,
        transport: str,
        tenant_key: str | bytes | None,
        fail_fast: bool,
        max_concurrent_calls: int,
        tls: Tls | bool | None = None,
        token: str | os.PathLike[str] | None = None,
    ) -> None:
        targets = parse_targets(target)
        self.target: str = ",".join(targets)
        self._timeout_s = timeout_s = parse_timeout(timeout_s)
        self._max_message_bytes = max_message_bytes = parse_max_message_bytes(max_message_bytes)
        self._transport = parse_transport(transport, targets)
        self._fail_fast = parse_fail_fast(fail_fast)
        self._max_concurrent_calls = parse_max_concurrent_calls(max_concurrent_calls)
        secret = parse_tenant_key(tenant_key)
        self._tls = tls
        self._token_path = None if isinstance(token, str) else token
        raise_mmap_threshold()

        credentials = {one: parse_credentials(proxy_of(one) or one, tls, token) for one in targets}
        open_server = partial(
            Server,
            transport=self._transport,
            max_message_bytes=max_message_bytes,
            tenant_key=secret,
            timeout_s=timeout_s,
            fail_fast=self._fail_fast,
        )
        open_host = partial(
            Host,
            transport=self._transport,
            open_server=open_server,
            timeout_s=timeout_s,
            fail_fast=self._fail_fast,
        )
        server: Host | ServerSet
        if len(targets) == 1 and is_of_one_server(targets[0]):
            server = open_host(targets[0], credentials[targets[0]])
        else:
            server = ServerSet(
                targets,
                credentials,
                open_host,
                partial(open_server, transport=TransportName.GRPC),
                timeout_s=timeout_s,
                fail_fast=self._fail_fast,
            )
        super().__init__(server)
        self._server: Host | ServerSet = server
        self._remote = Remote(self._operations, server)
        self._pool = CallPool(self._max_concurrent_calls, timeout_s, server.clear_last_ledger)

    def put(self, array: TensorLike) -> RemoteTensor:
        """Send an array for the server to keep, and return a RemoteTensor that stands for it in calls.

        The RemoteTensor has the value that the array has now. The client keeps a reference to the array: if the
        server loses the tensor, the array is sent again, provided it still has the same elements. For a cupy array
        that reference is a copy on the host.

        Args:
            array: An array of float16, bfloat16, float32 or float64, of up to 8 dimensions, and of any kind that
                `deconvolution_2d` takes. A float is one, too: a float64 without dimensions. Or a RemoteTensor:
                then the result is another RemoteTensor for the same value, and the server keeps the value until
                both are closed. The elements of another connection's RemoteTensor are fetched and sent.

        Raises:
            InvalidArgumentError: `array` is not an array, has another element type, is too large, or is a closed
                RemoteTensor (a ValueError).
            ExhaustedError: The server has no room for it (a MemoryError).
            LostTensorError: It is another connection's RemoteTensor, and its server has lost it.
        """
        residents = self._server.residents
        if isinstance(array, RemoteTensor):
            if array.belongs_to(residents):
                return RemoteTensor(residents, array.resident_for(residents, "array").duplicate())
            array = RemoteTensor.numpy(array)  # not that of a subclass, which may be awaitable
        elements = host_array(self._operations.parse_operand("array", array)[0])
        spec = spec_of(elements)
        element_type("array", spec.dtype)
        check_extents("array", spec)
        return RemoteTensor(residents, residents.put(elements))

    @property
    def remote(self) -> Remote:
        """The same functions with results that stay on the server, as RemoteTensors. See `Remote`."""
        return self._remote

    def empty(self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike) -> Array:
        """Return a new array in memory that is shared with the server, like ``numpy.empty``.

        On the server's host, a call that is given such an array need not copy it. If the server lends no memory, or has
        reached its limit, the result is an ordinary array. The elements are arbitrary. Of a server with several
        processes, the one that this thread keeps to lends the memory, and serves the calls with it.

        Args:
            shape: The size of each dimension: an int, or a sequence of ints.
            dtype: float16, bfloat16, float32 or float64, as anything that ``numpy.dtype`` accepts.

        Raises:
            InvalidArgumentError: No operand can have this shape or this element type (a ValueError).
        """
        spec = TensorSpec(parse_shape(shape), element_type("dtype", parse_dtype(dtype)))
        check_extents("shape", spec)
        return self._server.empty(spec.shape, spec.dtype)

    def submit(
        self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]:
        """Have a function called in a background thread, and return a future at once.

        ::

            future = F.submit(F.deconvolution_2d, x, W, stride=2)
            y = future.result()

        This is ``submit`` of ``concurrent.futures.Executor``. The function can be any function of this connection, of
        its ``remote`` or of its tensors, a `Pullback`, or a function of yours that makes several calls. It runs with
        the options that `using_config` has set here. Current CUDA streams are not passed on: wait for them before.

        At most ``max_concurrent_calls`` of `connect` run at the same time. The others wait for their turn, and that
        time counts: a call that has waited for longer than ``timeout_s`` raises DeadlineError.

        ``cancel()`` of the future also ends a call that runs, and the server stops computing it. It returns True
        unless the function has ended. ``result()`` then raises ``concurrent.futures.CancelledError``, also in threads
        that wait for it. Until ``concurrent.futures.wait`` returns, the call may still read its operands. `close`
        makes futures raise CallCancelledError. None of these threads keeps the process from exiting.

        Args:
            function: What to call.
            args, kwargs: Its arguments. The arrays must not change before the future is done.

        Raises:
            InvalidArgumentError: ``function`` cannot be called.
            CallCancelledError: The connection is closed.
        """
        if not callable(function):
            raise InvalidArgumentError(
                f"function must be callable, and its arguments follow it, got {type(function).__name__}",
                argument="function",
            )
        return self._pool.submit(function, *args, **kwargs)

    def server_info(self) -> ServerInfo:
        """Return the server's version, devices, caches and limits, and what it has done since it started.

        Of several servers, it is one of them. Of a server with several processes, it is the one that this client keeps
        to, and `workers` has all of them.

        The counts of tensors that the server keeps include only those of this connection, and of connections with
        the same ``tenant_key``.
        """
        return self._server.info()

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING``, or another status of gRPC's health protocol.

        The server is asked once, without retries. Of several servers, or processes of a server, it is ``SERVING`` if
        one is.
        """
        return self._server.health()

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """Where the time of this thread's last successful call went on the server, in microseconds, by entry.

        - ``queue_us``: waiting for the call's turn on the device.
        - ``follow_us``: time that the device waited for operands still being copied to shared memory; only in calls
          that overlap copying and computing.
        - ``upload_us``: copying operands to the device.
        - ``compute_us``: computing.
        - ``download_us``: copying results from the device.
        - ``server_us``: all of it, from the arrival of the request to the end of the response.

        Of a call that was split over several servers, it is the ledger of the slowest part. Entries that do not apply
        to the device or the call are missing. The stages of a large call overlap, so their
        sum can be larger than ``server_us``. The mapping is empty before the first call.
        """
        return self._server.last_ledger

    def ledgers(self) -> AbstractContextManager[list[CallLedger]]:
        """Collect the ledgers of the calls in a ``with`` block, in a list of `CallLedger`, in the order they end.

        ::

            with F.ledgers() as ledgers:
                y = F.deconvolution_2d(x, W)
            print(ledgers[0])

        It collects the calls of this connection in the current thread or asyncio task, and in tasks that the block
        starts. Another thread collects by a block of its own. One function can make several calls: `put` and `vjp`
        send tensors by calls of their own. Failed calls have no ledger. Blocks can be nested.
        """
        return self._server.ledgers.collect()

    @property
    def shares_memory(self) -> bool:
        """Whether the server lends memory on this host. Then to send an array again costs no more than a copy.

        The first use asks the server, if no call has done so.
        """
        return self._server.lends_memory()

    def close(self) -> None:
        """Close the connection, within a second. Closing it twice is harmless.

        Running calls and later ones raise CallCancelledError. The server drops the tensors that it keeps for this
        connection.
        """
        self._server.close()
        self._pool.close()  # last: calls that run say that the connection was closed

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial[Connection], tuple[()]]:
        # The tenant key and the token are secrets, so they are not in the pickle: the copy takes them from its own
        # environment.
        given: dict[str, Any] = {"tls": self._tls, "token": self._token_path}
        again = partial(
            Connection,
            self.target,
            timeout_s=self._timeout_s,
            max_message_bytes=self._max_message_bytes,
            transport=self._transport.value,
            tenant_key=None,
            fail_fast=self._fail_fast,
            max_concurrent_calls=self._max_concurrent_calls,
            **{name: value for name, value in given.items() if value is not None},
        )
        return again, ()

    def __repr__(self) -> str:
        if not hasattr(self, "_server"):  # in a debugger, say, which shows why it could not be made
            return "<deconvd_client.Connection that was not made>"
        words = [f"to {self.target}", *self._server.describe(), f"timeout {self._timeout_s:g} s"]
        if self._transport is not TransportName.AUTO:
            words.append(f"transport {self._transport.value}")
        return f"<deconvd_client.Connection {', '.join(words)}>"
