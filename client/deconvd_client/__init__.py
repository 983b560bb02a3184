"""The client of deconvd: Chainer's deconvolution_2d and its gradients, computed by a server.

::

    import deconvd_client

    F = deconvd_client.connect("gpu-host:50051")
    y = F.deconvolution_2d(x, W, b, stride=2, pad=1)
    gx, gW, gb = F.deconvolution_2d_grad(x, W, b, gy, stride=2, pad=1)

`connect` and `Connection` describe the arguments. Every failure of a call is a subclass of `DeconvdError`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from deconvd import __version__

if TYPE_CHECKING:
    from deconvd.errors import (
        CallCancelledError,
        DeadlineError,
        DeconvdError,
        ExhaustedError,
        InternalError,
        InvalidArgumentError,
        LostTensorError,
        NotFoundError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
    )
    from deconvd.model.gradients import DoubleGradients, Gradients
    from deconvd.wire.cache_state import CacheState
    from deconvd_client.calls.ledgers import CallLedger
    from deconvd_client.connection import Connection
    from deconvd_client.connector import connect
    from deconvd_client.credentials import Tls
    from deconvd_client.local_server import local
    from deconvd_client.pullback import Pullback
    from deconvd_client.remote import Remote
    from deconvd_client.residents import RemoteGradients, RemoteTensor
    from deconvd_client.server_info import DeviceDescription, ServerInfo, WorkerDescription
    from deconvd_client.shapes import output_shape

__all__ = [
    "CacheState",
    "CallCancelledError",
    "CallLedger",
    "Connection",
    "DeadlineError",
    "DeconvdError",
    "DeviceDescription",
    "DoubleGradients",
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
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "WorkerDescription",
    "__version__",
    "connect",
    "local",
    "output_shape",
]

_MODULES: Final = {
    "CacheState": "deconvd.wire.cache_state",
    "CallLedger": "deconvd_client.calls.ledgers",
    "Connection": "deconvd_client.connection",
    "DeviceDescription": "deconvd_client.server_info",
    "DoubleGradients": "deconvd.model.gradients",
    "Gradients": "deconvd.model.gradients",
    "Pullback": "deconvd_client.pullback",
    "Remote": "deconvd_client.remote",
    "RemoteGradients": "deconvd_client.residents",
    "RemoteTensor": "deconvd_client.residents",
    "ServerInfo": "deconvd_client.server_info",
    "Tls": "deconvd_client.credentials",
    "WorkerDescription": "deconvd_client.server_info",
    "connect": "deconvd_client.connector",
    "local": "deconvd_client.local_server",
    "output_shape": "deconvd_client.shapes",
}
"""Where each public name is, except for errors. It is imported when it is first used.

So the command `deconvd`, which is in this package, prints its help without gRPC.
"""

if not TYPE_CHECKING:  # type checkers must not see it, or they would accept every name

    def __getattr__(name: str) -> object:
        if name in __all__:
            value = getattr(import_module(_MODULES.get(name, "deconvd.errors")), name)
            globals()[name] = value  # from now on it is found without this function
            return value
        is_module = find_spec(f"{__name__}.{name}") is not None  # which is about to be imported
        is_public = not is_module and not name.startswith("_")
        if is_public and hasattr(import_module("deconvd_client.connection").Connection, name):
            raise AttributeError(
                f"module 'deconvd_client' has no attribute {name!r}: it belongs to a connection. "
                f"Use deconvd_client.connect(target).{name}"
            )
        raise AttributeError(f"module 'deconvd_client' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
