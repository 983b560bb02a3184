"""Chainer's own models on a server: `install` routes Chainer's deconvolution_2d there.

::

    import deconvd_client.chainer

    with deconvd_client.chainer.install("gpu-host:50051"):
        y = model(x)  # its links.Deconvolution2D are computed by the server
        y.backward()

Without `install`, the functions of a connection take Variables, too, and return Variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import chainer

from deconvd.model.geometry import Geometry, IntOrPair
from deconvd_client.connection import Connection
from deconvd_client.connector import connect
from deconvd_client.frameworks.chainer import (
    ChainerArgumentError,
    ChainerFramework,
    raise_as_chainer,
)
from deconvd_client.frameworks.chainer_patches import add_replacement, remove_replacement
from deconvd_client.keywords import reject_unknown_keywords

__all__ = ["ChainerArgumentError", "Installation", "install"]


def install(
    connection: Connection | str | None = None, *, convolution_gradients: bool = False
) -> Installation:
    """Have Chainer's ``functions.deconvolution_2d`` and ``links.Deconvolution2D`` computed by a server.

    This holds for all threads of the process, until the result is uninstalled or its ``with`` block ends. If there are
    several installations, the newest one counts.

    Not routed are ``deconvolution_nd``, and references such as ``from chainer.functions import deconvolution_2d`` that
    were taken before. Gradients of any order go where their function went, also after the installation has ended.

    Args:
        connection: A connection, which stays open afterwards. Or the address of a server: then a connection of its
            own is opened, and is closed at the end. None means the address in the environment variable DECONVD_TARGET.
        convolution_gradients: Whether the server computes gx and gW of ``convolution_2d``, too. They are a
            deconvolution and a gradient of one. Chainer computes convolutions themselves.
    """
    return Installation(connection, convolution_gradients=convolution_gradients)


class Installation:
    """What `install` has installed. As a context manager it uninstalls itself.

    Attributes:
        connection: Leads to the server.
        replaces_convolution_gradients: See `install`.
    """

    def __init__(
        self, connection: Connection | str | None = None, *, convolution_gradients: bool
    ) -> None:
        self._is_owner = not isinstance(connection, Connection)
        self.connection: Connection = (
            connection if isinstance(connection, Connection) else connect(connection)
        )
        self.replaces_convolution_gradients = convolution_gradients
        self._framework = ChainerFramework()
        add_replacement(self)

    def uninstall(self) -> None:
        """End the installation: an earlier one counts again, or Chainer's own functions. Twice is harmless."""
        remove_replacement(self)
        if self._is_owner:
            self.connection.close()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    @reject_unknown_keywords
    def deconvolution_2d(
        self,
        x: Any,
        W: Any,
        b: Any = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> Any:
        """Return y as a Variable, whatever the operands are, as Chainer does. `Connection` describes the arguments.

        Raises:
            ChainerArgumentError: An argument has a wrong type, shape or value. It is an InvalidArgumentError (a
                ValueError), and Chainer's InvalidType.
        """
        with raise_as_chainer():
            geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        return self._framework.deconvolution_2d(self.connection, x, W, b, geometry)

    def differentiate_convolution(
        self, node: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
    ) -> tuple[Any, ...] | None:
        """Return the gradients of a ``convolution_2d``. None if an operand has another layout than the default."""
        if any(layout is not None for layout in node.input_layouts):
            return None
        x, W = node.get_retained_inputs()
        (gy,) = grad_outputs
        stride, pad, dilate = (node.sy, node.sx), (node.ph, node.pw), (node.dy, node.dx)
        geometry = Geometry.from_arguments(stride, pad, x.shape[2:], dilate, node.groups)
        gradients: dict[int, Any] = {}
        if 0 in indexes:
            gradients[0] = self._framework.deconvolution_2d(self.connection, gy, W, None, geometry)
        if 1 in indexes:  # in the deconvolution of gy to x, they change places
            gradients[1] = self._framework.deconvolution_2d_grad(
                self.connection, gy, W, None, x, geometry, ("gW",)
            ).gW
        if 2 in indexes:
            gradients[2] = chainer.functions.sum(gy, axis=(0, 2, 3))
        return tuple(gradients[index] for index in indexes)

    def __repr__(self) -> str:
        more = ", with gradients of convolutions" if self.replaces_convolution_gradients else ""
        return f"<deconvd_client.chainer.Installation of {self.connection!r}{more}>"
