"""Runs targets: input after input, each drawn from its own number, so that any of them can be drawn again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random

from tests.fuzz.case import Case
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

__all__ = ["FuzzFault", "draw_case", "fuzz", "replay"]


class FuzzFault(AssertionError):
    """An input has broken something. The text has what a regression test needs.

    Attributes:
        place: Where the error was raised: one fault shows in many inputs.
    """

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(f"{where}: {type(error).__name__}: {error}")
        *_, last = traceback.extract_tb(error.__traceback__)
        self.place = f"{type(error).__name__} at {last.filename}:{last.lineno}"


def _raise(fault: FuzzFault) -> None:
    raise fault from fault.__cause__


def draw_case(target: Target, name: str, seed: int, number: int) -> Case:
    """Return the input of a number: the same each time, whatever was drawn before it."""
    return target.draw(Random(f"{seed} {name} {number}"))


def fuzz(
    target: Target,
    name: str,
    numbers: range,
    *,
    seed: int,
    watch: Callable[[float], AbstractContextManager[object]] = nullcontext,
    report: Callable[[int], None] = lambda _: None,
    note: Callable[[FuzzFault], None] = _raise,
) -> None:
    """Feed a target the inputs of some numbers.

    Args:
        watch: Ends, by an exception, a block that takes longer than so many seconds.
        report: Called after each batch with how many inputs have run.
        note: Called with each fault. By default it is raised.

    Raises:
        FuzzFault: An input has broken something.
    """
    for begin in range(numbers.start, numbers.stop, target.batch_count):
        batch = range(begin, min(begin + target.batch_count, numbers.stop))
        for number in batch:
            case = draw_case(target, name, seed, number)
            _feed(target, name, case, f"number {number} of seed {seed}", watch, note)
        try:
            target.check()
        except Exception as error:
            note(FuzzFault(f"after numbers {batch} of seed {seed}", error))
        report(batch.stop - numbers.start)


def _feed(
    target: Target,
    name: str,
    case: Case,
    where: str,
    watch: Callable[[float], AbstractContextManager[object]],
    note: Callable[[FuzzFault], None],
) -> None:
    begin_s = time.monotonic()
    try:
        with watch(target.limit_s):
            target.feed(case)
        took_s = time.monotonic() - begin_s
        if took_s > target.limit_s:
            raise TimeoutError(f"it took {took_s:.1f} s, where {target.limit_s} are allowed")
    except Exception as error:
        fault = FuzzFault(f"{where}, replay({name!r}, {case!r})", error)
        fault.__cause__ = error
        note(fault)


def replay(name: str, case: Case, directory: Path) -> None:
    """Feed a target one input, as a regression test does. Raises FuzzFault if it breaks something."""
    with TARGETS[name](directory) as target:
        _feed(target, name, case, "again", nullcontext, _raise)
        target.check()
