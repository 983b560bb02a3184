"""The direct protocol does no I/O: asyncio can do it."""

from __future__ import annotations

import asyncio

from deconvd.direct.events import ANY_INSTANCE, Answer, CallHead, Event, Hello, MethodCode
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import PendingElements
from tests.direct_calls import REQUEST, calls_path
from tests.servers import ServerProcess


def test_asyncio_shares_it(server: ServerProcess) -> None:
    end = DirectProtocol(Role.CLIENT, ANY_INSTANCE)

    async def next_event(reader: asyncio.StreamReader) -> Event | PendingElements:
        while (event := end.next_event()) is None:
            space = end.receive_buffer()
            data = await reader.read(len(space))
            assert data
            space[: len(data)] = data
            end.note_received(len(data))
        return event

    async def call() -> pb.DeconvolveResponse:
        reader, writer = await asyncio.open_unix_connection(calls_path(server))
        writer.write(end.send(Hello(ANY_INSTANCE)))
        await next_event(reader)
        writer.write(end.send(CallHead(MethodCode.Deconvolve, 30, REQUEST.SerializeToString())))
        answer = await next_event(reader)
        assert isinstance(answer, Answer), answer
        writer.close()
        await writer.wait_closed()
        return pb.DeconvolveResponse.FromString(answer.message)

    assert list(asyncio.run(call()).y.shape) == [1, 2, 4, 4]
    assert end.is_idle
