"""What is fuzzed: the interface of all targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, Seed

__all__ = ["Target"]


class Target:
    """Code that gets inputs, and must never fail in an unforeseen way. A context manager.

    Attributes:
        seeds: Valid inputs of each kind.
        batch_count: After how many inputs `check` is called.
        limit_s: How long one input may take. It is generous: other programs may share the processors.
        bounded_count: How many inputs the tests run.
        share: Its share of the inputs of all targets.

    Args:
        directory: Where it may have files and sockets.
    """

    seeds: Sequence[Seed] = ()
    batch_count: int = 5000
    limit_s: float = 10.0
    bounded_count: int = 5000
    share: int = 20

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.resources = ExitStack()
        self._others: list[bytes] = []

    def __enter__(self) -> Target:
        with ExitStack() as stack:
            self.open(stack)
            self.resources = stack.pop_all()
        self._others = [part for seed in self.seeds for part in seed.to_case().parts]
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    def open(self, stack: ExitStack) -> None:
        """Start what it needs."""

    def draw(self, random: Random) -> Case:
        """Return an input."""
        return random.choice(self.seeds).draw(random, self._others)

    @abstractmethod
    def feed(self, case: Case) -> None:
        """Run the code on an input. Whatever this raises is a fault, and so is a wrong result."""

    def check(self) -> None:
        """See, between inputs, that the code still works and has given everything back. Raises if not."""
