"""What hostile clients do by direct lines, and by connections to any of the server's sockets."""

from __future__ import annotations

import time
from contextlib import suppress
from random import Random

from deconvd.direct.events import FRAME_HEAD, CallHead, FrameKind, MethodCode, pack_frame
from deconvd.direct.frame_stream import FrameStream
from deconvd.v1 import deconvd_pb2 as pb
from tests.direct_calls import send_call
from tests.soak.honest import WAYS
from tests.soak.hostile.attack import FOR_EVER_S, HELD_S, Attacker, hostile
from tests.soak.hostile.by_memory import Borrower
from tests.soak.hostile.http2 import SERVICE
from tests.soak.hostile.requests import (
    of_a_huge_kernel,
    of_empty_slices,
    of_one_pixel,
    of_samples_to_come,
    of_unknown_content,
    stream_of,
    tensor,
)
from tests.soak.places import connect_tcp, connect_unix
from tests.stream_pairs import send_raw


@hostile
def idle_streams(a: Attacker) -> None:
    """Streams, in each of which nothing follows the header."""
    connection = a.http2()
    for _ in range(32):
        header = of_samples_to_come()
        with suppress(OSError):  # the server gives up one or the other
            connection.call(f"{SERVICE}DeconvolveStream", header, is_last=False)
            send_call(a.line(), MethodCode.DeconvolveStream, header, timeout_s=FOR_EVER_S)


@hostile
def early_calls(a: Attacker) -> None:
    """Early calls whose operands are never written."""
    with Borrower(a.places.memory_path) as borrower:
        x = tensor((16, 1, 128, 128))
        x.shared.CopyFrom(borrower.lend(1 << 20))
        request = pb.DeconvolveRequest(x=x, w=tensor((1, 1, 1, 1), bytes(4)))
        for _ in range(280):
            with suppress(OSError):  # of those that are too many
                send_call(
                    *(a.line(), MethodCode.Deconvolve, request.SerializeToString()),
                    timeout_s=FOR_EVER_S,
                    is_early=True,
                )
        time.sleep(HELD_S)


@hostile
def unread_lines(a: Attacker) -> None:
    """Answers of 58 MB on lines that nobody reads."""
    header = stream_of(of_one_pixel(None))
    for _ in range(40):
        with suppress(OSError):
            line = a.line()
            send_call(line, MethodCode.DeconvolveStream, header, timeout_s=FOR_EVER_S)
            send_raw(
                line, pack_frame(FrameKind.ELEMENTS, bytes(8)) + pack_frame(FrameKind.END, b"")
            )


@hostile
def many_lines(a: Attacker) -> None:
    """More lines than there are, greeted and then idle, and each with a call under way."""
    slow = of_a_huge_kernel().SerializeToString()
    for number in range(300):
        with suppress(OSError):  # of those that are too many
            line = a.line()
            if number % 100 == 0:
                send_call(line, MethodCode.DeconvolveGrad, slow, timeout_s=FOR_EVER_S)


@hostile
def no_handshake(a: Attacker) -> None:
    """Connections to every socket that say nothing."""
    for _ in range(300):
        for port in (a.places.port, a.places.direct_port):
            a.held.enter_context(connect_tcp(port, a.source))
        for path in (a.places.path, a.places.calls_path):
            a.held.enter_context(connect_unix(path))


@hostile
def fuzzed_bytes(a: Attacker) -> None:
    """Bytes of no sense to every socket, some of them behind a good begin."""
    for _ in range(100):
        with suppress(OSError):
            _send_to_a_line(a.line(), a.random)
        with suppress(OSError), a.http2() as connection:
            method = a.random.choice(["Deconvolve", "DeconvolveGrad", "DeconvolveStream"])
            connection.call(SERVICE + method, _damaged(stream_of(of_one_pixel()), a.random))
            connection.send_raw(a.random.randbytes(100))
        for port in (a.places.port, a.places.direct_port):
            with suppress(OSError), connect_tcp(port, a.source) as end:
                end.sendall(a.random.randbytes(100))


def _send_to_a_line(line: FrameStream, random: Random) -> None:
    with line:
        method = random.choice(list(MethodCode))
        head = CallHead(method, 1, _damaged(stream_of(of_one_pixel()), random)).pack()
        send_raw(line, _damaged(head, random) + random.randbytes(random.randrange(100)))
        line.set_deadline(0.05)
        line.next_event()


def _damaged(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.randrange(3)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    return bytes(damaged)


@hostile
def empty_slices_on_lines(a: Attacker) -> None:
    """Streams of 2^31 - 1 slices without any element, on lines."""
    methods = MethodCode.DeconvolveStream, MethodCode.DeconvolveGradStream
    for _ in range(8):
        for method, header in zip(methods, of_empty_slices(), strict=True):
            line = a.line()
            send_call(line, method, header, timeout_s=FOR_EVER_S)
            send_raw(line, pack_frame(FrameKind.END, b""))


@hostile
def empty_early_chunks(a: Attacker) -> None:
    """Chunks of nothing, before the server has said what it lacks."""
    session = a.session().session
    for _ in range(4):
        line = a.line()
        header = of_unknown_content(session)
        send_call(line, MethodCode.DeconvolveStream, header, timeout_s=FOR_EVER_S)
        send_raw(line, FRAME_HEAD.pack(FrameKind.ELEMENTS, 0) * 80_000)


@hostile
def broken_clients(a: Attacker) -> None:
    """A client like the honest ones, that is stopped, continued and killed in the middle, as all these are."""
    client = WAYS[a.random.choice(list(WAYS))](a.places)
    until_s = time.monotonic() + 3
    while time.monotonic() < until_s:
        client.call(a.random)
