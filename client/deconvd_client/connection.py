"""A connection to a server, with Chainer's functions as its methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import SupportsIndex

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
        target: ``host:port`` or ``unix:path``.
        timeout_s: How long each call may take, its retries included, in seconds. A million, eleven
            days, is the longest; what is more is taken for that.
        max_message_bytes: The largest response to accept.
        transport: ``auto`` for the nearest way that works: on the server's host that is shared
            memory, and its Unix socket. Or one way that calls are to go, or fail with
            UnavailableError or ExhaustedError: ``shared_memory`` for all tensors from 32 KiB on,
            ``unix`` or ``tcp`` for all that is sent; ``grpc`` for gRPC to the target and nothing
            beside it, as through a proxy.
        tenant_key: A secret of up to 64 bytes. Connections that tell the same share a quota for
            what the server keeps, and what one has sent another need not send; empty for a
            connection by itself. None, the default, stands for what DECONVD_TENANT_KEY is in the
            environment, or empty.
        fail_fast: Whether a server that cannot be reached is an error at once. Otherwise a call
            waits for one that was reached before until its timeout, as while it restarts, and for
            one that has never answered for 5 seconds.

    Raises:
        InvalidArgumentError: An argument is out of its range.
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
    """A connection to a server. It may be shared by any number of threads, and closes as a context manager.

    Every call raises, beside what its own description says: DeadlineError after `timeout_s`,
    UnavailableError if the server cannot be reached, or stays full, for as long as it is tried, ExhaustedError if the
    request or the result is over a limit that the message names, InternalError for a fault of the
    server.

    It can be pickled and copied: the copy has the same target and options, and connects anew. It has
    no tenant's key but that in DECONVD_TENANT_KEY where it is made, none of the tensors that stay for
    the original, and no options that `using_config` has set.
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
        self._transport = way = parse_transport(transport)
        self._fail_fast = parse_fail_fast(fail_fast)
        secret = parse_tenant_key(tenant_key)
        raise_mmap_threshold()

        self._server = Server(
            self.target,
            transport=way,
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

        As Chainer 7's ``chainer.functions.deconvolution_2d``, on arrays of numpy and cupy, and on
        RemoteTensors. If the server computes on the card that a cupy x lies on, then nothing leaves
        that card. What was enqueued on the current stream is waited for.

        Args:
            x: Images of shape ``(n, c_I, h_I, w_I)``: float16, bfloat16, float32 or float64.
            W: Filter of shape ``(c_I, c_O / groups, h_K, w_K)``; its element type may differ.
            b: Bias of shape ``(c_O,)`` and x's element type.
            stride: Steps of the filter over the output, in pixels: an int, or a pair (h, w).
            pad: Pixels cut from the output at both ends of each axis: an int, or a pair (h, w).
            outsize: Size ``(h_O, w_O)`` of the output, less than a stride from the natural one, each an
                int or None; None for ``stride (i - 1) + dilate (k - 1) + 1 - 2 pad`` along each axis.
            dilate: Distance between the filter's taps, in pixels: an int, or a pair (h, w).
            groups: Number of groups that the channels are split into.

        Returns:
            Images of shape ``(n, c_O, h_O, w_O)`` and x's element type; a cupy array where x is one.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind, shape or range (a ValueError).
            TypeError: An unknown keyword.
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
        """Return the gradients of a loss with respect to `x`, `W` and `b`.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As given to `deconvolution_2d`.
            gy: Gradient with respect to its result, of that shape and element type.
            wanted: Names of the gradients to compute, of gx, gW and gb. x is sent only for gW, and W
                only for gx.

        Returns:
            ``(gx, gW, gb)``, of the shapes and element types of x, W and b. One that is not wanted
            is None, and so is gb where b is. They are cupy arrays where x is one.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind, shape or range (a ValueError).
            TypeError: An unknown keyword.
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
        """Return the deconvolution, and the function from its gradient to those of `x`, `W` and `b`.

        The server keeps x and W meanwhile, so that gradients take gy alone; arrays that they are
        made of are referred to, to be sent again at need, and of cupy arrays copies on the host. The
        result is of the kind of x, and gradients are of that of gy.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As given to `deconvolution_2d`.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind, shape or range (a ValueError).
            ExhaustedError: The server has no room to keep x and W.
            TypeError: An unknown keyword.
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
        """Have the server keep an array, and return what stands for it in calls.

        It means what the array holds now. The array is referred to, and sent again if the server
        loses the tensor and the array still holds the same. Of a cupy array that is a copy on the host.

        Args:
            array: Or a RemoteTensor, whose value is kept for as long as either of them. One of
                another connection is fetched from there.

        Raises:
            InvalidArgumentError: It is no array, or no operand can have its shape or element type; or
                it is a RemoteTensor that is closed.
            ExhaustedError: The server has no room for it.
            LostTensorError: It is another connection's RemoteTensor, and its server has lost it.
        """
        residents = self._server.residents
        if isinstance(array, RemoteTensor):
            if array.belongs_to(residents):
                return RemoteTensor(residents, array.resident_for(residents, "array").duplicate())
            array = array.numpy()
        elements = host_array(self._operations.operand("array", array))
        spec = spec_of(elements)
        element_type("array", spec.dtype)
        check_extents("array", spec)
        return RemoteTensor(residents, residents.put(elements))

    @property
    def remote(self) -> Remote:
        """The same functions, with results that stay on the server."""
        return self._remote

    def empty(self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike) -> Array:
        """Return a new array with any elements: on the server's host, one that need not be sent.

        It lies in memory that is shared with the server, if that has room, and is otherwise like
        any other array.

        Raises:
            InvalidArgumentError: No operand can have that shape or element type.
        """
        deadline = Deadline(self._timeout_s)
        return self._server.borrower.empty(parse_shape(shape), parse_dtype(dtype), deadline)

    def using_config(self, name: str, value: object) -> AbstractContextManager[None]:
        """Set an option for a ``with`` block, in this thread, as Chainer's ``using_config`` does.

        Args:
            name: ``cudnn_deterministic``, ``autotune``, ``use_cudnn`` or ``allow_tf32``.
            value: True or False; for ``use_cudnn``, ``'auto'``, ``'always'`` or ``'never'``.

        Raises:
            InvalidArgumentError: There is no such option, or it cannot have that value.
        """
        return self._config.using(name, value)

    def server_info(self) -> ServerInfo:
        """Return what the server is, what it runs on and how much it takes.

        Of the tensors that stay on the server, those are counted that are this connection's, and those of
        others that share its ``tenant_key``.
        """
        return self._server.info()

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self._server.health()

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """Where the time of this thread's last call went on the server, in microseconds.

        ``queue_us``, ``upload_us``, ``compute_us``, ``download_us``, and ``server_us`` for all of it
        from the request's arrival on; only those that the server's device tells apart. The stages
        of a large call overlap. ``follow_us`` is there if the call was made while operands were being
        copied into shared memory: what of its time was spent waiting for the copy.
        """
        return self._server.last_ledger

    def close(self) -> None:
        """Close the connection, within a second. Calls under way, and later ones, raise CallCancelledError."""
        self._server.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[partial[Connection], tuple[()]]:
        # a copy, in this process or another, connects anew; it takes its tenant's key from there
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
