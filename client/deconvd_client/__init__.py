"""The client of deconvd: Chainer's deconvolution_2d and its gradients, computed by a server.

::

    import deconvd_client

    F = deconvd_client.connect("gpu-host:50051")
    y = F.deconvolution_2d(x, W, b, stride=2, pad=1)
    gx, gW, gb = F.deconvolution_2d_grad(x, W, b, gy, stride=2, pad=1)

`connect` and `Connection` describe the arguments. Every failure of a call is a subclass of `DeconvdError`.
"""

from typing import TYPE_CHECKING

from deconvd import __version__
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    LostTensorError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.model.gradients import Gradients
from deconvd.wire.cache_state import CacheState
from deconvd_client.connection import Connection, connect
from deconvd_client.pullback import Pullback
from deconvd_client.remote import Remote
from deconvd_client.residents import RemoteGradients, RemoteTensor
from deconvd_client.server_info import DeviceDescription, ServerInfo

__all__ = [
    "CacheState",
    "CallCancelledError",
    "Connection",
    "DeadlineError",
    "DeconvdError",
    "DeviceDescription",
    "ExhaustedError",
    "Gradients",
    "InternalError",
    "InvalidArgumentError",
    "LostTensorError",
    "NotFoundError",
    "Pullback",
    "Remote",
    "RemoteGradients",
    "RemoteTensor",
    "ServerInfo",
    "UnavailableError",
    "UnimplementedError",
    "__version__",
    "connect",
]

if not TYPE_CHECKING:  # type checkers must not see it, or they would accept every name

    def __getattr__(name: str) -> object:
        if name in vars(Connection):
            raise AttributeError(
                f"module 'deconvd_client' has no attribute {name!r}: it belongs to a connection. "
                f"Use deconvd_client.connect(target).{name}"
            )
        raise AttributeError(f"module 'deconvd_client' has no attribute {name!r}")
