"""The soak: ``python -m tests.soak --minutes 10``.

A server with known limits serves honest clients by every way, beside hostile ones of every kind, while it is killed and
drained at random. It ends with a report, and with exit code 1 if anything was violated.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import click
import pytest

from tests.cgroups import Cgroup, cgroup
from tests.soak.clients import Client, Hostile
from tests.soak.honest import CALL_TIMEOUT_S, WAYS
from tests.soak.hostile.kinds import KINDS
from tests.soak.places import free_places
from tests.soak.report import Results
from tests.soak.supervisor import GROUP_BYTES, Supervisor

_HOSTILE_S = 12.0
"""How long one hostile client attacks, at most."""

_HOSTILE_COUNT = 2
_ADDRESSES_COUNT = 8
"""Those of hostile clients: 127.0.0.2 and the next."""

_CALM_S = 8.0, 20.0
"""How long the server is left to itself, from and to."""

_READY_S = 60.0
"""How long all honest clients may take to make their first calls, before there are hostile ones."""

_STEP_S = 0.05


@dataclass
class Soak:
    """One soak: its clients, and what befalls them and the server.

    Attributes:
        words: Where the server is, for clients.
        kinds: Of hostile clients: each in turn, in an order that is drawn anew each time.
        is_calm: Whether one hostile client is there all the time, and the server is drained at the end alone.
    """

    directory: Path
    supervisor: Supervisor
    words: Sequence[str]
    random: Random
    kinds: Sequence[str]
    seconds: float
    is_calm: bool
    _hostile: list[Hostile] = field(default_factory=list)
    _order: list[str] = field(default_factory=list)

    def run(self) -> Results:
        """Run it, and return what came of it."""
        with ExitStack() as stack:
            honest = [self._client("honest", way, stack) for way in WAYS]
            health = self._client("health", "health", stack)
            steady = [*honest, health]
            until_s = time.monotonic() + _READY_S
            while not all(client.is_ready for client in steady) and time.monotonic() < until_s:
                time.sleep(_STEP_S)
            self._run(stack)
            for hostile in self._hostile:
                hostile.end()
            for client in steady:
                client.process.terminate()
            clients = [*steady, *self._hostile]
            faults = [client.fault(2 * CALL_TIMEOUT_S) for client in clients]
        return Results.of(
            self.directory, self.supervisor.record, honest, health, self._hostile, faults
        )

    def _run(self, stack: ExitStack) -> None:
        until_s = time.monotonic() + self.seconds
        calm_until_s = self._calm_until_s()
        while time.monotonic() < until_s:
            self.supervisor.watch()
            self._tend_hostile(stack)
            if time.monotonic() > calm_until_s:
                self._disturb()
                calm_until_s = self._calm_until_s()
            time.sleep(_STEP_S)
        self.supervisor.drain()

    def _client(self, module: str, name: str, stack: ExitStack) -> Client:
        words = (name, *self.words, self.random.random())
        client = Client(self.directory, name, module, *words)
        stack.callback(client.end)
        return client

    def _calm_until_s(self) -> float:
        return math.inf if self.is_calm else time.monotonic() + self.random.uniform(*_CALM_S)

    def _disturb(self) -> None:
        """Kill the server, drain it, or drain it and cut that short."""
        match self.random.randrange(3):
            case 0:
                self.supervisor.kill()
            case number:
                self.supervisor.drain(is_cut=number == 1)

    def _tend_hostile(self, stack: ExitStack) -> None:
        running = [client for client in self._hostile if client.process.poll() is None]
        for client in running:
            client.tend()
        if self.kinds and len(running) < (1 if self.is_calm else _HOSTILE_COUNT):
            self._order = self._order or self.random.sample(self.kinds, len(self.kinds))
            number, kind = len(self._hostile), self._order.pop()
            source = f"127.0.0.{2 + number % _ADDRESSES_COUNT}"
            words = (f"{number:03}-{kind}", kind, *self.words, source)
            seconds = 2 * self.seconds if self.is_calm else _HOSTILE_S  # alone, it is not killed
            hostile = Hostile(self.directory, *words, random=self.random, seconds=seconds)
            stack.callback(hostile.end)
            self._hostile.append(hostile)


def _group(stack: ExitStack) -> Cgroup | None:
    """Return a cgroup for the server; None where the system lets us have none."""
    try:
        return stack.enter_context(cgroup(memory_bytes=GROUP_BYTES))
    except pytest.skip.Exception:
        return None


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=0.0, help="How long it takes.")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=0.0, help="How long, beside the minutes."
)
@click.option("--seed", type=int, help="Makes its choices, if not their moments, again.")
@click.option(
    "--only",
    type=click.Choice([*KINDS, "nobody"]),
    help="One kind of hostile client alone, or none, and a server that is drained at the end alone.",
)
@click.option("--without", multiple=True, type=click.Choice([*KINDS]), help="A kind to leave out.")
@click.option(
    "--constant",
    "constants",
    multiple=True,
    type=(str, float),
    metavar="MODULE:NAME VALUE",
    help="Another value for a constant of the server: whether it is missed shows what the soak sees.",
)
def main(
    minutes: float,
    seconds: float,
    seed: int | None,
    only: str | None,
    without: Sequence[str],
    constants: Sequence[tuple[str, float]],
) -> None:
    """Soak a server, and exit with 1 if anything was violated."""
    if not minutes + seconds:
        raise click.UsageError("how long shall it take? Give --minutes or --seconds")
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    kinds = [kind for kind in KINDS if only in (None, kind) and kind not in without]
    directory = Path(tempfile.mkdtemp(prefix="deconvd-soak-"))
    places = free_places(directory)
    with ExitStack() as stack:
        supervisor = stack.enter_context(
            Supervisor(directory, places, _group(stack), dict(constants))
        )
        results = Soak(
            *(directory, supervisor, places.words, Random(seed), kinds, 60 * minutes + seconds),
            is_calm=only is not None,
        ).run()
    click.echo(f"{results.to_text()}\nseed: {seed}")
    violations = results.violations()
    for violation in violations:
        click.echo(f"VIOLATED: {violation}")
    if violations:
        click.echo(f"logs are kept in {directory}")
        sys.exit(1)
    shutil.rmtree(directory)
    click.echo("nothing was violated")


if __name__ == "__main__":
    main()
