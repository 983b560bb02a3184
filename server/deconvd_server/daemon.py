"""The daemon's life: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.backend import Backend
from deconvd_server.device import Device
from deconvd_server.ends import ServingLostError
from deconvd_server.event_loop import the_loop
from deconvd_server.grpc_server import GrpcServer
from deconvd_server.health import Health
from deconvd_server.listen import bind, release
from deconvd_server.reflection import reflection_handlers
from deconvd_server.rpc import Gate
from deconvd_server.serve import CallLog, Observer
from deconvd_server.settings import Settings
from deconvd_server.workers import Workers

__all__ = ["Daemon", "State"]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

_WORKERS_COUNT: Final = 192
"""More than the calls and streams that run and wait: those that run are one for each processor, or a few for each
card, and 128 more may wait."""

_EARLY_WORKERS_COUNT: Final = 16
"""Those that are there from the start, so that calls are served when the system has no thread left."""

_LAST_CALLS_S: Final = 0.2
"""How long calls that still come are told UNAVAILABLE before gRPC ends what comes with CANCELLED. A client that tries
again does so later, and elsewhere."""

_log = logging.getLogger(__name__)


class State(Enum):
    """Where a daemon is in its life."""

    LISTENING = "listening"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Daemon:
    """A gRPC server with its service, health and reflection.

    It listens once made: health then says NOT_SERVING and calls are answered UNAVAILABLE, until
    `serve` has devices.

    Attributes:
        addresses: Where it listens, with the ports that it got.
        backend: What serves calls; None until the devices are ready.

    Args:
        observers: Hear of every call.
        on_lost: Called, in any thread, if a part that serves has ended by itself: the process must be started anew.

    Raises:
        InvalidArgumentError, AddressInUseError: It cannot listen on one of the addresses.
    """

    def __init__(
        self,
        settings: Settings,
        observers: Sequence[Observer] = (CallLog(),),
        on_lost: Callable[[ServingLostError], None] = lambda _error: None,
    ) -> None:
        self.state = State.LISTENING
        self.backend: Backend | None = None
        self._settings = settings
        self._observers = observers
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._loop = the_loop()
        self._workers = Workers(_WORKERS_COUNT, _EARLY_WORKERS_COUNT)
        self._loop.run(self._make())
        self.addresses = [
            bind(self._server, address, settings.access) for address in settings.addresses
        ]
        self._loop.run(self._server.start())

    async def _make(self) -> None:
        """Make what belongs to the loop, in it."""
        self._gate = Gate(_SERVICE, self._workers, self._observers)
        self._health = Health(_SERVICE.full_name)
        self._is_cut = asyncio.Event()
        self._server = GrpcServer(
            {**self._gate.handlers, **self._health.handlers, **reflection_handlers(_SERVICE)},
            self._settings.max_message_bytes,
            lambda: self._on_lost(ServingLostError("gRPC's serving task has ended")),
        )

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices and serve calls with them; return once it can.

        Raises:
            AddressInUseError: Another process has the port for direct calls.
        """
        devices = open_devices()
        try:
            backend = Backend(self._settings, devices, self.addresses, self._observers)
        except BaseException:
            for device in devices:
                device.close()
            raise
        with self._lock:
            if self.state is State.LISTENING:
                self.backend = backend
                self._gate.open(backend.behaviours)
                self.state = State.SERVING
                self._loop.loop.call_soon_threadsafe(self._health.set_serving, True)
                return
        backend.withdraw()  # it drains already
        backend.end_direct_calls(0)
        backend.close()

    def drain(self) -> bool:
        """Take no more calls, let those under way end, and stop: for good once it returns.

        Calls that outlast `drain_timeout_s` are cancelled.

        Returns:
            Whether no call was.
        """
        with self._lock:
            self.state = State.DRAINING
            backend = self.backend
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        self._loop.run(self._take_no_more())
        if backend is not None:
            backend.withdraw()  # while its paths are ours, like the socket beside them
        is_whole = self._loop.run(self._stop(deadline_s))
        if backend is not None:
            is_whole &= backend.end_direct_calls(max(deadline_s - time.monotonic(), 0))
        for address in self.addresses:
            release(address)
        self._workers.close()  # a cancelled call's may still be on its way out
        if backend is not None:
            backend.close()
        self.state = State.STOPPED
        return is_whole

    def fail(self) -> None:
        """Say NOT_SERVING for good: a device is lost, and only a new process can get it back."""
        self._loop.loop.call_soon_threadsafe(self._health.fail)

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._loop.loop.call_soon_threadsafe(self._is_cut.set)
        if self.backend is not None:
            self.backend.cancel_direct_calls()

    async def _take_no_more(self) -> None:
        self._health.fail()
        self._gate.close()

    async def _stop(self, deadline_s: float) -> bool:
        """Stop gRPC once no call is under way, or they are to be cancelled; return whether none was."""
        waits = [
            asyncio.create_task(wait) for wait in (self._is_cut.wait(), self._ended(deadline_s))
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        is_whole = not self._gate.calls_count
        for wait in waits:
            wait.cancel()
        await self._server.stop(None)
        return is_whole

    async def _ended(self, deadline_s: float) -> None:
        """Return once no call is under way, or the time has come."""
        await asyncio.sleep(min(_LAST_CALLS_S, max(deadline_s - time.monotonic(), 0)))
        stopping = asyncio.create_task(self._server.stop(max(deadline_s - time.monotonic(), 0)))
        self._health.end_watches()
        ended = asyncio.create_task(self._gate.ended())
        await asyncio.wait(
            [stopping, ended],
            timeout=max(deadline_s - time.monotonic(), 0),
            return_when=asyncio.FIRST_COMPLETED,
        )
