"""Pullback: computes the gradients of one deconvolution, with operands that the server keeps."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

from deconvd.errors import InvalidArgumentError
from deconvd.model.gradients import Gradients
from deconvd.model.problem import Problem
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder, TensorLike
from deconvd_client.call_executor import CallExecutor
from deconvd_client.frameworks.framework import arrays_like
from deconvd_client.residents import Resident

__all__ = ["Pullback"]


class Pullback:
    """A function that returns the gradients of one deconvolution for a given gy. `Connection.vjp` returns it.

    It can be called any number of times. The server keeps x and W for it until it is closed (by `close` or as a
    context manager) or garbage-collected, or until the connection is closed. If the server loses x or W, the client
    sends it again, provided its array has not changed.

    It can be used by several threads. It cannot be pickled or copied.
    """

    def __init__(
        self,
        operations: CallBuilder,
        executor: CallExecutor,
        problem: Problem,
        x: Resident,
        W: Resident,
        *,
        has_b: bool,
    ) -> None:
        self._operations = operations
        self._executor = executor
        self._problem = problem
        self._x = x
        self._W = W
        self._has_b = has_b

    def __call__(self, gy: TensorLike, *, wanted: Collection[str] = GRADIENT_NAMES) -> Gradients:
        """Return the gradients of a loss with respect to x, W and b. Only gy is sent.

        Args:
            gy: Gradient of the loss with respect to y: an array or RemoteTensor of y's shape ``(n, c_O, h_O, w_O)``
                and element type.
            wanted: Names of the gradients to compute: one or more of ``"gx"``, ``"gW"`` and ``"gb"``, in any
                collection.

        Returns:
            ``(gx, gW, gb)``, with the shapes and element types of x, W and b. A gradient is None if it is not
            wanted, and gb is None if b was None. They are cupy arrays if gy is a cupy array, else numpy arrays.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value, or the pullback is closed (a
                ValueError).
            LostTensorError: The server no longer has x, W or gy, and the client cannot send it again.
            DeconvdError: The call failed, in one of the ways that `Connection` lists.
        """
        if self._x.is_closed:
            raise InvalidArgumentError(
                "the pullback was closed before this call. Call vjp() again, and close the pullback only after its "
                "last use."
            )
        call = self._operations.backward(
            self._problem, self._x, self._W, gy, wanted, has_b=self._has_b
        )
        arrays = arrays_like(gy, self._executor.execute(call))
        return Gradients(gx=arrays.get("gx"), gW=arrays.get("gw"), gb=arrays.get("gb"))

    def close(self) -> None:
        """Let the server drop x and W. Closing it twice is harmless. The server is not waited for."""
        self._x.close()
        self._W.close()

    def __enter__(self) -> Pullback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pullback cannot be pickled or copied: it belongs to one connection. Call vjp() in the place where you "
            "need it"
        )

    def __repr__(self) -> str:
        closed = ", closed" if self._x.is_closed else ""
        return f"<deconvd_client.Pullback, x {self._x.spec}, W {self._W.spec}{closed}>"
