"""The way back through one deconvolution, whose operands stay on the server."""

from __future__ import annotations

from collections.abc import Collection
from typing import NoReturn

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.gradients import Gradients
from deconvd.model.problem import Problem
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder
from deconvd_client.frameworks.framework import arrays_like
from deconvd_client.residents import RemoteTensor, Resident
from deconvd_client.server import Server

__all__ = ["Pullback"]


class Pullback:
    """Computes gradients of one deconvolution from that of its result, any number of times.

    The server keeps x and W for it until this is closed, as a context manager or by `close`, or
    collected, or the connection is closed. If it has lost them they are sent again, where the
    arrays still hold the same.
    """

    def __init__(
        self,
        operations: CallBuilder,
        server: Server,
        problem: Problem,
        x: Resident,
        W: Resident,
        *,
        has_b: bool,
    ) -> None:
        self._operations = operations
        self._server = server
        self._problem = problem
        self._x = x
        self._W = W
        self._has_b = has_b

    def __call__(
        self, gy: Array | RemoteTensor, *, wanted: Collection[str] = GRADIENT_NAMES
    ) -> Gradients:
        """Return the gradients of a loss with respect to x, W and b, as arrays of the kind of `gy`.

        Args:
            gy: Its gradient with respect to the result, of that shape and element type.
            wanted: Names of the gradients to compute, of gx, gW and gb.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind or shape, or this is closed.
            LostTensorError: The server no longer has x or W, and it cannot be sent again.
        """
        if self._x.is_closed:
            raise InvalidArgumentError("the pullback is closed")
        call = self._operations.backward(
            self._problem, self._x, self._W, gy, wanted, has_b=self._has_b
        )
        arrays = arrays_like(gy, self._server.execute(call))
        return Gradients(gx=arrays.get("gx"), gW=arrays.get("gw"), gb=arrays.get("gb"))

    def close(self) -> None:
        """Have the server drop x and W. Closing twice is harmless."""
        self._x.close()
        self._W.close()

    def __enter__(self) -> Pullback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pullback cannot be pickled or copied: it is its connection's. Call vjp() where it is to be used"
        )

    def __repr__(self) -> str:
        closed = ", closed" if self._x.is_closed else ""
        return f"<deconvd_client.Pullback, x {self._x.spec}, W {self._W.spec}{closed}>"
