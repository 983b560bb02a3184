"""The standard gRPC health service. It runs in gRPC's thread, so it answers however busy the workers are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["LIVENESS", "Health"]

LIVENESS: Final = "liveness"
"""The name of a service that is always SERVING. Whoever gets no answer about it knows that the process hangs."""

_LARGEST_BYTES: Final = 4096
"""More than the name of any service takes. A larger message is not parsed: that would hold up gRPC's thread."""

_Status: Final = health_pb2.HealthCheckResponse
_SERVING: Final = _Status(status=_Status.SERVING).SerializeToString()
_NOT_SERVING: Final = _Status(status=_Status.NOT_SERVING).SerializeToString()
_UNKNOWN: Final = _Status(status=_Status.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """The standard health service for a server and some of its services. Thread-safe.

    Their health says whether the server is ready for calls. That of `LIVENESS` says that the process is alive, also
    while it starts or drains: an orchestrator that restarted it for that would cut its calls short.

    Attributes:
        handlers: The handlers by the methods' paths. See `Handlers`.

    Args:
        services: The names of the services. The server as a whole has the same health as they.
    """

    def __init__(self, *services: str) -> None:
        self._services = frozenset(("", *services))
        self._is_serving = False
        self._is_failing = False
        self._lock = threading.Lock()
        self._watches: dict[Rpc, _HealthWatch] = {}
        prefix = f"/{health.SERVICE_NAME}/"
        self.handlers: dict[str, Callable[[Rpc], None]] = {
            f"{prefix}Check": lambda rpc: rpc.receive(partial(self._check, rpc)),
            f"{prefix}Watch": lambda rpc: rpc.receive(partial(self._watch, rpc)),
        }

    @property
    def is_serving(self) -> bool:
        """Whether it reports SERVING."""
        return self._is_serving

    def set_serving(self, is_serving: bool) -> None:
        """Report SERVING or NOT_SERVING for all."""
        self._is_serving = is_serving and not self._is_failing
        with self._lock:
            watches = list(self._watches.values())
        for watch in watches:
            watch.update()

    def fail(self) -> None:
        """Report NOT_SERVING for all, for good."""
        self._is_failing = True
        self.set_serving(False)

    def end_watches(self) -> None:
        """End every watch: an open one would keep the server from stopping."""
        with self._lock:
            watches = list(self._watches)
        for rpc in watches:
            rpc.fail_with(grpc.StatusCode.CANCELLED, "the server is draining")

    def _answer(self, service: str) -> bytes:
        if service == LIVENESS:
            return _SERVING
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._is_serving else _NOT_SERVING

    def _check(self, rpc: Rpc, request: bytes | None) -> None:
        service = _parse_service(request)
        answer = None if service is None else self._answer(service)
        if answer is None:
            rpc.fail_with(grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid")
        elif answer == _UNKNOWN:
            rpc.fail_with(grpc.StatusCode.NOT_FOUND, "there is no such service")
        else:
            rpc.finish((), answer)

    def _watch(self, rpc: Rpc, request: bytes | None) -> None:
        service = _parse_service(request)
        if service is None:
            rpc.fail_with(grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid")
            return
        rpc.is_idle = rpc.has_all_requests = True
        watch = _HealthWatch(rpc, partial(self._answer, service))
        with self._lock:
            self._watches[rpc] = watch
        rpc.on_close = partial(self._forget, rpc)
        if rpc.is_closed:  # before `on_close` was set
            self._forget(rpc)
        watch.update()

    def _forget(self, rpc: Rpc) -> None:
        with self._lock:
            self._watches.pop(rpc, None)


class _HealthWatch:
    """A client that watches the health of a service. Of changes that come while one is being sent, it gets the last."""

    def __init__(self, rpc: Rpc, answer: Callable[[], bytes]) -> None:
        self._rpc = rpc
        self._answer = answer
        self._lock = threading.Lock()
        self._last_answer = b""
        self._is_sending = False

    def update(self) -> None:
        """Send the status if it differs from the last one sent."""
        with self._lock:
            answer = self._answer()
            if self._is_sending or answer == self._last_answer:
                return
            self._last_answer = answer
            self._is_sending = True
        self._rpc.send(answer, self._finish_send)

    def _finish_send(self) -> None:
        with self._lock:
            self._is_sending = False
        if not self._rpc.is_closed:
            self.update()


def _parse_service(request: bytes | None) -> str | None:
    """Return the service that a request asks about; None if the request is not valid."""
    if request is None or len(request) > _LARGEST_BYTES:
        return None
    try:
        return health_pb2.HealthCheckRequest.FromString(request).service
    except DecodeError:
        return None
