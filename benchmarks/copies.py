"""How fast a card copies from and to host memory: ``python -m benchmarks.copies --device cuda --json FILE``.

Pinned memory is the floor. Shared memory that a server lends is timed as the server has it, registered with CUDA, and
without that: such goes through the driver's own buffers, as any other memory does. Medians, in GB/s.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click

from benchmarks.commit import commit
from benchmarks.floor import card_name
from deconvd_server.shared_memory.memfd_watcher import MemfdWatcher
from deconvd_server.shared_memory.memory import SealedMemory

_SIZES = tuple(1 << exponent for exponent in range(18, 29, 2))
_REPEATS = 15


@dataclass(frozen=True)
class CopyRow:
    """One kind of memory and size; its fields are those of the JSON file.

    Attributes:
        memory: ``pinned``, ``registered`` or ``unregistered``.
        upload, download: GB/s each way.
    """

    memory: str
    bytes: int
    upload: float
    download: float

    def __str__(self) -> str:
        return (
            f"{self.memory:14} {self.bytes:11} bytes: "
            f"upload {self.upload:5.1f} GB/s, download {self.download:5.1f} GB/s"
        )


@click.command()
@click.option("--device", default="cuda", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--bytes", "sizes", multiple=True, type=int, default=_SIZES)
def main(device: str, json_file: Path | None, sizes: Sequence[int]) -> None:
    """Time copies between a card and host memory of several kinds."""
    rows: list[CopyRow] = []
    for row in _rows(device, sizes):
        rows.append(row)
        print(row, flush=True)
    if json_file is not None:
        about = {
            "card": card_name(device),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


def _rows(device: str, sizes: Sequence[int]) -> Iterator[CopyRow]:
    from deconvd_server.device.cuda.api.memory_pool import CardMemoryPool
    from deconvd_server.device.cuda.api.runtime import (
        PinnedBuffer,
        Stream,
        current_device,
        download,
        upload,
    )
    from deconvd_server.device.opening import DeviceSettings, open_devices

    settings = DeviceSettings(None, None, None, lambda _: None)
    (card,) = open_devices(device if ":" in device else f"{device}:0", settings)
    with current_device(int(card.info.id.partition(":")[2])):
        stream, block = Stream(), CardMemoryPool(max(sizes)).allocate(max(sizes))
        ends = MemfdWatcher()
        registered = SealedMemory(max(sizes), card.register, ends)
        memory_of = {
            "pinned": PinnedBuffer(max(sizes)).bytes,
            "registered": registered.bytes,
            "unregistered": SealedMemory(
                max(sizes), lambda _address, _size: lambda: None, ends
            ).bytes,
        }
        for size in sizes:
            for name, memory in memory_of.items():
                up = partial(upload, block.ptr, memory[:size], stream.pointer)
                down = partial(download, memory[:size], block.ptr, stream.pointer)
                yield CopyRow(name, size, *(_rate(copy, stream.wait, size) for copy in (up, down)))
        registered.unmap()
    card.close()


def _rate(copy: Callable[[], None], wait: Callable[[], None], size: int) -> float:
    """Return how fast a copy is, as its caller sees it, in GB/s."""
    times: list[float] = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        copy()
        wait()
        times.append(time.perf_counter() - start_s)
    return size / statistics.median(times) / 1e9


if __name__ == "__main__":
    main()
