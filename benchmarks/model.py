"""Times every plan of random problems: ``python -m benchmarks.model --part I/N --json FILE``.

The problems are those of `benchmarks.random_problems`, by their numbers: 0 to 199 are to test with, and those from 1000
on to fit with (``--first 1000``). The numbers are dealt out to N parts, so that the files of all parts can be merged.
For each problem each candidate is made and timed that a server can try: our kernels, and what cuDNN's heuristics
propose in both layouts. Engines that compile come last, and only with ``--compiling``: one of them takes 0.25 to 8 s. A
problem, and the whole, has a bound on its time; what was left out is said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import click

from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.random_problems import RandomProblem, draw_problem
from deconvd.host.system import processors_count
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.runtime import Stream, current_device
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.cudnn.enums import HeuristicMode
from deconvd_server.device.cuda.device import CudaDevice
from deconvd_server.device.cuda.kernels.launch import Kernel, compile_kernels
from deconvd_server.device.cuda.kernels.steps import Launch, StepPlan
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.casting import with_uniform_type
from deconvd_server.device.cuda.plans.choice import Provider
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.plan_timer import PlanTimer, open_plan_timer

_GIVE_UP_RATIO: Final = 6.0
"""A candidate that takes this many times as long as the best so far is timed only roughly."""

_FEW_COUNT: Final = 16
"""With at most that many candidates of a source, cuDNN is not asked by its second model (mode B) either."""

_BLOB_EXAMPLES_COUNT: Final = 2

_SAVED_COUNT: Final = 10
"""After that many problems the file is written, again and again."""

_PROCESSORS_COUNT: Final = 132
"""Multiprocessors of the card. Which kernels a plan has does not depend on it, but for gx in parts."""


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One candidate; its fields are those of the JSON file.

    Attributes:
        source: Where it comes from: ``own``, ``fallback``, or cuDNN's layout and heuristics, as in ``nchw A``.
        rank: Its place in what that source offers, from 0.
        name: As in `Plan`.
        workspace_bytes: As in `Plan`.
        allowed: Whether its workspace is within the limit.
        deterministic: Whether two runs give the same bits.
        ms: How long it takes on the card; infinity if it cannot run.
        make_ms: How long it took to make it, the source's first one with the question for all.
        first_run_ms: How long its first run took, with what is loaded or compiled then.
        settings: The parts of cuDNN's serialized plan that tell its settings.
    """

    source: str
    rank: int
    name: str
    workspace_bytes: int
    allowed: bool
    deterministic: bool
    ms: float
    make_ms: float
    first_run_ms: float
    settings: str = ""


@dataclass(slots=True)
class ProblemRow:
    """One problem of one product and type; its fields are those of the JSON file.

    Attributes:
        tuned_ms: The fastest candidate that was timed.
        left_out: The sources that there was no time for.
    """

    problem: dict[str, object]
    dtype: str
    op: str
    tuned_ms: float = float("inf")
    left_out: list[str] = field(default_factory=list)
    candidates: list[CandidateRow] = field(default_factory=list)

    def __str__(self) -> str:
        timed = sorted(self.candidates, key=lambda row: row.ms)[:4]
        best = "  ".join(f"{row.ms:.4f} {row.source} {row.rank} {row.name}" for row in timed)
        number = self.problem["number"]
        return f"{number:5} {self.dtype:8} {self.op:2} {len(self.candidates):3} candidates: {best}"


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--part", default="1/1", show_default=True, help="Which of how many parts.")
@click.option("--first", default=0, show_default=True, help="Number of the first problem.")
@click.option("--problems", "count", default=200, show_default=True, help="Of all parts.")
@click.option("--problem-s", default=2.0, show_default=True, help="Bound on a problem's time.")
@click.option("--limit-s", default=100.0, show_default=True, help="Bound on the whole time.")
@click.option("--most", default=12, show_default=True, help="Candidates of each source.")
@click.option("--compiling", is_flag=True, help="Try engines that compile, too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Print no line for each problem.")
def main(
    device: str,
    part: str,
    first: int,
    count: int,
    problem_s: float,
    limit_s: float,
    most: int,
    json_file: Path | None,
    *,
    compiling: bool,
    quiet: bool,
) -> None:
    """Time the candidates and write them down."""
    end_s = time.perf_counter() + limit_s
    index, parts_count = map(int, part.split("/"))
    numbers = range(first + index - 1, first + count, parts_count)
    ordinal = int(device.partition(":")[2] or 0)
    _compile_kernels(ordinal, [draw_problem(number) for number in numbers])
    print(f"kernels compiled in {time.perf_counter() - end_s + limit_s:.0f} s", flush=True)
    card = CudaDevice(ordinal)
    stream = card.make_stream()
    blobs: list[str] = []
    rows: list[ProblemRow] = []
    try:
        for number in numbers:
            if time.perf_counter() > end_s:
                break
            timer = _ProblemTimer(
                card, stream, draw_problem(number), problem_s, blobs, most=most, compiling=compiling
            )
            rows.append(timer.run())
            if not quiet:
                print(rows[-1], flush=True)
            if json_file is not None and len(rows) % _SAVED_COUNT == 0:  # cuDNN may end the process
                json_file.write_text(json.dumps(_report(device, blobs, rows)))
    finally:
        if json_file is not None:
            json_file.write_text(json.dumps(_report(device, blobs, rows)))
    left_out = sum(bool(row.left_out) for row in rows)
    print(
        f"{len(rows)} of {len(numbers)} problems timed, {left_out} of them not whole, "
        f"in {time.perf_counter() - end_s + limit_s:.0f} s"
    )
    card.release_stream(stream.pointer)
    card.close()


def _report(device: str, blobs: list[str], rows: list[ProblemRow]) -> dict[str, object]:
    return {
        "card": card_name(device),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "blobs": blobs,
        "rows": [asdict(row) for row in rows],
    }


def _compile_kernels(ordinal: int, problems: Sequence[RandomProblem]) -> None:
    """Compile our kernels for problems side by side, into CuPy's cache on disk. One takes up to a second."""
    files: dict[tuple[str, tuple[str, ...]], Kernel] = {}
    for drawn in problems:
        problem = with_uniform_type(drawn.problem)
        plans = kernels.candidates(drawn.product, problem, drawn.options, _PROCESSORS_COUNT)
        steps = [step for plan in plans if isinstance(plan, StepPlan) for step in plan.steps]
        for kernel in (step.kernel for step in steps if isinstance(step, Launch)):
            files.setdefault((kernel.file, kernel.options), kernel)
    workers_count = max(processors_count() // 2, 1)
    groups = [[*files.values()][number::workers_count] for number in range(workers_count)]
    with ProcessPoolExecutor(workers_count, get_context("spawn")) as executor:
        for done in [executor.submit(_compile_some, ordinal, some) for some in groups if some]:
            done.result()


def _compile_some(ordinal: int, some: Sequence[Kernel]) -> None:
    with current_device(ordinal):
        compile_kernels(some)


class _ProblemTimer:
    """Makes and times the candidates of one problem.

    Args:
        problem_s: How long that may take.
        most: The most candidates of a source.
        blobs: Gets the first serialized plans, to see what is in them.
    """

    def __init__(
        self,
        card: CudaDevice,
        stream: Stream,
        drawn: RandomProblem,
        problem_s: float,
        blobs: list[str],
        *,
        most: int,
        compiling: bool,
    ) -> None:
        self._card, self._stream, self._drawn, self._blobs = card, stream, drawn, blobs
        self._most, self._compiling = most, compiling
        self._end_s = time.perf_counter() + problem_s
        self._row = ProblemRow(drawn.fields, drawn.type_name, str(drawn.product))
        self._known: dict[object, CandidateRow] = {}

    def run(self) -> ProblemRow:
        """Return the row."""
        drawn = self._drawn
        with self._card.activate():
            key = self._card.plan_key(drawn.product, drawn.problem, drawn.options)
            fallback_bytes = self._card.candidates.fallback(key).plan.workspace_bytes
            room_bytes = max(key.workspace_limit_bytes, fallback_bytes)
            with open_plan_timer(self._card.memory, key, room_bytes, self._stream) as timer:
                for source, candidates in self._sources(key, self._stream.pointer):
                    self._try_source(key, timer, source, islice(candidates, self._most))
        return self._row

    def _sources(self, key: PlanKey, stream: int) -> Iterator[tuple[str, Iterator[Candidate]]]:
        made = self._card.candidates
        layouts = {"nchw": Provider.CUDNN_NCHW, "nhwc": Provider.CUDNN_NHWC}
        yield "own", made.own_kernels(key)
        yield "fallback", iter([made.fallback(key)])
        modes = [HeuristicMode.A, HeuristicMode.FALLBACK]
        if self._most > _FEW_COUNT:
            modes.append(HeuristicMode.B)
        for compiling in (False, True) if self._compiling else (False,):
            for mode in modes:
                for name, provider in layouts.items():
                    engines = made.cudnn_engines(
                        key, stream, provider, (mode,), compiling=compiling
                    )
                    yield f"{name} {mode.name}{' compiling' if compiling else ''}", engines

    def _try_source(
        self, key: PlanKey, timer: PlanTimer, source: str, candidates: Iterator[Candidate]
    ) -> None:
        rank = 0
        while True:
            if time.perf_counter() > self._end_s:
                self._row.left_out.append(f"{source} from {rank}")
                return
            begin_s = time.perf_counter()
            try:
                candidate = next(candidates, None)
                if candidate is None:
                    return
                make_ms = (time.perf_counter() - begin_s) * 1e3
                row = self._timed_row(key, timer, source, rank, candidate, make_ms)
            except (CudnnError, RuntimeError) as error:
                self._row.left_out.append(f"{source} from {rank}: {error}")
                return
            self._row.candidates.append(row)
            candidate.close()
            rank += 1

    def _timed_row(
        self,
        key: PlanKey,
        timer: PlanTimer,
        source: str,
        rank: int,
        candidate: Candidate,
        make_ms: float,
    ) -> CandidateRow:
        plan, choice = candidate.plan, candidate.choice
        same = self._known.get(choice)
        if choice.blob and len(self._blobs) < _BLOB_EXAMPLES_COUNT:
            self._blobs.append(choice.blob)
        allowed = plan.workspace_bytes <= key.workspace_limit_bytes
        ms, first_ms = float("inf"), 0.0
        if same is not None:  # another heuristic has proposed it before
            ms, first_ms = same.ms, same.first_run_ms
        elif allowed or source == "fallback":
            ms, first_ms = self._time(timer, candidate)
        row = CandidateRow(
            source=source,
            rank=rank,
            name=choice.name,
            workspace_bytes=plan.workspace_bytes,
            allowed=allowed,
            deterministic=choice.deterministic,
            ms=round(ms, 5),
            make_ms=round(make_ms, 3),
            first_run_ms=round(first_ms, 3),
            settings=_settings(choice.blob),
        )
        self._known[choice] = row
        self._row.tuned_ms = min(self._row.tuned_ms, row.ms)
        return row

    def _time(self, timer: PlanTimer, candidate: Candidate) -> tuple[float, float]:
        """Return the milliseconds of a run, and of the first one with what it loads."""
        begin_s = time.perf_counter()
        if not timer.can_run(candidate.plan):
            return float("inf"), 0.0
        first_ms = (time.perf_counter() - begin_s) * 1e3
        give_up_ms = _GIVE_UP_RATIO * self._row.tuned_ms
        return timer.time_ms(candidate.plan, give_up_ms=give_up_ms), first_ms


def _settings(blob: str) -> str:
    """Return what a serialized plan says of its engine and knobs, in short; empty if it says nothing so."""
    if not blob:
        return ""
    try:
        content = json.loads(blob)
    except ValueError:
        return ""
    found: list[str] = []
    _collect_settings(content, "", found)
    return " ".join(found[:40])


def _collect_settings(content: object, name: str, found: list[str]) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            _collect_settings(value, str(key), found)
    elif isinstance(content, list):
        for value in content[:40]:
            _collect_settings(value, name, found)
    elif any(word in name.lower() for word in ("knob", "engine", "choice", "index")):
        found.append(f"{name}={content}")


if __name__ == "__main__":
    main()
