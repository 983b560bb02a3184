"""Differentiates the gradients of a deconvolution, by the functions of a connection, for arrays of any framework."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from deconvd.model.geometry import Geometry
from deconvd.model.gradients import DoubleGradients
from deconvd_client.frameworks.framework import Functions

__all__ = ["DOUBLE_GRADIENT_NAMES", "differentiate_twice", "double_backward"]

DOUBLE_GRADIENT_NAMES: Final = DoubleGradients._fields


def double_backward(
    connection: Functions,
    x: Any,
    W: Any,
    gy: Any,
    ggx: Any,
    ggW: Any,
    ggb: Any,
    geometry: Geometry,
    wanted: Collection[str] = DOUBLE_GRADIENT_NAMES,
) -> DoubleGradients:
    """Return the gradients of a loss with respect to x, W and gy, from those with respect to gx, gW and gb.

    Each is made of calls of the connection alone, so it can be differentiated again if the connection's functions can.
    Here gx, gW and gb are what `deconvolution_2d_grad` returns for x, W and gy.

    Args:
        ggx, ggW, ggb: Of the shapes of x, W and b. None for a gradient that is zero: it costs no call. If ggb alone is
            given, x and W must be arrays of which slices can be taken.
        wanted: Names of the gradients to compute.
    """
    arguments = geometry.arguments

    def deconvolve(x: Any, W: Any, b: Any) -> Any:
        return connection.deconvolution_2d(x, W, b, **arguments)

    def differentiate(x: Any, W: Any, gy: Any, name: str) -> Any:
        gradients = connection.deconvolution_2d_grad(x, W, None, gy, **arguments, wanted=(name,))
        return getattr(gradients, name)

    found = differentiate_twice(deconvolve, differentiate, x, W, gy, ggx, ggW, ggb, wanted)
    if found.ggy is None and ggb is not None and "ggy" in wanted:
        # without input channels the result is the bias alone, and no elements of x and W are sent
        return found._replace(ggy=deconvolve(x[:, :0], W[:0], ggb))
    return found


def differentiate_twice(
    deconvolve: Callable[[Any, Any, Any], Any],
    differentiate: Callable[[Any, Any, Any, str], Any],
    x: Any,
    W: Any,
    gy: Any,
    ggx: Any,
    ggW: Any,
    ggb: Any,
    wanted: Collection[str],
) -> DoubleGradients:
    """Return what `double_backward` does, by two functions. ggy is None if ggb alone is given: ggy is ggb then.

    gx is linear in W and gy, gW in x and gy, and gb in gy. So each term is a call of the same functions::

        gx:  gx of W := ggW and gy
        gW:  gW of x := ggx and gy
        ggy: deconvolution of ggx by W + deconvolution of x by ggW + ggb

    Args:
        deconvolve: Returns y for x, W and b.
        differentiate: Returns the gradient with a name, ``"gx"`` or ``"gW"``, for x, W and gy.
        x, W, gy, ggx, ggW, ggb, wanted: As of `double_backward`.
    """
    gx = gW = ggy = None
    if "gx" in wanted and ggW is not None:
        gx = differentiate(x, ggW, gy, "gx")
    if "gW" in wanted and ggx is not None:
        gW = differentiate(ggx, W, gy, "gW")
    if "ggy" in wanted and ggx is not None:
        ggy = deconvolve(ggx, W, ggb)
        ggb = None  # only once
    if "ggy" in wanted and ggW is not None:
        term = deconvolve(x, ggW, ggb)
        ggy = term if ggy is None else ggy + term
    return DoubleGradients(gx, gW, ggy)
