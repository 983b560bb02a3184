"""A service for asyncio that enlarges pictures by calls to the server, for many callers at a time. It speaks HTTP.

Run it with ``python -m examples.asyncio_service --target HOST:PORT``, and enlarge a photograph fourfold with
``curl --data-binary @photograph.png http://127.0.0.1:8080/4 --output enlarged.png``. If a caller hangs up, its call is
cancelled, on the server too.
"""

from __future__ import annotations

import asyncio
import io
import re
from http import HTTPStatus
from typing import Final, NamedTuple

import click
import numpy as np
from PIL import Image

import deconvd_client.aio
from deconvd_client import DeconvdError
from deconvd_client.aio import AsyncConnection
from examples.command_line import report_errors, target_option
from examples.enlarge_photograph import Operands
from examples.pictures import Array, from_grey_levels

__all__ = ["EnlargingService", "main"]

_LARGEST_BYTES: Final = 32 << 20
_FACTOR: Final = re.compile(r"POST /([2-8]) HTTP/1\.[01]\r\n")
_LENGTH: Final = re.compile(r"^content-length: *(\d+)\r$", re.IGNORECASE | re.MULTILINE)


class Request(NamedTuple):
    """A picture, as the bytes of a file, and how many times larger it shall be."""

    picture: bytes
    factor: int


class Reply(NamedTuple):
    """A picture, or a line of text that says why there is none."""

    status: HTTPStatus
    content: bytes


class EnlargingService:
    """Serves callers, each in a task of its own, by one connection to the server."""

    def __init__(self, F: AsyncConnection) -> None:
        self._F = F

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a caller's request, unless the caller hangs up before."""
        try:
            request = await read_request(reader)
            reply = await self._reply_while_connected(request, reader)
            if reply is None:
                click.echo("a caller hung up: its call is cancelled")
                return
            status, content = reply
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(content)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
            await writer.drain()
        except (EOFError, ConnectionError):
            click.echo("a caller hung up")
        finally:
            writer.close()

    async def _reply_while_connected(
        self, request: Request | None, reader: asyncio.StreamReader
    ) -> Reply | None:
        """Return the reply. None if the caller hangs up before: then the call is cancelled."""
        replying = asyncio.create_task(self._reply(request))
        hanging_up = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait([replying, hanging_up], return_when=asyncio.FIRST_COMPLETED)
            return replying.result() if replying.done() else None
        finally:
            replying.cancel()
            hanging_up.cancel()

    async def _reply(self, request: Request | None) -> Reply:
        if request is None:
            usage = "POST a picture of at most 32 MB to /2 ... /8, with its length\n"
            return Reply(HTTPStatus.BAD_REQUEST, usage.encode())
        try:
            image = await asyncio.to_thread(decode, request.picture)
            x, W, pad = Operands.of(image, request.factor)
            y = await self._F.deconvolution_2d(x, W, stride=request.factor, pad=pad, groups=len(W))
            return Reply(HTTPStatus.OK, await asyncio.to_thread(encode, y))
        except DeconvdError as error:
            return Reply(HTTPStatus.BAD_GATEWAY, f"{error}\n".encode())
        except (OSError, Image.DecompressionBombError) as error:  # Pillow's
            return Reply(HTTPStatus.BAD_REQUEST, f"{error}\n".encode())


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Return a caller's request. None if it is not one that is served."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    factor, length = _FACTOR.match(head), _LENGTH.search(head)
    if factor is None or length is None or int(length[1]) > _LARGEST_BYTES:
        return None
    return Request(await reader.readexactly(int(length[1])), int(factor[1]))


def decode(picture: bytes) -> Array:
    """Return a picture's grey levels, of shape ``(h, w, 3)``.

    Raises:
        OSError: It is no picture.
        PIL.Image.DecompressionBombError: It is far too large.
    """
    with Image.open(io.BytesIO(picture)) as opened:
        return np.asarray(opened.convert("RGB"))


def encode(y: Array) -> bytes:
    """Return the PNG file of an enlarged image, of shape ``(1, 3, h, w)``."""
    file = io.BytesIO()
    from_grey_levels(y[0].transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


async def run(target: str, port: int) -> None:
    """Serve callers until the process is told to end."""
    async with deconvd_client.aio.connect(target) as F:
        service = EnlargingService(F)
        server = await asyncio.start_server(service.serve, "127.0.0.1", port)
        async with server:
            port = server.sockets[0].getsockname()[1]
            click.echo(f"Enlarging pictures at http://127.0.0.1:{port}/2 ... /8")
            await server.serve_forever()


@click.command()
@target_option
@click.option("--port", default=8080, show_default=True, help="0: any that is free.")
def main(target: str, port: int) -> None:
    """Enlarge pictures for callers by HTTP."""
    with report_errors():
        asyncio.run(run(target, port))


if __name__ == "__main__":
    main()
