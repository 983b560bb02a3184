"""One hostile client: ``python -m tests.soak.hostile KIND PATH PORT DIRECT_PORT SOURCE SEED``.

It prints how often it attacked, and what ended its last attack before it was done.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import ExitStack
from random import Random

from deconvd.errors import DeconvdError
from tests.soak.hostile.attack import Attacker
from tests.soak.hostile.kinds import KINDS
from tests.soak.places import NICENESS, Places, end_at_sigterm

_MEMORY_BYTES = 2 << 30
"""Of the machine that it attacks from: none of what it asks for is to be its own."""

_HOLDS_S = 0.5, 15.0
"""How long what it has opened stays open, one or the other: longer than any honest call is to wait for that."""


def main() -> None:
    """See the module."""
    kind, *words, source, seed = sys.argv[1:]
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    random = Random(seed)
    end = end_at_sigterm()
    while not end.is_set():
        print("an attack", flush=True)  # noqa: T201 - a command's output
        came_to = "its end"
        with ExitStack() as held:
            try:
                KINDS[kind](Attacker(Places.of(*words), source, random, held))
            except (OSError, DeconvdError) as error:  # as the server may do to it
                came_to = f"{type(error).__name__}: {error}"
            print(f"came to {came_to}", flush=True)  # noqa: T201 - a command's output
            end.wait(random.choice(_HOLDS_S))


if __name__ == "__main__":
    main()
