"""The threads in which plans are chosen. A call that is cancelled need not wait until its plan is."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, ThreadPoolExecutor

from deconvd_server.device.cuda.api.runtime import CudaError, Stream, synchronize, use_device
from deconvd_server.device.cuda.cudnn import Cudnn

__all__ = ["BuildThreads"]


class BuildThreads:
    """Threads of one card, each with a stream of its own.

    A thread's stream is made in its first build, not when the thread starts. An error at the start would break the
    executor, and nobody would learn that the card is lost.

    Args:
        ordinal: The card's number.
        count: Plans that may be chosen at once, without tuning.
    """

    def __init__(self, ordinal: int, cudnn: Cudnn, count: int) -> None:
        self._ordinal = ordinal
        self._cudnn = cudnn
        self._local = threading.local()
        self._streams: list[Stream] = []
        self._build_executor = self._make_executor(count, "plans")
        # only one: plans that are timed at the same time would slow each other down
        self._tuning_executor = self._make_executor(1, "tuning")

    def executor(self, *, tunes: bool) -> Executor:
        """Return the executor that chooses a plan.

        Args:
            tunes: Whether all candidates are timed, which takes long and must not be disturbed.
        """
        return self._tuning_executor if tunes else self._build_executor

    @property
    def stream(self) -> Stream:
        """The stream of the calling build thread. Raises CudaError if the card cannot make one."""
        stream: Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            use_device(self._ordinal)
            stream = self._local.stream = Stream()
            self._streams.append(stream)
        return stream

    def is_card_lost(self) -> bool:
        """Return whether the card must be reset. To be called in a build thread."""
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
