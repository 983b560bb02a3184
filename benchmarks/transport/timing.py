"""How round trips are timed, whatever makes them: tensors of a size, bursts of calls, and rows as a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.commit import commit
from benchmarks.host import host
from deconvd.model.dtypes import Array

__all__ = ["burst_s", "human", "tensor", "write_rows"]

_MOST_CALLS, _BURST_S = 100, 0.1
"""Of a path in a round, after one call that does not count."""


def tensor(size_bytes: int) -> Array:
    """Return a tensor of so many bytes that can be cut into samples of at most a mebibyte."""
    elements_count = size_bytes // 4
    width = min(elements_count, 256)
    height = min(elements_count // width, 1024)
    n = elements_count // (width * height)
    return np.random.default_rng(0).random((n, 1, height, width), np.float32)


def burst_s(call: Callable[[], object], prepare: Callable[[], object] | None = None) -> list[float]:
    """Return what each of a few calls took.

    Args:
        call: Makes a call.
        prepare: Done before each call; its time does not count.
    """
    call()
    times_s: list[float] = []
    began_s = time.perf_counter()
    while not times_s or (len(times_s) < _MOST_CALLS and time.perf_counter() - began_s < _BURST_S):
        if prepare is not None:
            prepare()
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return times_s


def human(size_bytes: int) -> str:
    """Return a size as text."""
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """Write rows as JSON, with the host, the commit and the date."""
    about = {
        "host": host(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
