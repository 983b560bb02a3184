"""The connection to a server. Its methods are Chainer's functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from deconvd.host.malloc import raise_mmap_threshold
from deconvd.model.dtypes import Array, element_type
from deconvd.model.geometry import Geometry, IntOrPair
from deconvd.model.gradients import Gradients
from deconvd.model.problem import check_extents, spec_of
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder
from deconvd_client.calls.deadline import Deadline
from deconvd_client.config import Config
from deconvd_client.connect_options import (
    parse_dtype,
    parse_fail_fast,
    parse_max_message_bytes,
    parse_shape,
    parse_tenant_key,
    parse_timeout,
    parse_transport,
)
from deconvd_client.frameworks.framework import arrays_like, host_array
from deconvd_client.keywords import reject_unknown_keywords
from deconvd_client.pullback import Pullback
from deconvd_client.remote import Remote
from deconvd_client.residents import RemoteTensor
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo
from deconvd_client.transports.grpc.channel import MAX_MESSAGE_BYTES
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.targets import parse_target

__all__ = ["Connection", "connect"]


def connect(
    target: str,
    *,
    timeout_s: float = 60.0,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    transport: str = TransportName.AUTO,
    tenant_key: str | bytes | None = None,
    fail_fast: bool = False,
) -> Connection:
    """Return a connection to a server. Nothing is sent before the first call.

    Args:
        target: Address of the server: ``host:port`` or ``unix:path``.
        timeout_s: How long each call may take, in seconds, including its retries. It must be positive.
            Values above a million (eleven days) are taken as a million.
        max_message_bytes: Size of the largest response message to accept, in bytes, up to 2^31 - 1. Results of
            more than 4 MiB come as a stream of smaller messages.
        transport: How tensors get to the server:

            - ``auto``: the fastest transport that works. On the server's host that is shared memory and
              its Unix socket, elsewhere TCP.
            - ``shared_memory``: tensors from 32 KiB on go through shared memory.
            - ``unix``: everything goes through the server's Unix socket, on the same host.
            - ``tcp``: everything goes over TCP. The target must be ``host:port``.
            - ``grpc``: everything goes through gRPC to the target, and no other connection is made. Use it
              if a proxy is in between.

            Except for ``auto``, calls fail with UnavailableError or ExhaustedError if that transport does not
            work.
        tenant_key: A secret of up to 64 bytes. Connections with the same key share one quota for the
            tensors that the server keeps. If one has sent a tensor, the others do not send it again. None,
            the default, means the value of DECONVD_TENANT_KEY in the environment. If that is not set, or the
            key is empty, the connection shares nothing.
        fail_fast: Whether a call fails at once if the server cannot be reached. Otherwise it tries again:
            until its timeout if the server was reached before (it may be restarting), and for 5 seconds if
            it never was.

    Raises:
        InvalidArgumentError: An argument has a wrong type or is out of its range (a ValueError).
    """
    return Connection(
        target,
        timeout_s=timeout_s,
        max_message_bytes=max_message_bytes,
        transport=transport,
        tenant_key=tenant_key,
        fail_fast=fail_fast,
    )


class Connection:
    """A connection to a server. `deconvd_client.connect` makes it.

    Several threads can use one connection. As a context manager it closes itself.

    Every call can raise these errors, in addition to those that its own description lists:

    - DeadlineError (a TimeoutError): the call took longer than ``timeout_s``.
    - UnavailableError (a ConnectionError): the server cannot be reached, or is full, and retries did not help.
    - ExhaustedError (a MemoryError): the request or the result exceeds a limit. The message names the limit.
    - CallCancelledError: the connection was closed.
    - UnimplementedError (a NotImplementedError): the server is too old for this call.
    - InternalError (a RuntimeError): a fault of the server, whose log says more.

    All of them are DeconvdErrors.

    A connection can be pickled and copied. The copy has the same target and options, and connects by itself. It
    takes its tenant key from the environment variable DECONVD_TENANT_KEY of its own process. It has none of the
    RemoteTensors of the original, and no options that `using_config` has set.

    Attributes:
        target: Address of the server, as it was given to `connect`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float,
        max_message_bytes: int,
        transport: str,
        tenant_key: str | bytes | None,
        fail_fast: bool,
    ) -> None:
        self.target: str = parse_target(target)
        self._timeout_s = timeout_s = parse_timeout(timeout_s)
        self._max_message_bytes = max_message_bytes = parse_max_message_bytes(max_message_bytes)
        self._transport = parse_transport(transport)
        self._fail_fast = parse_fail_fast(fail_fast)
        secret = parse_tenant_key(tenant_key)
        raise_mmap_threshold()

        self._server = Server(
            self.target,
            transport=self._transport,
            max_message_bytes=max_message_bytes,
            tenant_key=secret,
            timeout_s=timeout_s,
            fail_fast=self._fail_fast,
        )
        self._config = Config()
        self._operations = CallBuilder(self._server.residents, self._config)
        self._remote = Remote(self._operations, self._server)

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
        cupy's current stream.

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
        call = self._operations.deconvolution(x, W, b, geometry)
        return arrays_like(x, self._server.execute(call))["y"]

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
        call = self._operations.differentiation(x, W, b, gy, geometry, wanted)
        arrays = arrays_like(x, self._server.execute(call))
        return Gradients(gx=arrays.get("gx"), gW=arrays.get("gw"), gb=arrays.get("gb"))

    @reject_unknown_keywords
    def vjp(
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
        y = arrays_like(x, self._server.execute(call))["y"]
        pullback = Pullback(
            self._operations, self._server, call.problem, images, filters, has_b=b is not None
        )
        return y, pullback

    def put(self, array: Array | RemoteTensor) -> RemoteTensor:
        """Send an array for the server to keep, and return a RemoteTensor that stands for it in calls.

        The RemoteTensor has the value that the array has now. The client keeps a reference to the array: if the
        server loses the tensor, the array is sent again, provided it still has the same elements. For a cupy array
        that reference is a copy on the host.

        Args:
            array: A numpy or cupy array of float16, bfloat16, float32 or float64, of any shape. Or a RemoteTensor:
                then the result is another RemoteTensor for the same value, and the server keeps the value until
                both are closed. The elements of another connection's RemoteTensor are fetched and sent.

        Raises:
            InvalidArgumentError: `array` is not an array, has another element type, is too large, or is a closed
                RemoteTensor (a ValueError).
            ExhaustedError: The server has no room for it (a MemoryError).
            LostTensorError: It is another connection's RemoteTensor, and its server has lost it.
        """
        residents = self._server.residents
        if isinstance(array, RemoteTensor):
            if array.belongs_to(residents):
                return RemoteTensor(residents, array.resident_for(residents, "array").duplicate())
            array = array.numpy()
        elements = host_array(self._operations.parse_operand("array", array)[0])
        spec = spec_of(elements)
        element_type("array", spec.dtype)
        check_extents("array", spec)
        # asarray makes a plain array of a numpy.matrix, which could not be flattened to be sent
        return RemoteTensor(residents, residents.put(np.asarray(elements)))

    @property
    def remote(self) -> Remote:
        """The same functions with results that stay on the server, as RemoteTensors. See `Remote`."""
        return self._remote

    def empty(self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike) -> Array:
        """Return a new array in memory that is shared with the server, like ``numpy.empty``.

        On the server's host, a call that is given such an array need not copy it. If the server lends no memory, or has
        reached its limit, the result is an ordinary array. The elements are arbitrary.

        Args:
            shape: The size of each dimension: an int, or a sequence of ints.
            dtype: float16, bfloat16, float32 or float64, as anything that ``numpy.dtype`` accepts.

        Raises:
            InvalidArgumentError: No operand can have this shape or this element type (a ValueError).
        """
        deadline = Deadline(self._timeout_s)
        return self._server.borrower.empty(parse_shape(shape), parse_dtype(dtype), deadline)

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

            value: True or False; for ``use_cudnn`` one of its three names.

        Raises:
            InvalidArgumentError: There is no option of that name, or the option cannot have that value (a
                ValueError). This is raised when the ``with`` block is entered.
        """
        return self._config.using(name, value)

    def server_info(self) -> ServerInfo:
        """Return the server's version, devices, caches and limits.

        The counts of tensors that the server keeps include only those of this connection, and of connections with
        the same ``tenant_key``.
        """
        return self._server.info()

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING``, or another status of gRPC's health protocol.

        The server is asked once, without retries.
        """
        return self._server.health()

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """Where the time of this thread's last successful call went on the server, in microseconds, by entry.

        - ``queue_us``: waiting for the call's turn on the device.
        - ``follow_us``: time that the device waited for operands still being copied to shared memory; only in calls
          that overlap copying and computing.
        - ``upload_us``: copying operands to the device.
        - ``compute_us``: computing.
        - ``download_us``: copying results from the device.
        - ``server_us``: all of it, from the arrival of the request to the end of the response.

        Entries that do not apply to the device or the call are missing. The stages of a large call overlap, so their
        sum can be larger than ``server_us``. The mapping is empty before the first call.
        """
        return self._server.last_ledger

    def close(self) -> None:
        """Close the connection, within a second. Closing it twice is harmless.

        Running calls and later ones raise CallCancelledError. The server drops the tensors that it keeps for this
        connection.
        """
        self._server.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial[Connection], tuple[()]]:
        # The tenant key is a secret, so it is not in the pickle: the copy takes it from its own environment.
        again = partial(
            connect,
            self.target,
            timeout_s=self._timeout_s,
            max_message_bytes=self._max_message_bytes,
            transport=self._transport.value,
            fail_fast=self._fail_fast,
        )
        return again, ()

    def __repr__(self) -> str:
        words = [f"to {self.target}", *self._server.describe(), f"timeout {self._timeout_s:g} s"]
        if self._transport is not TransportName.AUTO:
            words.append(f"transport {self._transport.value}")
        return f"<deconvd_client.Connection {', '.join(words)}>"
