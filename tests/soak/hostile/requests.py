"""Requests that take little to send and much to serve."""

from __future__ import annotations

import os
from collections.abc import Collection

from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["tensor"]

_MOST_SAMPLES = 2**31 - 1
_SIDE = 3800
"""Of a y of one channel that a message of 64 MiB has room for."""

_CHANNELS_COUNT = 15_000_000
_KERNEL = 4000
_ONE = bytes(4)


def tensor(shape: Collection[int], raw: bytes | None = None) -> pb.Tensor:
    """Return a tensor of float32, or the description of one."""
    message = pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=shape)
    if raw is not None:
        message.raw = raw
    return message


def of_one_pixel(raw: bytes | None = _ONE, side: int = _SIDE) -> pb.DeconvolveRequest:
    """Return a request for a y of 58 MB, or of another side."""
    pair = {"h": side, "w": side}
    geometry = pb.Geometry(stride=pb.Pair(**pair), outsize=pb.OutputSize(**pair))
    one = tensor((1, 1, 1, 1), raw)
    return pb.DeconvolveRequest(x=one, w=one, geometry=geometry)


def of_an_empty_batch() -> pb.DeconvolveGradRequest:
    """Return a request for a gb of 60 MB, of no samples."""
    return pb.DeconvolveGradRequest(
        x=tensor((0, 1, 1, 1)),
        w=tensor((1, _CHANNELS_COUNT, 1, 1)),
        gy=tensor((0, _CHANNELS_COUNT, 1, 1), b""),
        wanted=pb.GradientMask(gb=True),
    )


def of_a_huge_kernel() -> pb.DeconvolveGradRequest:
    """Return a request for a gW of 64 MB, of one pixel."""
    pad = (_KERNEL - 2) // 2
    return pb.DeconvolveGradRequest(
        x=tensor((1, 1, 1, 1), _ONE),
        w=tensor((1, 1, _KERNEL, _KERNEL)),
        gy=tensor((1, 1, 2, 2), 4 * _ONE),
        geometry=pb.Geometry(pad=pb.Pair(h=pad, w=pad)),
        wanted=pb.GradientMask(gw=True),
    )


def stream_of(request: pb.DeconvolveRequest) -> bytes:
    """Return the first message of a stream for a request."""
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)
    return pb.DeconvolveStreamRequest(header=header).SerializeToString()


def gradients_stream_of(request: pb.DeconvolveGradRequest) -> bytes:
    """Return the first message of a stream for a request for gradients."""
    header = pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=1)
    return pb.DeconvolveGradStreamRequest(header=header).SerializeToString()


def of_empty_slices() -> tuple[bytes, bytes]:
    """Return the first messages of streams of nothing, slice by slice, for y and for gx."""
    x, w = tensor((_MOST_SAMPLES, 0, 1, 1)), tensor((0, 0, 1, 1))
    gradients = pb.DeconvolveGradRequest(x=x, w=w, gy=x, wanted=pb.GradientMask(gx=True))
    return stream_of(pb.DeconvolveRequest(x=x, w=w)), gradients_stream_of(gradients)


def of_samples_to_come(samples_count: int = 1 << 12) -> bytes:
    """Return the first message of a stream that asks for elements."""
    x, w = tensor((samples_count, 4, 64, 64)), tensor((4, 4, 3, 3))
    return stream_of(pb.DeconvolveRequest(x=x, w=w))


def of_unknown_content(session: bytes) -> bytes:
    """Return the first message of a stream whose filter the server has to ask for."""
    w = tensor((64, 64, 4, 4))
    w.digest.blake3, w.digest.size_bytes = os.urandom(32), 4 * 64 * 64 * 16
    return stream_of(pb.DeconvolveRequest(x=tensor((4, 64, 8, 8)), w=w, session=session))
