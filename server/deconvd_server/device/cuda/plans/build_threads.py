"""The threads that choose plans, so that a call whose caller has gone need not wait for its plan."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, ThreadPoolExecutor

from deconvd_server.device.cuda.api.runtime import CudaError, Stream, synchronize, use_device
from deconvd_server.device.cuda.cudnn import Cudnn

__all__ = ["BuildThreads"]


class BuildThreads:
    """Threads of one card, each with a stream of its own.

    A stream is made in the first build that asks for it: an error in the start of a thread would end the executor, and
    nobody would hear that the card is lost.

    Args:
        ordinal: The card's number.
        count: How many plans may be chosen at once.
    """

    def __init__(self, ordinal: int, cudnn: Cudnn, count: int) -> None:
        self._ordinal = ordinal
        self._cudnn = cudnn
        self._local = threading.local()
        self._streams: list[Stream] = []
        self._build_executor = self._make_executor(count, "plans")
        # one alone: plans that were timed side by side would all look slow
        self._tuning_executor = self._make_executor(1, "tuning")

    def executor(self, *, tunes: bool) -> Executor:
        """Return who is to choose a plan.

        Args:
            tunes: Whether it takes long and must not be disturbed.
        """
        return self._tuning_executor if tunes else self._build_executor

    @property
    def stream(self) -> Stream:
        """The calling builder's stream, on the card. Raises CudaError if there can be none."""
        stream: Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            use_device(self._ordinal)
            stream = self._local.stream = Stream()
            self._streams.append(stream)
        return stream

    def is_card_lost(self) -> bool:
        """Return whether the calling builder's card is of no use to this process any more."""
        try:
            use_device(self._ordinal)
            synchronize()
        except CudaError:
            return True
        return False

    def close(self) -> None:
        """End the threads once they are idle."""
        for executor in (self._build_executor, self._tuning_executor):
            executor.shutdown()
        for stream in self._streams:
            self._cudnn.destroy_handle(stream.pointer)

    def _make_executor(self, count: int, purpose: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(count, f"cuda:{self._ordinal}-{purpose}")
