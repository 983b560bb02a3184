"""Does at the start, in the build threads, what the first calls of a server would wait for.

cuBLAS and cuDNN load themselves in parts, each at its first use: their kernels and engines, 20 to 150 ms a part. So a
small problem of each usual type is planned and run. On cards whose kernels did not come with deconvd, these are
compiled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

import numpy as np

from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import BFLOAT16, DType
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.nvrtc import CompileError
from deconvd_server.device.cuda.api.runtime import CudaError
from deconvd_server.device.cuda.cudnn import Cudnn, CudnnError
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans.key import PlanKey

if TYPE_CHECKING:
    from deconvd_server.device.cuda.api.runtime import Stream
    from deconvd_server.device.cuda.plans.build_threads import BuildThreads
    from deconvd_server.device.cuda.plans.candidates import Candidates
    from deconvd_server.device.cuda.plans.plan_timer import PlanTimer

__all__ = ["Rehearsal"]

log = logging.getLogger(__name__)

_X, _W = (2, 64, 16, 16), (64, 32, 4, 4)
_GEOMETRY = Geometry((2, 2), (1, 1))

_WORKSPACE_BYTES: Final = 64 << 20
"""Of the plans that are rehearsed: room for cuBLAS's workspace and some columns."""

_SINGLE: Final = (np.dtype(np.float32),)
_HALF: Final = (np.dtype(np.float16), BFLOAT16)


class Rehearsal:
    """Plans and runs small problems on a card, and forgets them. It ends once real calls come.

    Args:
        open_timer: As of `Tuner`.
        lane_streams: The streams of the lanes: their cuDNN handles are made.
        is_idle: Returns whether no call is being computed.
    """

    def __init__(
        self,
        cudnn: Cudnn,
        candidates: Candidates,
        build_threads: BuildThreads,
        open_timer: Callable[[PlanKey, int, Stream], AbstractContextManager[PlanTimer]],
        lane_streams: Sequence[int],
        is_idle: Callable[[], bool],
    ) -> None:
        self._cudnn = cudnn
        self._candidates = candidates
        self._build_threads = build_threads
        self._open_timer = open_timer
        self._lane_streams = lane_streams
        self._is_idle = is_idle
        self._is_wanted = True
        self._parts: list[Future[None]] = []
        self._compiling: threading.Thread | None = None

    def start(self, device: int) -> None:
        """Start in the background.

        Args:
            device: The card's number.
        """
        parts: list[Callable[[], None]] = [
            lambda: self._run_problems(_SINGLE),
            lambda: self._run_problems(_HALF),
            self._make_handles,
        ]
        executor = self._build_threads.executor(tunes=False)
        self._parts = [executor.submit(self._attempt, part) for part in parts]
        if not kernels.are_shipped(device):
            self._compiling = threading.Thread(
                target=self._attempt,
                args=(lambda: self._compile_kernels(device),),
                name=f"cuda:{device}-kernels",
            )
            self._compiling.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for the problems, not for kernels that are compiled. Return at the latest after that many seconds."""
        wait(self._parts, timeout_s)

    def close(self) -> None:
        """End it. Wait for what has begun: a product that is run, and a kernel that is compiled."""
        self._is_wanted = False
        wait(self._parts)
        if self._compiling is not None:
            self._compiling.join()

    def _attempt(self, part: Callable[[], None]) -> None:
        begin_s = time.perf_counter()
        try:
            part()
        except ExhaustedError as error:
            log.info(
                "the first calls may be slow, since there was no memory to rehearse: %s", error
            )
        except (CompileError, CudaError, CudnnError, RuntimeError) as error:
            log.warning("the first calls may be slow, since a rehearsal of them failed: %s", error)
        log.debug("rehearsed for %.3f s", time.perf_counter() - begin_s)

    def _run_problems(self, dtypes: Sequence[DType]) -> None:
        for dtype in dtypes:
            for product in Product:
                if not (self._is_wanted and self._is_idle()):
                    return
                problem = Problem(TensorSpec(_X, dtype), TensorSpec(_W, dtype), _GEOMETRY)
                self._run(PlanKey.of(product, problem, Options(), _WORKSPACE_BYTES))

    def _run(self, key: PlanKey) -> None:
        stream = self._build_threads.stream
        made = [*self._candidates.shortlist(key, stream.pointer)]
        room_bytes = max(candidate.plan.workspace_bytes for candidate in made)
        try:
            with self._open_timer(key, room_bytes, stream) as timer:
                for candidate in made:
                    timer.can_run(candidate.plan)
        finally:
            for candidate in made:
                candidate.close()

    def _make_handles(self) -> None:
        for stream in (self._build_threads.stream.pointer, *self._lane_streams):
            self._cudnn.handle(stream)

    def _compile_kernels(self, device: int) -> None:
        log.info(
            "compiles the kernels of usual layers, which did not come with deconvd for this card"
        )
        kernels.load_common_kernels(device, lambda: self._is_wanted)
