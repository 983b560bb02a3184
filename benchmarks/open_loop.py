"""Calls at times that do not depend on the answers: an open loop. Each call is measured from when it was due.

A client that waits for its answer before it calls again calls less often just when the server is slow, and so hides how
long others would have waited. Here calls are due at random times with a constant rate, and none is made again. gRPC's
futures make them: no call of a client waits for another one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import grpc
import numpy as np

from deconvd.errors import DeconvdError, UnavailableError
from deconvd.model.geometry import Geometry
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import elements_of, message_from_spec

__all__ = ["CallTimes", "Caller", "call_at_rate", "find_request", "open_callers"]

_TIMEOUT_S: Final = 60.0

_FIRST_EXTENT: Final = 24
_LEAST_FACTOR, _MOST_FACTOR = 1.05, 2.0
"""By how much the next extent that is tried is larger."""

_TRIES_COUNT: Final = 7


@dataclass(slots=True)
class CallTimes:
    """What became of calls.

    Attributes:
        accepted_s: From when a call was due until its answer was there.
        refused_s: From when a call was due until it was refused.
        retry_after_s: When the refused ones may come back.
    """

    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)

    def add(self, other: CallTimes) -> None:
        """Add what became of further calls."""
        self.accepted_s += other.accepted_s
        self.refused_s += other.refused_s
        self.retry_after_s += other.retry_after_s

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the accepted calls' times; 0 if there is none."""
        return float(np.percentile(self.accepted_s, percent)) * 1e3 if self.accepted_s else 0.0


class Caller:
    """A client with a connection of its own.

    Args:
        request: What it calls with.
        token: Who it is; empty for nobody.
    """

    def __init__(self, channel: grpc.Channel, request: pb.DeconvolveRequest, token: str) -> None:
        self._channel = channel
        self._stub = pb_grpc.DeconvolutionServiceStub(channel)
        self._request = request
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def begin(self, timeout_s: float = _TIMEOUT_S) -> Any:
        """Begin a call, and return its future."""
        return self._stub.Deconvolve.future(
            self._request, timeout=timeout_s, metadata=self._metadata
        )

    def connect(self) -> None:
        """Wait until there is a connection, so that no call pays for it."""
        grpc.channel_ready_future(self._channel).result(_TIMEOUT_S)

    def call(self) -> float:
        """Make a call, and return how long it took, in seconds. Raises `DeconvdError`."""
        begin_s = time.perf_counter()
        try:
            self.begin().result()
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        return time.perf_counter() - begin_s


@contextmanager
def open_callers(
    target: str, request: pb.DeconvolveRequest, tokens: Sequence[str]
) -> Iterator[list[Caller]]:
    """Give clients for the block, one for each token."""
    with ExitStack() as stack:
        # a connection for each client: gRPC would share one among channels to the same target
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(target, options)) for _ in tokens]
        yield [
            Caller(channel, request, token) for channel, token in zip(channels, tokens, strict=True)
        ]


def find_request(
    target: str, least_s: float, token: str = ""
) -> tuple[pb.DeconvolveRequest, float]:
    """Return a request that a server computes for at least a time, and how long a call with it takes alone, in seconds.

    It has few bytes: x and W are an image and a filter of the same extent.
    """
    extent = float(_FIRST_EXTENT)
    while True:
        request = _make_request(round(extent))
        with open_callers(target, request, [token]) as (caller,):
            caller.call()
            alone_s = min(caller.call() for _ in range(_TRIES_COUNT))
        if alone_s >= least_s:
            return request, alone_s
        # the products grow with the fourth power of the extent
        factor = (1.1 * least_s / alone_s) ** 0.25
        extent *= min(max(factor, _LEAST_FACTOR), _MOST_FACTOR)


def _make_request(extent: int) -> pb.DeconvolveRequest:
    both = np.ones((1, 1, extent, extent), np.float32)
    tensor = message_from_spec(spec_of(both))
    tensor.raw = bytes(elements_of(both))
    pad = extent // 2
    return pb.DeconvolveRequest(
        x=tensor,
        w=tensor,
        geometry=message_from_geometry(Geometry(pad=(pad, pad))),
        # cuDNN looks for minutes at filters of hundreds of pixels
        options=pb.Options(use_cudnn=pb.USE_CUDNN_NEVER),
    )


def call_at_rate(
    callers: Sequence[Caller], calls_per_s: float, duration_s: float, seed: int
) -> CallTimes:
    """Make calls for a while, each by the next client, and return what became of them once all have ended.

    Raises `DeconvdError` if a call fails without having been refused.
    """
    generator = random.Random(seed)
    times, failures = CallTimes(), list[DeconvdError]()
    under_way = threading.Semaphore(0)
    count = 0

    def end(due_s: float, future: Any) -> None:
        passed_s = time.perf_counter() - due_s
        error = future.exception()
        if error is None:
            times.accepted_s.append(passed_s)
        elif isinstance(refusal := error_from_rpc(error), UnavailableError) and refusal.was_reached:
            times.refused_s.append(passed_s)
            times.retry_after_s.append(refusal.retry_after_s or 0.0)
        else:
            failures.append(refusal)
        under_way.release()

    due_s = time.perf_counter()
    end_s = due_s + duration_s
    while (due_s := due_s + generator.expovariate(calls_per_s)) < end_s:
        if (early_s := due_s - time.perf_counter()) > 0:
            time.sleep(early_s)
        callers[count % len(callers)].begin().add_done_callback(partial(end, due_s))
        count += 1
    for _ in range(count):
        under_way.acquire()
    if failures:
        raise failures[0]
    return times
