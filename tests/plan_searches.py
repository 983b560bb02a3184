"""A process that searches plans and dies as it is told: ``python -m tests.plan_searches`` with `Orders` as JSON."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deconvd.model.options import Options, UseCudnn
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.store import PlanStore
from tests.fake_plans import FakeCandidates, FakePlan, key_of, plan_cache_of

__all__ = ["SearchOrders", "SearchOutcome", "search", "start_search"]

_TIMEOUT_S = 60
_EXIT_LOST = 3


@dataclass(frozen=True)
class SearchOrders:
    """What a process is to do.

    Attributes:
        store: The plan store's folder; None for none.
        widths: Of the images that it searches plans for, one after the other.
        deaths: How it dies: a signal's name, ``hang``, ``fail``, ``lost`` or ``elsewhere``; by what it is searching
            then, ``cudnn 8`` for an image of width 8 with cuDNN, ``own 8`` without.
        options: Of all searches.
        version: cuDNN's.
    """

    store: str | None
    widths: Sequence[int]
    deaths: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    version: int = 91900


@dataclass(frozen=True)
class SearchOutcome:
    """What a process did.

    Attributes:
        plans: The names of the plans that it got, by width.
        exit_code: As `subprocess` has it: a negative one is a signal.
        log: What it logged from warnings on.
    """

    plans: dict[int, str]
    exit_code: int
    log: str


def search(store: Path | None, *widths: int, **how: Any) -> SearchOutcome:
    """Have a process follow orders, and return what it did. Takes what `start_search` takes."""
    process = start_search(store, *widths, **how)
    said, log = process.communicate(timeout=_TIMEOUT_S)
    plans = dict(line.split(" ", 1) for line in said.splitlines())
    return SearchOutcome(
        {int(width): plan for width, plan in plans.items()}, process.returncode, log
    )


def start_search(
    store: Path | None,
    *widths: int,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **orders: Any,
) -> subprocess.Popen[str]:
    """Start a process for orders; one that hangs says ``hang`` then.

    Args:
        store, widths, orders: See `Orders`.
        prefix: The beginning of its command line.
        environment: More variables of its environment.
    """
    given = SearchOrders(None if store is None else str(store), widths, **orders)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.plan_searches", json.dumps(asdict(given))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | dict(environment or {}),
    )


class DeadlyCandidates(FakeCandidates):
    """Offers a plan of cuDNN's and one of ours, unless it dies."""

    def __init__(self, deaths: Mapping[str, str]) -> None:
        super().__init__()
        self._deaths = deaths

    def shortlist(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        provider = "own" if key.options.use_cudnn is UseCudnn.NEVER else "cudnn"
        death = self._deaths.get(f"{provider} {key.problem.image[1]}")
        if death is not None:
            _die(death)
        yield self.candidate(FakePlan(provider, 1.0))
        yield self.fallback(key)

    list_all = shortlist


def _die(death: str) -> None:
    if death == "hang":
        _print_line("hang")
        threading.Event().wait()
    elif death == "fail":
        raise ValueError("no plan")
    elif death == "lost":
        raise RuntimeError("an illegal memory access was encountered")
    elif death == "elsewhere":
        faulty = threading.Thread(target=signal.raise_signal, args=(signal.SIGSEGV,))
        faulty.start()
        faulty.join()
    else:
        signal.raise_signal(signal.Signals[death])


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Follow the orders on the command line, and say which plans there are."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    orders = SearchOrders(**json.loads(sys.argv[1]))
    store = None
    if orders.store is not None:
        store = PlanStore(Path(orders.store), {"deconvd": "1", "cudnn": orders.version})
    is_lost = "lost" in orders.deaths.values()
    book = plan_cache_of(DeadlyCandidates(orders.deaths), store, card_lost=is_lost)
    for width in orders.widths:
        try:
            plan = book.get(key_of(Options(**orders.options), width=width), lambda: None)
        except ValueError as error:
            _print_line(f"{width} {error}")
        except RuntimeError:
            os._exit(_EXIT_LOST)
        else:
            _print_line(f"{width} {plan.name}")
    book.close()


if __name__ == "__main__":
    main()
