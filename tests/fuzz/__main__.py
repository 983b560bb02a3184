"""Fuzz everything: ``python -m tests.fuzz --inputs 1000000 [--only TARGET] [--seed N]``.

The inputs of a target have numbers, and each can be drawn from its number alone. So a run that was stopped can go on
(`--only TARGET --start NUMBER`), and several processes can share the work. For each fault it prints the first input
that showed it, as a Python expression for a regression test.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tests.fuzz.run import FuzzFault, fuzz
from tests.fuzz.targets import TARGETS
from tests.processes import limit_address_space

_SPARE_BYTES = 4 << 30
"""How much memory inputs may have this process map. A decoder that believes a length fails by a MemoryError."""

_KILL_S = 60.0
"""After how long an input ends the process that no exception can reach, since it hangs in code of C."""


class _Watch:
    """Ends inputs that take too long: by TimeoutError, or, if that reaches nobody, with the process."""

    def __init__(self) -> None:
        self._due_s = 0.0

    @contextmanager
    def limit(self, limit_s: float) -> Iterator[None]:
        """Raise TimeoutError in the middle of a block that takes too long."""
        if (
            time.monotonic() > self._due_s
        ):  # it starts a thread, which takes longer than most inputs
            faulthandler.dump_traceback_later(_KILL_S + limit_s, exit=True)
            self._due_s = time.monotonic() + 1
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _raise_timeout(*_: object) -> None:
    raise TimeoutError("the input takes too long")


@click.command()
@click.option(
    "--inputs",
    type=click.IntRange(min=1),
    default=1_000_000,
    help="How many, for all targets together.",
)
@click.option("--only", type=click.Choice([*TARGETS]), help="One target alone.")
@click.option("--seed", default=0, help="Another number draws other inputs.")
@click.option(
    "--start",
    type=click.IntRange(min=0),
    default=0,
    help="The number of the first input, where a run was stopped.",
)
def main(inputs: int, only: str | None, seed: int, start: int) -> None:
    """Fuzz, and exit with 1 if there were faults."""
    names = [name for name in TARGETS if only in (None, name)]
    weights = {name: TARGETS[name].share for name in names}
    limit_address_space(os.getpid(), _SPARE_BYTES)
    signal.signal(signal.SIGALRM, _raise_timeout)
    faults_count = 0
    for name in names:
        count = round(inputs * weights[name] / sum(weights.values()))
        faults_count += _fuzz_target(name, range(start, start + count), seed)
    sys.exit(faults_count > 0)


def _fuzz_target(name: str, numbers: range, seed: int) -> int:
    """Run inputs of a target, and return how many different faults they showed."""
    begin_s = time.monotonic()
    faults: dict[str, FuzzFault] = {}

    def report(count: int) -> None:
        rate = count / (time.monotonic() - begin_s)
        click.echo(f"{name}: {count} of {len(numbers)} inputs, {rate:.0f}/s, {len(faults)} faults")

    def note(fault: FuzzFault) -> None:
        if fault.place not in faults:
            faults[fault.place] = fault
            click.echo(f"FAULT in {name}, {fault}\n    at {fault.place}")

    with tempfile.TemporaryDirectory(prefix="deconvd-fuzz-") as directory:
        with TARGETS[name](Path(directory)) as target:
            fuzz(target, name, numbers, seed=seed, watch=_Watch().limit, report=report, note=note)
    faulthandler.cancel_dump_traceback_later()
    return len(faults)


if __name__ == "__main__":
    main()
