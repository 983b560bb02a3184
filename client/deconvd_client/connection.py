"""A connection to a server, with Chainer's functions as its methods."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from deconvd.errors import InvalidArgumentError
from deconvd.geometry import Geometry, IntOrPair
from deconvd.gradients import Gradients, Wanted
from deconvd.problem import Problem, problem_of
from deconvd.shared_memory import socket_beside
from deconvd.tensor import (
    Array,
    spec_of,
)
from deconvd_client import calls
from deconvd_client.asked import Asked, deconvolution, differentiation
from deconvd_client.channel import MAX_MESSAGE_BYTES, open_channel
from deconvd_client.config import Config
from deconvd_client.keywords import refuses_unknown_keywords
from deconvd_client.malloc import learn_large_blocks
from deconvd_client.nearest import Nearest, Transport
from deconvd_client.server_info import ServerInfo
from deconvd_client.shared_memory import Borrower
from deconvd_client.stub import Stub

__all__ = ["Connection", "connect"]

_GRADIENTS = ("gx", "gW", "gb")


def connect(
    target: str,
    *,
    timeout_s: float = 60.0,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    transport: str = Transport.AUTO,
) -> Connection:
    """Return a connection to a server. Nothing is sent before the first call.

    Args:
        target: ``host:port`` or ``unix:path``.
        timeout_s: How long each call may take, its retries included.
        max_message_bytes: The largest response to accept.
        transport: ``auto`` for the nearest way that works: on the server's host that is shared
            memory, and its Unix socket; ``target`` for messages to the target and no other way.

    Raises:
        InvalidArgumentError: An argument is out of its range.
    """
    return Connection(
        target, timeout_s=timeout_s, max_message_bytes=max_message_bytes, transport=transport
    )


class Connection:
    """A connection to a server. It may be shared by any number of threads, and closes as a context manager.

    Every call raises, beside what its own description says: DeadlineError after `timeout_s`,
    UnavailableError if the server cannot be reached (after a few tries), ExhaustedError if the
    request or the result is over a limit that the message names, InternalError for a fault of the
    server.
    """

    def __init__(
        self, target: str, *, timeout_s: float, max_message_bytes: int, transport: str
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise InvalidArgumentError(
                f"timeout_s must be positive and finite, got {timeout_s}", argument="timeout_s"
            )
        self.target = target
        learn_large_blocks()

        def open_stub(target: str) -> Stub:
            channel = open_channel(target, max_message_bytes=max_message_bytes)
            return Stub(channel, timeout_s=timeout_s)

        self._nearest = Nearest(open_stub, target, _transport(transport))
        is_pinned = _transport(transport) is Transport.TARGET
        self._memory = Borrower((lambda: "") if is_pinned else self._find_memory)
        self._config = Config()

    @refuses_unknown_keywords
    def deconvolution_2d(
        self,
        x: Array,
        W: Array,
        b: Array | None = None,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
    ) -> Array:
        """Return the two-dimensional deconvolution (transposed convolution) of `x` by `W`, plus `b`.

        As Chainer 7's ``chainer.functions.deconvolution_2d``, on arrays.

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
            Images of shape ``(n, c_O, h_O, w_O)`` and x's element type.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind, shape or range (a ValueError).
            TypeError: An unknown keyword.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        problem = _problem(x, W, b, geometry)
        asked = Asked(
            deconvolution(problem, self._config.options, with_b=b is not None),
            problem,
            {"w": W, "x": x} if b is None else {"w": W, "b": b, "x": x},
            {"y": problem.y},
        )
        answered = self._nearest.call(lambda stub: calls.deconvolve(stub, self._memory, asked))
        return answered.arrays["y"]

    @refuses_unknown_keywords
    def deconvolution_2d_grad(
        self,
        x: Array,
        W: Array,
        b: Array | None,
        gy: Array,
        stride: IntOrPair = 1,
        pad: IntOrPair = 0,
        outsize: Sequence[SupportsIndex | None] | None = None,
        *,
        dilate: IntOrPair = 1,
        groups: SupportsIndex = 1,
        wanted: Collection[str] = _GRADIENTS,
    ) -> Gradients:
        """Return the gradients of a loss with respect to `x`, `W` and `b`.

        Args:
            x, W, b, stride, pad, outsize, dilate, groups: As given to `deconvolution_2d`.
            gy: Gradient with respect to its result, of that shape and element type.
            wanted: Names of the gradients to compute, of gx, gW and gb. x is sent only for gW, and W
                only for gx.

        Returns:
            ``(gx, gW, gb)``, of the shapes and element types of x, W and b. One that is not wanted
            is None, and so is gb where b is.

        Raises:
            InvalidArgumentError: An argument is of the wrong kind, shape or range (a ValueError).
            TypeError: An unknown keyword.
        """
        geometry = Geometry.from_arguments(stride, pad, outsize, dilate, groups)
        problem = _problem(x, W, b, geometry)
        problem.check_gy(spec_of(_checked("gy", gy)))
        mask = _wanted(wanted, has_b=b is not None)
        operands = {"w": W} if mask.gx else {}
        results = {"gx": problem.x} if mask.gx else {}
        if mask.gW:
            operands["x"], results["gw"] = x, problem.W
        if mask.gb:
            results["gb"] = problem.b
        operands["gy"] = gy
        request = differentiation(problem, self._config.options, mask)
        asked = Asked(request, problem, operands, results)
        answered = self._nearest.call(lambda stub: calls.differentiate(stub, self._memory, asked))
        arrays = answered.arrays
        return Gradients(gx=arrays.get("gx"), gW=arrays.get("gw"), gb=arrays.get("gb"))

    def empty(self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike) -> Array:
        """Return a new array with any elements: on the server's host, one that need not be sent.

        It lies in memory that is shared with the server, if that has room, and is otherwise like
        any other array.

        Raises:
            InvalidArgumentError: No operand can have that shape or element type.
        """
        return self._memory.empty(shape, dtype)

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
        """Return what the server is, what it runs on and how much it takes."""
        return ServerInfo.from_message(self._nearest.far.get_server_info())

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self._nearest.far.health()

    @property
    def last_ledger(self) -> Mapping[str, int]:
        """Where the time of this thread's last call went on the server, in microseconds.

        ``queue_us``, ``upload_us``, ``compute_us``, ``download_us``, and ``server_us`` for all of it
        from the request's arrival on; only those that the server's device tells apart. The stages
        of a large call overlap.
        """
        return self._nearest.last_ledger

    def close(self) -> None:
        """Close the connection. Calls under way, and later ones, raise CallCancelledError."""
        self._nearest.close()
        self._memory.close()

    def _find_memory(self) -> str:
        """Return where the server lends memory."""
        if self.target.startswith("unix:"):
            return socket_beside(self.target.removeprefix("unix:").removeprefix("//"))
        return self._nearest.far.get_server_info().shared_memory_socket

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<deconvd_client.Connection to {self.target}>"


def _transport(name: str) -> Transport:
    try:
        return Transport(name)
    except ValueError:
        raise InvalidArgumentError(
            f"transport must be one of {', '.join(Transport)}, got {name!r}", argument="transport"
        ) from None


def _problem(x: Array, W: Array, b: Array | None, geometry: Geometry) -> Problem:
    problem = problem_of(spec_of(_checked("x", x)), spec_of(_checked("W", W)), geometry)
    if b is not None:
        problem.check_b(spec_of(_checked("b", b)))
    return problem


def _checked(name: str, value: object) -> Array:
    if not isinstance(value, np.ndarray):
        raise InvalidArgumentError(
            f"{name} must be a numpy.ndarray, got {type(value).__name__}", argument=name
        )
    return value


def _wanted(names: Collection[str], *, has_b: bool) -> Wanted:
    if isinstance(names, str) or not set(names) <= set(_GRADIENTS):
        raise InvalidArgumentError(
            f"wanted must be a collection of names from {', '.join(_GRADIENTS)}, got {names!r}",
            argument="wanted",
        )
    return Wanted(gx="gx" in names, gW="gW" in names, gb="gb" in names and has_b)
