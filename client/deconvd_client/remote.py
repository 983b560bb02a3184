"""Remote: Chainer's functions with results that stay on the server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn, SupportsIndex

from deconvd.model.geometry import Geometry, IntOrPair
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder, TensorLike
from deconvd_client.call_executor import CallExecutor
from deconvd_client.keywords import reject_unknown_keywords
from deconvd_client.residents import Call, RemoteGradients, RemoteTensor

__all__ = ["Remote"]


class Remote:
    """The functions of a connection, with results that stay on the server. `Connection.remote` returns it.

    They have the arguments of the connection's functions and raise the same errors. Their results are RemoteTensors,
    which the next call can take as operands, so that no elements move between the calls.
    Cupy arrays are copied to the host before they are sent.
    """

    def __init__(self, operations: CallBuilder, executor: CallExecutor) -> None:
        self._operations = operations
        self._executor = executor

    @reject_unknown_keywords
    def deconvolution_2d(
        self,
        x: TensorLike,
        W: TensorLike,
        b: TensorLike | None = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> RemoteTensor:
        """Compute `Connection.deconvolution_2d`, and leave y on the server.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As given to `Connection.deconvolution_2d`.

        Returns:
            A RemoteTensor of shape ``(n, c_O, h_O, w_O)`` and the element type of x.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            ExhaustedError: The server has no room to keep y (a MemoryError).
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        call = self._operations.deconvolution(x, W, b, geometry, keep_results=True)
        return self._execute(call)["y"]

    @reject_unknown_keywords
    def deconvolution_2d_grad(
        self,
        x: TensorLike,
        W: TensorLike,
        b: TensorLike | None,
        gy: TensorLike,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
        wanted: Collection[str] = GRADIENT_NAMES,
    ) -> RemoteGradients:
        """Compute `Connection.deconvolution_2d_grad`, and leave the gradients on the server.

        Args:
            x, W, b, gy, stride, pad, outsize, dilate, groups, wanted: As given to
                `Connection.deconvolution_2d_grad`.

        Returns:
            ``(gx, gW, gb)``: RemoteTensors with the shapes and element types of x, W and b. A gradient is None if it
            is not wanted, and gb is None if b is None.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            ExhaustedError: The server has no room to keep the gradients (a MemoryError).
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        call = self._operations.differentiation(x, W, b, gy, geometry, wanted, keep_results=True)
        kept = self._execute(call)
        return RemoteGradients(gx=kept.get("gx"), gW=kept.get("gw"), gb=kept.get("gb"))

    def _execute(self, call: Call) -> dict[str, RemoteTensor]:
        return {
            field: RemoteTensor(self._executor.residents, result)
            for field, result in self._executor.execute_and_keep(call).items()
        }

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Remote cannot be pickled or copied: it belongs to one connection. Pickle the connection, and use the "
            "remote of the copy"
        )
