"""How fast deconvolutions are on a card: ``python -m benchmarks.operator --device cuda --json FILE``.

Times y, and gx, gW and gb together, on arrays that lie on the card, NCHW in and out, with autotune; beside PyTorch's
conv_transpose2d and its backward with cudnn.benchmark, once with NCHW tensors, as its users have them, and once with
channels-last ones. The floor is what the card's memory or arithmetic allows. Every result is compared with PyTorch's
before it is timed. Times are CUDA events around back-to-back calls, so that they count what launching them costs where
that is more than computing them: medians, and operands that change from call to call where they fit the L2 cache.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.layers import LAYERS
from benchmarks.operator_rows import HEADER, PRECISIONS, OperatorRow, mean_lines


def main() -> None:
    """Time what the arguments ask for."""
    arguments = _arguments()
    if not arguments.device.startswith("cuda"):
        print("operators are timed on cards alone: --device cuda")
        return
    print("\n".join(mean_lines(_rows(arguments))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--layers", default="", help="only layers whose names hold this text")
    parser.add_argument("--types", default=",".join(kind.name for kind in PRECISIONS))
    parser.add_argument("--tuning-s", type=float, default=5.0, help="at most, for each plan")
    return parser.parse_args()


def _rows(arguments: argparse.Namespace) -> list[OperatorRow]:
    """Time the rows; print each, and write those so far to the file, as soon as it is known."""
    from benchmarks.operator_timing import time_operators  # needs a card, and PyTorch

    layers = [layer for layer in LAYERS if arguments.layers in layer.name]
    kinds = [kind for kind in PRECISIONS if kind.name in arguments.types.split(",")]
    ordinal = int(arguments.device.partition(":")[2] or 0)
    print(HEADER, flush=True)
    rows = []
    for row in time_operators(ordinal, layers, kinds, tuning_s=arguments.tuning_s):
        rows.append(row)
        print(row, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(_report(arguments.device, rows), indent=1))
    return rows


def _report(device: str, rows: list[OperatorRow]) -> dict[str, object]:
    """Return what was measured, on what, with what and when."""
    from benchmarks.operator_timing import versions

    return {
        "card": card_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
