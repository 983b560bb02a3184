"""What hostile clients do by gRPC."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import grpc
import numpy as np

from deconvd.v1 import deconvd_pb2 as pb
from tests.soak.hostile.attack import Attacker, hostile
from tests.soak.hostile.http2 import HEALTH, REFLECTION, SERVICE
from tests.soak.hostile.requests import (
    of_a_huge_kernel,
    of_an_empty_batch,
    of_empty_slices,
    of_one_pixel,
    stream_of,
    tensor,
)
from tests.wire import varint

_PARSED_S = 4.0
"""How long an attack waits for the server to be at what it was sent, which may take it long, before it goes."""

_METHODS = [
    f"{SERVICE}{method.name}"
    for method in pb.DESCRIPTOR.services_by_name["DeconvolutionService"].methods
]


@hostile
def header_only_calls(a: Attacker) -> None:
    """Calls that begin and say nothing, of every method."""
    path = a.random.choice([*_METHODS, f"{HEALTH}Check", f"{HEALTH}Watch", REFLECTION])
    for count in (1100, 300, 300):
        connection = a.http2()
        for _ in range(count):
            connection.begin(path)


@hostile
def calls_that_go_away(a: Attacker) -> None:
    """Calls that are given up: before their message, in its midst, and while they are computed."""
    connection = a.http2()
    small, slow = of_one_pixel().SerializeToString(), of_a_huge_kernel().SerializeToString()
    for number in range(150):
        match number % 3:
            case 0:
                stream = connection.begin(a.random.choice(_METHODS))
            case 1:
                stream = connection.call(f"{SERVICE}Deconvolve", small[:-2], is_last=False)
            case _:
                stream = connection.call(f"{SERVICE}DeconvolveGrad", slow)
        if number % 10:
            connection.cancel(stream)


@hostile
def sessions_by_the_hundred(a: Attacker) -> None:
    """More sessions than there are."""
    connection = a.http2()
    for _ in range(400):
        connection.call(f"{SERVICE}HoldSession", b"", is_last=False)


@hostile
def malformed_reflection(a: Attacker) -> None:
    """What is no message where one of reflection's is expected, or of health's."""
    for path in (REFLECTION, f"{HEALTH}Watch", f"{HEALTH}Check", f"{SERVICE}HoldSession"):
        a.http2().call(path, b"\xff\xff\xff", is_last=False)


@hostile
def huge_results(a: Attacker) -> None:
    """Requests of a few bytes for results of 60 MB, and streams that announce operands of that size."""
    connection = a.http2()
    for _ in range(12):
        connection.call(f"{SERVICE}Deconvolve", of_one_pixel().SerializeToString())
        connection.call(f"{SERVICE}DeconvolveGrad", of_an_empty_batch().SerializeToString())
    large = pb.DeconvolveRequest(x=tensor((9, 1, 1, 1)), w=tensor((1, 15_000_000, 1, 1)))
    large.b.CopyFrom(tensor((15_000_000,)))
    for _ in range(16):
        connection.call(f"{SERVICE}DeconvolveStream", stream_of(large), is_last=False)


@hostile
def unread_answers(a: Attacker) -> None:
    """Answers of 58 MB that gRPC may send, and that nobody reads."""
    for _ in range(24):
        a.http2().call(f"{SERVICE}Deconvolve", of_one_pixel().SerializeToString())


@hostile
def small_unread_answers(a: Attacker) -> None:
    """Answers of 100 KiB, by the thousand, of which gRPC may not send a byte."""
    message = of_one_pixel(side=160).SerializeToString()
    for _ in range(6):
        connection = a.http2(answer_bytes=0)
        for _ in range(500):
            connection.call(f"{SERVICE}Deconvolve", message)
            time.sleep(0.002)  # as fast as they are answered: what is refused keeps nothing


@hostile
def unread_health(a: Attacker) -> None:
    """Calls for health by the hundred, whose answers nobody reads.

    Of more than a thousand that wait to be accepted, gRPC's core ends some, anybody's, with CANCELLED.
    """
    for _ in range(4):
        connection = a.http2(answer_bytes=0)
        for _ in range(100):
            connection.call(f"{HEALTH}Check", b"")


@hostile
def pinned_tensors(a: Attacker) -> None:
    """Tensors that are asked for, so that they cannot be displaced, and whose elements nobody reads."""
    holder = a.session()
    for _ in range(3):
        try:
            resident = pb.Resident(handle=holder.put(np.ones((5, 1 << 20), np.float32)))
        except grpc.RpcError:
            return
        request = pb.GetTensorRequest(session=holder.session, resident=resident)
        for _ in range(4):
            a.http2().call(f"{SERVICE}GetTensor", request.SerializeToString())


@hostile
def tiny_tensors(a: Attacker) -> None:
    """Thousands of tensors of one element, and then large ones in their place."""
    holder = a.session()
    until_s = time.monotonic() + 5
    with suppress(grpc.RpcError):
        while time.monotonic() < until_s:
            holder.put(np.ones(1, np.float32))
    with suppress(grpc.RpcError):
        for _ in range(20):
            holder.put(np.ones(1 << 20, np.float32))


@hostile
def two_byte_fields(a: Attacker) -> None:
    """Messages of 8 MB that are made of fields of two bytes."""
    shape = b"\x10\x01" * (2 << 20)
    x = b"\x0a" + varint(len(shape)) + shape
    for method, message in (("DropTensors", b"\x12\0" * (4 << 20)), ("Deconvolve", x)):
        a.http2().call(SERVICE + method, message)
    time.sleep(_PARSED_S)


@hostile
def gzip_bombs(a: Attacker) -> None:
    """Compressed messages of zeros: of a size that is allowed, and of one that is not."""
    call: Any = a.channel().unary_unary(f"{SERVICE}Deconvolve")
    for size_bytes in (60 << 20, 200 << 20):
        with suppress(grpc.RpcError):
            call(bytes(size_bytes), timeout=10, compression=grpc.Compression.Gzip)


@hostile
def waiting_requests(a: Attacker) -> None:
    """Large requests that wait for each other."""
    x, w = tensor((10, 1, 1024, 1024), bytes(40 << 20)), tensor((1, 1, 9, 9), bytes(324))
    message = pb.DeconvolveRequest(x=x, w=w).SerializeToString()
    for _ in range(32):
        a.http2().call(f"{SERVICE}Deconvolve", message)


@hostile
def half_messages(a: Attacker) -> None:
    """Messages of 60 MB of which the last byte never comes."""
    for _ in range(8):
        connection = a.http2()
        for _ in range(8):
            stream = connection.begin(f"{SERVICE}Deconvolve")
            connection.send(stream, bytes(60 << 20), lacking_bytes=1)


@hostile
def huge_kernels(a: Attacker) -> None:
    """Gradients of a few bytes that take the processors for long."""
    connection = a.http2()
    for _ in range(4):
        connection.call(f"{SERVICE}DeconvolveGrad", of_a_huge_kernel().SerializeToString())
    time.sleep(_PARSED_S)


@hostile
def empty_slices(a: Attacker) -> None:
    """Streams of 2^31 - 1 slices without any element."""
    connection = a.http2()
    forward, gradients = of_empty_slices()
    for _ in range(8):
        connection.call(f"{SERVICE}DeconvolveStream", forward)
        connection.call(f"{SERVICE}DeconvolveGradStream", gradients)
