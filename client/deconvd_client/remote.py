"""Chainer's functions with results that stay on the server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn, SupportsIndex

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry, IntOrPair
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder
from deconvd_client.keywords import reject_unknown_keywords
from deconvd_client.residents import Call, RemoteGradients, RemoteTensor
from deconvd_client.server import Server

__all__ = ["Remote"]


class Remote:
    """The functions of a connection, with the same arguments; their results are RemoteTensors.

    So a chain of calls moves nothing. They raise what the connection's own raise.
    """

    def __init__(self, operations: CallBuilder, server: Server) -> None:
        self._operations = operations
        self._server = server

    @reject_unknown_keywords
    def deconvolution_2d(
        self,
        x: Array | RemoteTensor,
        W: Array | RemoteTensor,
        b: Array | RemoteTensor | None = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> RemoteTensor:
        """Return what `Connection.deconvolution_2d` does, and leave it on the server."""
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        call = self._operations.deconvolution(x, W, b, geometry, stay=True)
        return self._execute(call)["y"]

    @reject_unknown_keywords
    def deconvolution_2d_grad(
        self,
        x: Array | RemoteTensor,
        W: Array | RemoteTensor,
        b: Array | RemoteTensor | None,
        gy: Array | RemoteTensor,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
        wanted: Collection[str] = GRADIENT_NAMES,
    ) -> RemoteGradients:
        """Return what `Connection.deconvolution_2d_grad` does, and leave it on the server."""
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        call = self._operations.differentiation(x, W, b, gy, geometry, wanted, stay=True)
        kept = self._execute(call)
        return RemoteGradients(gx=kept.get("gx"), gW=kept.get("gw"), gb=kept.get("gb"))

    def _execute(self, call: Call) -> dict[str, RemoteTensor]:
        return {
            field: RemoteTensor(self._server.residents, result)
            for field, result in self._server.dispatcher.execute_and_keep(call).items()
        }

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Remote cannot be pickled or copied: it is its connection's. Pickle the connection, and take its remote"
        )
