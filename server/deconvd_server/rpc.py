"""The service by gRPC: behaviours as its handlers. See `serve` for how a call begins and ends.

Calls are received and answered in an event loop, and served by workers once their first message has come: a call that
sends none takes neither a thread nor a place. All methods receive as streams do, so that what waits for a first message
can be told why it waits no more. Requests are parsed by workers rather than by gRPC, which would blame the server
(INTERNAL) for garbage.

The server listens before there is a service, and gRPC takes no new handlers then: they are behind a `Gate`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.rpc import status_pb2
from grpc_status import rpc_status

from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import encode
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd.status import status_from_error
from deconvd_server.behaviours import Behaviour, Held, Holding, Parts, Sink, Source, Stream, Unary
from deconvd_server.call import Call, CallerGoneError
from deconvd_server.peers import counted_by_grpc
from deconvd_server.rpc_messages import Requests, Responses
from deconvd_server.serve import Observer, Serving
from deconvd_server.workers import Workers

__all__ = ["Gate"]

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_T = TypeVar("_T")

_FIRST_MESSAGE_S: Final = 60.0
"""How long a call may be without its first message: enough for a large one over a slow network."""

_BREAK_S: Final = 0.2
"""How long after a stream's last message gRPC may take to say that it broke rather than was closed."""

_SILENT: Final = DeadlineError(f"the call has sent no message for {_FIRST_MESSAGE_S:g} s")
_STARTING: Final = UnavailableError(
    "the server is starting: its device is not ready yet", retry_after_s=0.2
)
_DRAINING: Final = UnavailableError("the server is draining: it takes no calls", retry_after_s=0.2)


class Gate:
    """What serves a service's methods. Until it is opened, and once it is closed, they answer UNAVAILABLE.

    To be used in the event loop, but for `open`.

    Attributes:
        handlers: By the methods' paths; for `grpc.aio`.
        calls_count: Calls under way whose first message has come.

    Args:
        service: Has the methods.
        workers: Serve the calls.
        observers: Hear of every call.
    """

    def __init__(
        self, service: ServiceDescriptor, workers: Workers, observers: Sequence[Observer]
    ) -> None:
        self._workers = workers
        self._observers = observers
        self._behaviours: Mapping[str, Behaviour] = {}
        self._refusal: DeconvdError | None = _STARTING
        self._waiting: set[asyncio.Task[Any]] = set()
        self._ended = asyncio.Event()
        self.calls_count = 0
        self.handlers = {
            f"/{service.full_name}/{method.name}": self._handler(method)
            for method in service.methods
        }

    def open(self, behaviours: Mapping[str, Behaviour]) -> None:
        """Serve calls from now on with behaviours, by the names of the methods."""
        self._behaviours = behaviours
        self._refusal = None

    def close(self) -> None:
        """Take no more calls. Those that have sent no message yet are none."""
        self._refusal = _DRAINING
        for task in self._waiting:
            task.cancel()

    async def ended(self) -> None:
        """Return once no call is under way."""
        while self.calls_count:
            self._ended.clear()
            await self._ended.wait()

    def _handler(self, method: MethodDescriptor) -> _Handler:
        name: str = method.name

        async def answer(_messages: Any, context: _Context) -> bytes:
            return await self._answer(name, context)

        async def stream(_messages: Any, context: _Context) -> None:
            await self._stream(name, context)

        if method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.stream_unary_rpc_method_handler(answer)

    async def _answer(self, name: str, context: _Context) -> bytes:
        """Serve a method that has one response."""
        if self._refusal is not None:
            await _abort(context, self._refusal)
        behaviour = self._behaviours[name]
        first = await self._first_message(context)
        serving = self._serving(behaviour, context)
        if isinstance(behaviour, Unary):
            if first is None:
                await _abort(
                    context, InvalidArgumentError("the call must have a request, got none")
                )
            response = await self._served(
                partial(_answer_to_one, behaviour, first, serving), serving.call, context
            )
        else:
            assert isinstance(behaviour, Sink), behaviour
            requests = Requests(first, context, serving.call)
            receiving = asyncio.create_task(requests.receive())
            try:
                response = await self._served(
                    partial(_answer_to_many, behaviour, requests, serving), serving.call, context
                )
            finally:
                receiving.cancel()
        if serving.failure is not None:
            await _abort_with(context, serving.failure)
        context.set_trailing_metadata(serving.call.ledger.as_metadata())
        return response

    async def _stream(self, name: str, context: _Context) -> None:
        """Serve a method that has a stream of responses."""
        if self._refusal is not None:
            await _abort(context, self._refusal)
        behaviour = self._behaviours[name]
        first = await self._first_message(context)
        serving = self._serving(behaviour, context)
        if isinstance(behaviour, Held):
            await self._hold(behaviour, first, serving, context)
        else:
            await self._respond(behaviour, first, serving, context)
        if serving.failure is not None:
            await _abort_with(context, serving.failure)
        context.set_trailing_metadata(serving.call.ledger.as_metadata())

    async def _respond(
        self,
        behaviour: Behaviour,
        first: bytes | None,
        serving: Serving,
        context: _Context,
    ) -> None:
        """Send a stream of responses that a worker makes."""
        requests = Requests(first, context, serving.call)
        responses = Responses(serving.call)
        receiving = asyncio.create_task(requests.receive())
        try:
            work = partial(_respond, behaviour, requests, responses, serving)
            await self._submit(work, serving.call, context)
            await responses.send(context)
        finally:
            receiving.cancel()

    async def _hold(
        self, behaviour: Held, first: bytes | None, serving: Serving, context: _Context
    ) -> None:
        """Serve a call that is open for long: a worker for each message, none in between."""
        hanging_up = _HangingUp()
        with serving as call, hanging_up:
            holding = await self._served(
                lambda: behaviour.serve(_held_message(behaviour, first), call, hanging_up.begin),
                call,
                context,
            )
            await context.write(holding.response.SerializeToString())
            while (data := await context.read()) is not grpc.aio.EOF:
                await self._served(partial(_note, behaviour, holding, data), call, context)
            await asyncio.sleep(_BREAK_S)  # if it broke, we are cancelled meanwhile
            await self._served(holding.end, call, context)

    async def _first_message(self, context: _Context) -> bytes | None:
        """Return a call's first message; None if its caller sends none."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_S):
                message = await context.read()
        except TimeoutError:
            await _abort(context, _SILENT)
        except MemoryError:
            await _abort(context, ExhaustedError("the server has no memory for such a message"))
        except asyncio.CancelledError:
            if self._refusal is None:
                raise
            await _abort(context, self._refusal)
        finally:
            self._waiting.discard(task)
        return None if message is grpc.aio.EOF else message

    def _serving(self, behaviour: Behaviour, context: _Context) -> Serving:
        """Return what serves the call of a context, which ends with it."""
        peer = context.peer()
        call = Call(context.time_remaining(), peer, counted_by_grpc(peer))
        self.calls_count += 1

        def end(_context: _Context) -> None:
            self.calls_count -= 1
            if not self.calls_count:
                self._ended.set()
            call.cancel()
            call.end()

        context.add_done_callback(end)  # type: ignore[arg-type]  # of which its stub has no instance
        return Serving(behaviour.name, call, self._observers)

    async def _served(self, work: Callable[[], _T], call: Call, context: _Context) -> _T:
        """Return what a worker returns. Raises what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def run() -> None:
            try:
                settle = partial(_set_result, future, work())
            except BaseException as error:
                settle = partial(_set_error, future, error)
            loop.call_soon_threadsafe(settle)

        await self._submit(run, call, context)
        return await future

    async def _submit(self, work: Callable[[], None], call: Call, context: _Context) -> None:
        """Have a worker do something for a call, which it may outlast: what is counted for that is held until then."""

        def run() -> None:
            try:
                work()
            finally:
                call.end()

        call.hold()
        try:
            self._workers.submit(run)
        except UnavailableError as error:
            call.end()
            await _abort(context, error)


def _answer_to_one(behaviour: Unary, data: bytes, serving: Serving) -> bytes:
    with serving as call:
        return encode(behaviour.serve(behaviour.decoded(data), call))
    return b""


def _answer_to_many(behaviour: Sink, requests: Requests, serving: Serving) -> bytes:
    with serving as call:
        reader = behaviour.reader(ChunkSource(requests.messages(), behaviour.request_type))
        return behaviour.serve(reader, call).SerializeToString()
    return b""


def _respond(
    behaviour: Behaviour, requests: Requests, responses: Responses, serving: Serving
) -> None:
    try:
        with serving as call, closing(_parts(behaviour, requests, call)) as parts:
            for part in parts:
                for message in messages_of(part):
                    responses.put(message)
    except CallerGoneError:
        return  # nobody is there to be told
    finally:
        responses.end()


def _held_message(behaviour: Held, data: bytes | None) -> Any:
    if data is None:
        raise InvalidArgumentError("a session must begin with a message, got none")
    return behaviour.decoded(data).message


def _note(behaviour: Held, holding: Holding, data: bytes) -> None:
    holding.note(_held_message(behaviour, data))


class _HangingUp:
    """A block in the loop that may be ended from any thread: with CallCancelledError."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._is_inside = True
        self._has_begun = False

    def begin(self) -> None:
        """End the block. Later times, and after its end, nothing is done."""
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._is_inside and not self._has_begun and self._task is not None:
            self._has_begun = True
            self._task.cancel()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._is_inside = False
        if self._has_begun and isinstance(error, asyncio.CancelledError):
            raise CallCancelledError("the server has hung up") from None


def _parts(behaviour: Behaviour, requests: Requests, call: Call) -> Parts:
    """Return the parts of a response."""
    messages = requests.messages()
    match behaviour:
        case Source():
            return behaviour.serve(behaviour.decoded(next(messages, b"")), call)
        case Stream():
            source = ChunkSource(messages, behaviour.request_type)
            return behaviour.serve(behaviour.reader(source), call)
        case _:
            raise AssertionError(behaviour)


def _set_result(future: asyncio.Future[_T], result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: asyncio.Future[_T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


async def _abort(context: _Context, error: DeconvdError) -> NoReturn:
    await _abort_with(context, status_from_error(error))


async def _abort_with(context: _Context, failure: status_pb2.Status) -> NoReturn:
    """End a call with a failure: by raising."""
    status = rpc_status.to_status(failure)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError  # `abort` has raised
