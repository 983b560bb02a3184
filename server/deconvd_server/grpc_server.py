"""gRPC's server, in the event loop: what it serves, how it stops, and that it is missed if it ends by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave out what is not public

from deconvd.transport import TRANSPORT_OPTIONS

__all__ = ["GrpcServer"]

_Handlers: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"

_STREAMS_COUNT: Final = 512
"""Calls that one connection may have under way; the client keeps others back. A proxy speaks for many clients."""

_log = logging.getLogger(__name__)


class GrpcServer:
    """Serves handlers by gRPC. To be used in the event loop alone.

    Args:
        handlers: By the methods' paths.
        max_message_bytes: The largest message that is taken or sent.
        on_lost: Called in the loop if it ends without being stopped.
    """

    def __init__(
        self, handlers: _Handlers, max_message_bytes: int, on_lost: Callable[[], None]
    ) -> None:
        options: Sequence[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_concurrent_streams", _STREAMS_COUNT),
            *TRANSPORT_OPTIONS,
            # With it, a second server would share the port in silence.
            ("grpc.so_reuseport", 0),
        ]
        self._core = _core(handlers, options)
        self._on_lost = on_lost
        self._is_stopping = False

    def add_insecure_port(self, address: str) -> int:
        """Listen on an address; return its port. Raises RuntimeError if that cannot be."""
        port: int = self._core.add_insecure_port(address.encode())
        if not port:
            raise RuntimeError(f"gRPC cannot listen on {address}")
        return port

    async def start(self) -> None:
        """Serve from now on."""
        await self._core.start()
        self._watch = asyncio.create_task(self._watched())

    async def stop(self, grace_s: float | None) -> None:
        """Take no more calls, and return once there are none: they are cancelled after a time; None for now."""
        self._is_stopping = True
        await self._core.shutdown(grace_s)

    async def _watched(self) -> None:
        try:
            await self._core.wait_for_termination(None)
        except Exception:
            _log.exception("gRPC has ended")
        if not self._is_stopping:
            self._on_lost()


def _core(handlers: _Handlers, options: Sequence[tuple[str, Any]]) -> Any:
    loop = asyncio.get_running_loop()
    if not hasattr(cygrpc.AioServer, "add_registered_method_handlers"):
        return cygrpc.AioServer(loop, None, (_Generic(handlers),), (), tuple(options), None)
    core = _Core(loop, None, (), (), tuple(options), None)
    core.add_registered_method_handlers(dict(handlers))
    return core


class _Generic(grpc.GenericRpcHandler):
    """Finds handlers by their paths."""

    def __init__(self, handlers: _Handlers) -> None:
        self._handlers = handlers

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        """Return what handles a call; None if there is no such method."""
        return self._handlers.get(call.method)


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # as above
    """grpc.aio's server, less a fault: the path of a method that is not UTF-8 ends its serving task for good.

    Versions with registered methods, from 1.84 on, decode a path in that task unless the method is a registered one.
    Calls of others are answered here instead, whatever their path is.
    """

    def _make_request_call_future(self, method: bytes | None) -> Any:
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.get_running_loop().create_task(self._refuse_strays())

    async def _refuse_strays(self) -> None:
        """Answer calls of methods that there are not, until the server stops: by raising, as grpc.aio expects."""
        loop = asyncio.get_running_loop()
        answers: set[asyncio.Task[None]] = set()
        while True:
            rpc = await self._request_call()
            refusal = cygrpc._ServicerContext(rpc, None, None, loop).abort(
                grpc.StatusCode.UNIMPLEMENTED, "Method not found!"
            )
            answer = loop.create_task(cygrpc._schedule_rpc_coro(refusal, rpc, loop, "?"))
            answers.add(answer)
            answer.add_done_callback(answers.discard)
