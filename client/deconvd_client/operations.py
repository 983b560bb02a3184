"""Chainer's functions, computed by a server, and the options of their calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, SupportsIndex

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry, IntOrPair
from deconvd.model.gradients import DoubleGradients, Gradients
from deconvd.model.options import Options
from deconvd_client.arguments import (
    GRADIENT_NAMES,
    CallBuilder,
    TensorLike,
    parse_names,
    parse_wanted,
)
from deconvd_client.call_executor import CallExecutor
from deconvd_client.calls.request_id import using_request_id
from deconvd_client.config import Config
from deconvd_client.frameworks.double_backward import DOUBLE_GRADIENT_NAMES, double_backward
from deconvd_client.frameworks.framework import arrays_like, framework_of, tracing_framework
from deconvd_client.keywords import reject_unknown_keywords
from deconvd_client.pullback import Pullback

__all__ = ["Operations"]


class Operations:
    """The deconvolution and its gradients, for arrays of every framework. `Connection` adds all else.

    Args:
        executor: Executes the calls.
    """

    def __init__(self, executor: CallExecutor) -> None:
        self._executor = executor
        self._config = Config()
        self._operations = CallBuilder(executor.residents, self._config)

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
    ) -> Array:
        """Return the two-dimensional deconvolution (transposed convolution) of `x` by `W`, plus `b`.

        This is ``chainer.functions.deconvolution_2d`` of Chainer 7.8, with the same arguments and results.

        Every pixel of output channel o starts as ``b[o]``. Then each pixel (h, w) of each input channel c adds to the
        output, through each tap (i, j) of the filter::

            y[n, o, s_h h + d_h i - p_h, s_w w + d_w j - p_w] += x[n, c, h, w] W[c, o, i, j]

        Here s is `stride`, d is `dilate` and p is `pad`. Terms outside the output are left out. With several groups,
        each group of channels is a deconvolution of its own.

        Operands can be numpy arrays, cupy arrays and RemoteTensors, also mixed. If the server computes on the card
        that a cupy x is on, the elements stay on that card. The call waits for the work that is enqueued on
        cupy's current stream. Of nested lists of numbers, and of other objects with ``__array__``, numpy makes the
        array. So a list of floats is float64, and a list of ints is refused.

        Args:
            x: Images of shape ``(n, c_I, h_I, w_I)``, of float16, bfloat16, float32 or float64.
            W: Filter of shape ``(c_I, c_O / groups, h_K, w_K)``. Its element type can differ from that of x.
            b: Bias of shape ``(c_O,)`` and the element type of x. None for no bias.
            stride: Steps of the filter over the output, in pixels, at least 1: an int, or a pair (h, w).
            pad: Pixels cut off at both ends of each axis of the output, at least 0: an int, or a pair (h, w).
            outsize: Size ``(h_O, w_O)`` of the output, in pixels. None, for the pair or for one axis, means the
                natural size ``stride (i - 1) + dilate (k - 1) + 1 - 2 pad``, where i is the size of the image and k
                that of the filter, as in Chainer's ``get_deconv_outsize``. Other sizes must differ from the natural
                size by less than the stride.
            dilate: Distance between neighbouring taps of the filter, in pixels, at least 1: an int, or a pair (h, w).
            groups: Number of groups that the channels are split into. It must divide c_I.

        Returns:
            Images of shape ``(n, c_O, h_O, w_O)`` and the element type of x: a cupy array on the card of x if x is a
            cupy array, else a numpy array.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        framework = tracing_framework(x, W, b)
        if framework is not None:
            y: Array = framework.deconvolution_2d(self, x, W, b, geometry)
            return y
        call = self._operations.deconvolution(x, W, b, geometry)
        return arrays_like(x, self._executor.execute(call))["y"]

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
    ) -> Gradients:
        """Return the gradients of a loss with respect to `x`, `W` and `b` of a deconvolution.

        These are the gradients that Chainer 7.8 computes for ``chainer.functions.deconvolution_2d``. For one group,
        with h' = s_h h + d_h i - p_h and w' = s_w w + d_w j - p_w as in `deconvolution_2d`::

            gx[n, c, h, w] = sum over o, i, j of gy[n, o, h', w'] W[c, o, i, j]
            gW[c, o, i, j] = sum over n, h, w of gy[n, o, h', w'] x[n, c, h, w]
            gb[o]          = sum over all n, h, w of gy[n, o, h, w]

        Pixels outside gy count as 0.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As they were given to `deconvolution_2d`. The elements
                of x are used only for gW, those of W only for gx, and those of b never.
            gy: Gradient of the loss with respect to the result y of `deconvolution_2d`: shape
                ``(n, c_O, h_O, w_O)`` and the element type of x.
            wanted: Names of the gradients to compute: one or more of ``"gx"``, ``"gW"`` and ``"gb"``, in any
                collection. Operands that they do not need are not sent.

        Returns:
            ``(gx, gW, gb)``, with the shapes and element types of x, W and b. A gradient is None if it is not
            wanted, and gb is None if b is None. They are cupy arrays if x is a cupy array, else numpy arrays.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        framework = tracing_framework(x, W, b, gy)
        if framework is not None:
            names = parse_wanted(wanted, has_b=b is not None)
            return framework.deconvolution_2d_grad(self, x, W, b, gy, geometry, names)
        call = self._operations.differentiation(x, W, b, gy, geometry, wanted)
        arrays = arrays_like(x, self._executor.execute(call))
        return Gradients(gx=arrays.get("gx"), gW=arrays.get("gw"), gb=arrays.get("gb"))

    @reject_unknown_keywords
    def deconvolution_2d_double_grad(
        self,
        x: TensorLike,
        W: TensorLike,
        gy: TensorLike,
        ggx: TensorLike | None,
        ggW: TensorLike | None,
        ggb: TensorLike | None = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
        wanted: Collection[str] = DOUBLE_GRADIENT_NAMES,
    ) -> DoubleGradients:
        """Return the gradients of a loss that depends on the gradients of a deconvolution ("double backward").

        The loss depends on gx, gW and gb, as `deconvolution_2d_grad` returns them for x, W and gy. A gradient penalty
        is an example. The result is made of up to four calls of `deconvolution_2d` and `deconvolution_2d_grad`.

        Args:
            x, W, gy, stride, pad, outsize, dilate, groups: As they were given to `deconvolution_2d_grad`.
            ggx, ggW, ggb: Gradients of the loss with respect to gx, gW and gb, with their shapes and element types,
                and of the kind of x. None if the loss does not depend on that one.
            wanted: Names of the gradients to compute: of ``"gx"``, ``"gW"`` and ``"ggy"``, in any collection.

        Returns:
            ``(gx, gW, ggy)``: the gradients of the loss with respect to x, W and gy. A gradient is None if it is not
            wanted, or if it is zero since what it needs is None: gx needs ggW, gW needs ggx, and ggy any of the three.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        names = parse_names(wanted, DOUBLE_GRADIENT_NAMES)
        images: Any = x
        filters: Any = W
        if tracing_framework(x, W, gy, ggx, ggW, ggb) is None:
            gradients = {"gy": gy, "ggx": ggx, "ggW": ggW, "ggb": ggb}
            problem = self._operations.check_double_backward(x, W, gradients, geometry)
            if ggx is None and ggW is None:  # only the shapes matter
                images = x if framework_of(x) else np.empty(problem.x.shape, problem.x.dtype)
                filters = np.empty(problem.W.shape, problem.W.dtype)
        return double_backward(self, images, filters, gy, ggx, ggW, ggb, geometry, names)

    @reject_unknown_keywords
    def vjp(
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
    ) -> tuple[Array, Pullback]:
        """Return the deconvolution y, and a function that returns the gradients for a given gy.

        The name means vector-Jacobian product, as in ``jax.vjp``. The server keeps x and W until the pullback is
        closed, so that a call of the pullback sends only gy. The client keeps references to the arrays x and W: if
        the server loses one, it is sent again, provided it still has the same elements. For cupy arrays, these
        references are copies on the host.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As given to `deconvolution_2d`.

        Returns:
            ``(y, pullback)``: y as from `deconvolution_2d`, and a `Pullback`. ``pullback(gy)`` returns the gradients
            ``(gx, gW, gb)``, as `deconvolution_2d_grad` does; they are cupy arrays if gy is one.

        Raises:
            InvalidArgumentError: An argument has a wrong type, shape or value (a ValueError). Its ``argument``
                names it.
            ExhaustedError: The server has no room to keep x and W (a MemoryError).
            LostTensorError: An operand is a RemoteTensor that the server no longer has and the client cannot send
                again.
            TypeError: A keyword is unknown.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        images, filters = (
            self._operations.make_resident("x", x),
            self._operations.make_resident("W", W),
        )
        call = self._operations.deconvolution(images, filters, b, geometry)
        y = arrays_like(x, self._executor.execute(call))["y"]
        pullback = Pullback(
            self._operations, self._executor, call.problem, images, filters, has_b=b is not None
        )
        return y, pullback

    def using_config(self, name: str, value: object) -> AbstractContextManager[None]:
        """Set an option for a ``with`` block, as Chainer's ``using_config`` does.

        It applies to the calls of this connection in the current thread or asyncio task.

        Args:
            name: The option:

                - ``cudnn_deterministic``: two runs on the same device give the same bits. False by default.
                - ``autotune``: measure the candidate algorithms once for each kind of call, and use the fastest.
                  False by default.
                - ``use_cudnn``: when to use cuDNN: ``'auto'`` if it is the fastest (the default), ``'always'`` if
                  it can run the call, or ``'never'``.
                - ``allow_tf32``: float32 operands may be rounded to TF32 in products. False by default. Chainer
                  does not have this option.
                - ``use_cudnn_tensor_core``: ``'never'`` keeps tensor cores out, for every element type, and TF32 too.
                  ``'auto'`` (the default) and ``'always'`` use them where that is the fastest: for half precision,
                  and for float32 if ``allow_tf32`` is set.

            value: True or False; for ``use_cudnn`` and ``use_cudnn_tensor_core`` one of their three names.

        Raises:
            InvalidArgumentError: There is no option of that name, or the option cannot have that value (a
                ValueError). This is raised when the ``with`` block is entered.
        """
        return self._config.using(name, value)

    def using_request_id(self, request_id: str) -> AbstractContextManager[None]:
        """Give the calls of a ``with`` block a name, by which the server's log and errors can be searched.

        It applies to calls that compute, in the current thread or asyncio task. The server writes the name into its
        access log and into the line of a failed call. The ``request_id`` of the error is the same name. Calls
        without a name get one from the server if they fail.

        Args:
            request_id: 1 to 128 printable ASCII characters. It need not be unique.

        Raises:
            InvalidArgumentError: It is not such a text (a ValueError). This is raised when the ``with`` block is
                entered.
        """
        return using_request_id(request_id)

    def using_defaults(self, options: Mapping[str, object]) -> AbstractContextManager[None]:
        """Set options for a ``with`` block, but only those that no block of `using_config` around it has set.

        Adapters use it for what a framework's own configuration says. It applies like `using_config`.

        Args:
            options: Values by the names of options, as for `using_config`.

        Raises:
            InvalidArgumentError: An option cannot have its value (a ValueError). This is raised when the ``with``
                block is entered.
        """
        return self._config.using_defaults(options)

    @property
    def options(self) -> Options:
        """The options of calls in the current thread or asyncio task, as `using_config` has set them."""
        return self._config.options
