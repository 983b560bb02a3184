"""Standard gRPC health, in the event loop: it is answered however busy the workers are."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

__all__ = ["Health"]

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LARGEST_BYTES: Final = 4096
"""More than the name of any service takes: a larger message is not parsed, as that would hold up the loop."""

_MESSAGE_S: Final = 10.0
"""How long a call may be without its message."""

_Status: Final = health_pb2.HealthCheckResponse
_SERVING: Final = _Status(status=_Status.SERVING).SerializeToString()
_NOT_SERVING: Final = _Status(status=_Status.NOT_SERVING).SerializeToString()
_UNKNOWN: Final = _Status(status=_Status.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """The standard health service for a server and the services it names. To be used in the loop alone.

    grpcio's own is not used, since there one watcher who does not read keeps everybody's health from changing.

    Attributes:
        handlers: By the methods' paths; for `grpc.aio`.

    Args:
        services: Names of the services; the server as a whole goes with them.
    """

    def __init__(self, *services: str) -> None:
        self._services = frozenset(("", *services))
        self._is_serving = False
        self._is_failing = False
        self._is_ending = False
        self._changed = asyncio.Event()
        prefix = f"/{health.SERVICE_NAME}/"
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            f"{prefix}Check": grpc.stream_unary_rpc_method_handler(self._check),
            f"{prefix}Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }

    def set_serving(self, is_serving: bool) -> None:
        """Say SERVING or NOT_SERVING of all."""
        self._is_serving = is_serving and not self._is_failing
        self._tell()

    def fail(self) -> None:
        """Say NOT_SERVING of all, for good."""
        self._is_failing = True
        self.set_serving(False)

    def end_watches(self) -> None:
        """End every watch: they would keep the server from stopping."""
        self._is_ending = True
        self._tell()

    def _tell(self) -> None:
        """Wake who watches. The next change is told by another event."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _answer(self, service: str) -> bytes:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._is_serving else _NOT_SERVING

    async def _check(self, _messages: Any, context: _Context) -> bytes:
        answer = self._answer(await _service_asked_for(context))
        if answer == _UNKNOWN:
            await _abort(context, grpc.StatusCode.NOT_FOUND, "there is no such service")
        return answer

    async def _watch(self, _messages: Any, context: _Context) -> None:
        service = await _service_asked_for(context)
        told = b""
        while True:
            changed, answer = self._changed, self._answer(service)
            if answer != told:
                await context.write(answer)
                told = answer
            if self._is_ending:
                await _abort(context, grpc.StatusCode.CANCELLED, "the server is draining")
            await changed.wait()


async def _service_asked_for(context: _Context) -> str:
    """Return the service that a call asks about."""
    try:
        async with asyncio.timeout(_MESSAGE_S):
            message = await context.read()
    except TimeoutError:
        await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, "the call has sent no message")
    if message is grpc.aio.EOF or len(message) > _LARGEST_BYTES:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the request is none, or too large")
    try:
        return health_pb2.HealthCheckRequest.FromString(message).service
    except DecodeError:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid")


async def _abort(context: _Context, code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError  # `abort` has raised
