"""What lossless compression of elements could save on a slow link: ``python -m benchmarks.compression``.

Of the codecs here deconvd has "zero runs" (`deconvd.wire.packed_elements`), but faster. Tensors are compressed and
decompressed in slices of the size that the link asks for, and each slice is timed. Then the time of a pipeline of these
slices is computed::

    client compresses | link there | server decompresses | server compresses | link back | client decompresses

Each stage works on one slice at a time, and the server's computing takes no time. So the figures are the best that
compression could reach. A tensor that a codec makes less than 5 % smaller is sent as it is, for nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import blosc2
import click
import numpy as np

import deconvd_client
from benchmarks.commit import commit
from deconvd.model.dtypes import Array
from deconvd.wire.stream_parts import slices
from deconvd_client.transports.link_rate import LinkRate
from examples.local_server import local_server

_SHAPE: Final = (64, 32, 32)
"""A sample of x. A sample of y is as large: it has a quarter of the channels, and four times as many pixels.

A small y has a quarter of these channels.
"""

_X_BYTES: Final = 32 << 20
_MIN_SAVING: Final = 0.05
_REPETITIONS: Final = 3
_MAX_THREADS: Final = 2


@dataclass(frozen=True)
class CompressionRow:
    """One call with one codec; its fields are those of the JSON file.

    Attributes:
        threads: How many threads each stage that compresses or decompresses has.
        there, back: Compressed bytes over plain bytes of all tensors of the direction.
        compress_gb_per_s, decompress_gb_per_s: Of plain bytes, those of tensors that a codec does not make smaller too.
        plain_ms, ms: The call without and with compression.
    """

    call: str
    dtype: str
    codec: str
    threads: int
    there: float
    back: float
    compress_gb_per_s: float
    decompress_gb_per_s: float
    plain_ms: float
    ms: float

    def __str__(self) -> str:
        return (
            f"{self.call:42} {self.dtype:8} {self.codec:16} {self.threads:7} {self.there:6.2f} {self.back:6.2f} "
            f"{self.compress_gb_per_s:6.2f} {self.decompress_gb_per_s:6.2f} {self.plain_ms:6.0f} {self.ms:6.0f} "
            f"{self.plain_ms / self.ms:6.2f}"
        )


class _Codec(Protocol):
    """Compresses the elements of a slice, in one axis."""

    name: str

    def compress(self, elements: Array, threads: int) -> Sequence[Any]: ...

    def decompress(self, packed: Sequence[Any], like: Array, threads: int) -> Array: ...


@dataclass(frozen=True)
class _Slice:
    """One slice of a tensor, compressed.

    Attributes:
        plain_bytes, sent_bytes: Its size before and after.
    """

    plain_bytes: int
    sent_bytes: int
    compress_s: float
    decompress_s: float


@click.command()
@click.option("--rate-gbit", default=1.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(rate_gbit: float, json_file: Path | None) -> None:
    """Print the time of calls on a slow link without and with compression."""
    print(
        f"{'call':42} {'type':8} {'codec':16} {'threads':>7} {'there':>6} {'back':>6} {'GB/s':>6} {'GB/s':>6} "
        f"{'plain':>6} {'ms':>6} {'ratio':>6}"
    )
    rows: list[CompressionRow] = []
    for dtype in ("float32", "float16"):
        for call, (there, back) in _calls(dtype).items():
            for codec in _CODECS:
                for threads in range(1, _MAX_THREADS + 1):
                    row = _row(call, there, back, codec, threads, rate_gbit * 125e6)
                    rows.append(row)
                    print(row, flush=True)
    if json_file is not None:
        about = {
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rate_gbit": rate_gbit,
        }
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        json_file.write_text(text + "\n")


def _calls(dtype: str) -> Mapping[str, tuple[Sequence[Array], Sequence[Array]]]:
    """Return what each kind of call sends there and back."""
    generator = np.random.default_rng(0)
    n = _X_BYTES // (np.dtype(dtype).itemsize * int(np.prod(_SHAPE)))
    channels, height, width = _SHAPE
    y_shape = (n, channels // 4, 2 * height, 2 * width)
    plain, gy = (
        generator.standard_normal(shape, np.float32).astype(dtype)
        for shape in ((n, *_SHAPE), y_shape)
    )
    W = (generator.standard_normal((channels, channels // 4, 4, 4), np.float32) / 16).astype(dtype)
    rectified, rectified_gy = np.maximum(plain, 0), np.where(gy > 0, gy[::-1], 0).astype(dtype)
    with local_server("cpu") as target, deconvd_client.connect(target) as F:
        deconvolve = partial(F.deconvolution_2d, W=W, stride=2, pad=1)
        y, rectified_y = deconvolve(plain), deconvolve(rectified)
        small_W = np.ascontiguousarray(W[:, : channels // 16])
        small_y = F.deconvolution_2d(rectified, small_W, stride=2, pad=1)
        gx, _, _ = F.deconvolution_2d_grad(plain, W, None, gy, 2, 1, wanted=["gx"])
    assert gx is not None
    return {
        "y of x": ([plain], [y]),
        "y of x after a ReLU": ([rectified], [rectified_y]),
        "small y of x after a ReLU": ([rectified], [small_y]),
        "gx, gW of x and gy": ([gy, plain], [gx]),
        "gx, gW of x after a ReLU, gy": ([gy, rectified], [gx]),
        "gx, gW of x after a ReLU, gy before one": ([rectified_gy, rectified], [gx]),
        "gx, gW of x that stays, gy before a ReLU": ([rectified_gy], [gx]),
    }


def _row(
    call: str,
    there: Sequence[Array],
    back: Sequence[Array],
    codec: _Codec,
    threads: int,
    bytes_per_s: float,
) -> CompressionRow:
    step = _samples_count(there, back, bytes_per_s)
    compressed_there, compressed_back = (
        [_compress(array, codec, threads, step) for array in arrays] for arrays in (there, back)
    )
    every = [s for tensor in (*compressed_there, *compressed_back) for s in tensor]
    plain_bytes = sum(s.plain_bytes for s in every)
    return CompressionRow(
        call,
        there[0].dtype.name,
        codec.name,
        threads,
        _share(compressed_there),
        _share(compressed_back),
        plain_bytes / sum(s.compress_s for s in every) / 1e9,
        plain_bytes / sum(s.decompress_s for s in every) / 1e9,
        _call_s(
            [*map(_as_plain, compressed_there)], [*map(_as_plain, compressed_back)], bytes_per_s
        )
        * 1e3,
        _call_s([*map(_as_sent, compressed_there)], [*map(_as_sent, compressed_back)], bytes_per_s)
        * 1e3,
    )


def _samples_count(there: Sequence[Array], back: Sequence[Array], bytes_per_s: float) -> int:
    """Return how many samples the client would put in a slice on a link of that rate."""
    rate = LinkRate()
    rate.add_part(1 << 20, (1 << 20) / bytes_per_s)
    total_bytes = sum(array.nbytes for array in (*there, *back))
    return max(rate.slice_bytes(total_bytes) * len(there[0]) // total_bytes, 1)


def _compress(array: Array, codec: _Codec, threads: int, step: int) -> list[_Slice]:
    """Compress a tensor slice by slice, and check that decompression gives the same bits."""
    done: list[_Slice] = []
    for samples in slices(len(array), step):
        elements = array[samples].reshape(-1)
        times_s: list[tuple[float, float]] = []
        for _ in range(_REPETITIONS):
            began_s = time.perf_counter()
            packed = codec.compress(elements, threads)
            packed_s = time.perf_counter()
            unpacked = codec.decompress(packed, elements, threads)
            times_s.append((packed_s - began_s, time.perf_counter() - packed_s))
        assert unpacked.tobytes() == elements.tobytes()
        compress_s, decompress_s = map(statistics.median, zip(*times_s, strict=True))
        sent_bytes = sum(memoryview(part).nbytes for part in packed)
        done.append(_Slice(elements.nbytes, sent_bytes, compress_s, decompress_s))
    return done


def _as_plain(tensor: Sequence[_Slice]) -> list[_Slice]:
    return [_Slice(s.plain_bytes, s.plain_bytes, 0.0, 0.0) for s in tensor]


def _as_sent(tensor: list[_Slice]) -> list[_Slice]:
    return tensor if _share([tensor]) < 1 - _MIN_SAVING else _as_plain(tensor)


def _share(tensors: Sequence[Sequence[_Slice]]) -> float:
    every = [s for tensor in tensors for s in tensor]
    return sum(s.sent_bytes for s in every) / sum(s.plain_bytes for s in every)


def _call_s(
    there: Sequence[Sequence[_Slice]], back: Sequence[Sequence[_Slice]], bytes_per_s: float
) -> float:
    """Return when the last slice of a pipeline leaves its last stage."""
    ends_s = [0.0] * 6
    for number in range(len(there[0])):
        sent = [tensor[number] for tensor in there]
        returned = [tensor[number] for tensor in back]
        stages_s = (
            sum(s.compress_s for s in sent),
            sum(s.sent_bytes for s in sent) / bytes_per_s,
            sum(s.decompress_s for s in sent),
            sum(s.compress_s for s in returned),
            sum(s.sent_bytes for s in returned) / bytes_per_s,
            sum(s.decompress_s for s in returned),
        )
        ready_s = 0.0
        for stage, stage_s in enumerate(stages_s):
            ready_s = ends_s[stage] = max(ends_s[stage], ready_s) + stage_s
    return ends_s[-1]


class _Blosc:
    """Bytes or bits of elements sorted by their place, and then compressed."""

    def __init__(self, codec: blosc2.Codec, shuffle: blosc2.Filter) -> None:
        self.name = f"{shuffle.name.lower()} {codec.name.lower()}".removeprefix("nofilter ")
        self._codec = codec
        self._shuffle = shuffle

    def compress(self, elements: Array, threads: int) -> Sequence[Any]:
        packed = blosc2.compress2(
            elements.view(np.uint8),
            codec=self._codec,
            clevel=1,
            typesize=elements.itemsize,
            nthreads=threads,
            filters=[self._shuffle],
            filters_meta=[0],
        )
        return (packed,)

    def decompress(self, packed: Sequence[Any], like: Array, threads: int) -> Array:
        elements = np.empty_like(like)
        blosc2.decompress2(packed[0], dst=elements.view(np.uint8), nthreads=threads)
        return elements


class _ZeroRuns:
    """A bit for each element, and the elements that are not zero. A negative zero is not zero."""

    name = "zero runs"

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_MAX_THREADS)

    def compress(self, elements: Array, threads: int) -> Sequence[Any]:
        parts = self._executor.map(_pack_nonzero, np.array_split(elements, threads))
        return [array for part in parts for array in part]

    def decompress(self, packed: Sequence[Any], like: Array, threads: int) -> Array:
        elements = np.empty_like(like)
        parts = np.array_split(elements, threads)
        [*self._executor.map(_unpack_nonzero, parts, packed[::2], packed[1::2])]
        return elements


def _pack_nonzero(elements: Array) -> tuple[Array, Array]:
    mask = elements.view(f"u{elements.itemsize}") != 0
    return np.packbits(mask), elements[mask]


def _unpack_nonzero(target: Array, bits: Array, nonzero: Array) -> None:
    mask = np.unpackbits(bits, count=len(target)).view(np.bool_)
    target.fill(0)
    target[mask] = nonzero


_CODECS: Final[Sequence[_Codec]] = (
    _ZeroRuns(),
    _Blosc(blosc2.Codec.LZ4, blosc2.Filter.SHUFFLE),
    _Blosc(blosc2.Codec.LZ4, blosc2.Filter.BITSHUFFLE),
    _Blosc(blosc2.Codec.ZSTD, blosc2.Filter.SHUFFLE),
    _Blosc(blosc2.Codec.ZSTD, blosc2.Filter.BITSHUFFLE),
)

if __name__ == "__main__":
    main()
