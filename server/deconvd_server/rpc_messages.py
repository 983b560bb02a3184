"""The messages of a gRPC stream, between the event loop that moves them and the worker that serves the call.

Neither side is more than one message ahead of the other: gRPC's flow control bounds what is held for a client that is
slower, or faster, than its call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc

from deconvd.errors import CallCancelledError, ExhaustedError
from deconvd_server.call import Call, CallerGoneError

__all__ = ["Requests", "Responses"]


class Requests:
    """What the client sends, for the worker.

    Args:
        first: The first message, which has come; None if the client sends none.
        context: The rest comes from there.
        call: Once it is cancelled there is no more.
    """

    def __init__(self, first: bytes | None, context: Any, call: Call) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._come: SimpleQueue[bytes | ExhaustedError | None] = SimpleQueue()
        self._come.put(first)
        self._taken = asyncio.Event()
        self._is_last = first is None
        call.on_cancel(self._wake)

    async def receive(self) -> None:
        """Receive the rest, in the loop: each message once the one before has been taken."""
        try:
            while not self._is_last:
                await self._taken.wait()
                self._taken.clear()
                message = await self._context.read()
                self._is_last = message is grpc.aio.EOF
                self._come.put(None if self._is_last else message)
        except MemoryError:
            self._come.put(ExhaustedError("the server has no memory for the stream's next message"))

    def messages(self) -> Iterator[bytes]:
        """Yield the messages, in the worker.

        Raises:
            CallCancelledError: The caller has gone.
            ExhaustedError: There is no memory for a message.
        """
        while True:
            message = self._come.get()
            if self._call.is_cancelled:
                raise CallCancelledError("the caller gave the call up")
            if message is None:
                return
            if isinstance(message, ExhaustedError):
                raise message
            self._loop.call_soon_threadsafe(self._taken.set)
            yield message

    def _wake(self) -> None:
        self._come.put(None)


class Responses:
    """What the worker sends, for the client.

    Args:
        call: Once it is cancelled nobody is there to be sent anything.
    """

    def __init__(self, call: Call) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._ready: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._room.put(None)
        call.on_cancel(self._wake)

    async def send(self, context: Any) -> None:
        """Send all there are, in the loop; return once the worker has no more."""
        while (message := await self._ready.get()) is not None:
            await context.write(message)
            self._room.put(None)

    def put(self, message: bytes) -> None:
        """Have a message sent, in the worker, once the one before has been.

        Raises:
            CallerGoneError: The caller has gone.
            DeconvdError: The server has stopped the call.
        """
        self._room.get()
        if self._call.is_cancelled:
            raise self._call.stopped_by or CallerGoneError("the caller gave the call up")
        self._loop.call_soon_threadsafe(self._ready.put_nowait, message)

    def end(self) -> None:
        """Say, in the worker, that there is no more."""
        self._loop.call_soon_threadsafe(self._ready.put_nowait, None)

    def _wake(self) -> None:
        self._room.put(None)
