"""A valid request of each RPC, as parts of which each is a message."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import Message

from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from tests.packed import pack_by_definition

__all__ = ["GY", "HANDLE", "REQUESTS", "SERVICE", "SESSION", "W", "X", "tensor"]

SERVICE: Any = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

X, W, GY = (np.ones(s, np.float32) for s in ((2, 2, 3, 3), (2, 2, 2, 2), (2, 2, 4, 4)))

SESSION, HANDLE = bytes(range(16)), bytes(range(16, 32))
"""What stands in requests for a session of the server, and for a tensor that it keeps."""


def tensor(array: Array, *, with_elements: bool) -> pb.Tensor:
    described = pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape)
    if with_elements:
        described.raw = array.tobytes()
    return described


def _forward(*, with_elements: bool) -> pb.DeconvolveRequest:
    x, w = (tensor(array, with_elements=with_elements) for array in (X, W))
    return pb.DeconvolveRequest(x=x, w=w, geometry=_geometry(), session=SESSION)


def _backward(*, with_elements: bool) -> pb.DeconvolveGradRequest:
    x, w, gy = (tensor(array, with_elements=with_elements) for array in (X, W, GY))
    wanted = pb.GradientMask(gx=True, gw=True, gb=True)
    return pb.DeconvolveGradRequest(
        x=x, w=w, gy=gy, geometry=_geometry(), wanted=wanted, session=SESSION
    )


def _geometry() -> pb.Geometry:
    one = pb.Pair(h=1, w=1)
    return pb.Geometry(stride=one, pad=pb.Pair(), dilate=one, groups=1, outsize=pb.OutputSize(h=4))


REQUESTS: dict[str, list[Message]] = {
    "Deconvolve": [_forward(with_elements=True)],
    "DeconvolveGrad": [_backward(with_elements=True)],
    "DeconvolveStream": [
        pb.DeconvolveStreamRequest(
            header=pb.DeconvolveStreamHeader(
                request=_forward(with_elements=False), slice_samples_count=1
            )
        ),
        pb.DeconvolveStreamRequest(chunk=W.tobytes()),
        pb.DeconvolveStreamRequest(chunk=X.tobytes()),
    ],
    "DeconvolveGradStream": [
        pb.DeconvolveGradStreamRequest(
            header=pb.DeconvolveGradStreamHeader(
                request=_backward(with_elements=False), slice_samples_count=2
            )
        ),
        pb.DeconvolveGradStreamRequest(chunk=W.tobytes()),
        pb.DeconvolveGradStreamRequest(packed_chunk=pack_by_definition(X.reshape(-1).view("u4"))),
        pb.DeconvolveGradStreamRequest(chunk=GY.tobytes()),
    ],
    "HoldSession": [pb.HoldSessionRequest(tenant_key=b"key"), pb.HoldSessionRequest()],
    "PutTensor": [
        pb.PutTensorRequest(
            header=pb.PutTensorHeader(session=SESSION, tensor=tensor(X, with_elements=False))
        ),
        pb.PutTensorRequest(chunk=X.tobytes()),
    ],
    "GetTensor": [pb.GetTensorRequest(session=SESSION, resident=pb.Resident(handle=HANDLE))],
    "DropTensors": [pb.DropTensorsRequest(session=SESSION, residents=[pb.Resident(handle=HANDLE)])],
    "GetServerInfo": [pb.GetServerInfoRequest(session=SESSION)],
}
