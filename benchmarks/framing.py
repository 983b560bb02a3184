"""Framing by hand against protobuf's own: ``python -m benchmarks.framing --json FILE``.

`deconvd.wire.codec` writes and reads the elements of tensors by hand in large messages. Here messages of all sizes are
written and read by hand, and by the generated classes alone, on both ends: in two servers that differ in nothing else,
and in this process.

For each size the table has what both ends' framing of a unary call takes (a request and a response, each written and
read), and what whole calls take by gRPC over TCP. Times are medians; both ways take turns. Ratios are protobuf's times
to ours. `gain` is what framing by hand saves, as a part of a whole call's time. The last lines tell what a process
takes at most while it reads a request with 32 MiB of elements, and while it writes a response with as many.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import grpc
import numpy as np

from benchmarks.commit import commit
from benchmarks.host import host
from deconvd.host.malloc import raise_mmap_threshold
from deconvd.host.startup_line import address_in_startup_line
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire import codec
from deconvd.wire.codec import Envelope
from deconvd.wire.tensor import elements_of, message_from_spec

_SIZES = tuple(1 << power for power in range(10, 23))
_METHOD = "/deconvd.v1.DeconvolutionService/Deconvolve"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_NEVER_BYTES = 1 << 60
"""A size up to which the generated classes are used that no message has."""

_SERVER = """
import sys
from deconvd.wire import codec
codec._MAX_SMALL_BYTES = int(sys.argv.pop(1))
from deconvd_server.__main__ import main
main()
"""

_LARGE_BYTES = 32 << 20

_MEMORY = """
import sys
from pathlib import Path
from deconvd.wire import codec
from deconvd.v1 import deconvd_pb2 as pb
codec._MAX_SMALL_BYTES = int(sys.argv[1])
size_bytes = int(sys.argv[2])
def held_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
request = pb.DeconvolveRequest(x=pb.Tensor(shape=[1], raw=bytes(size_bytes))).SerializeToString()
y = memoryview(bytearray(size_bytes))
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before_bytes = held_bytes("VmRSS")
held = codec.decode(pb.DeconvolveRequest, request)
print(held_bytes("VmHWM") - before_bytes)
del held
Path("/proc/self/clear_refs").write_text("5")
before_bytes = held_bytes("VmRSS")
held = codec.encode(codec.Envelope(pb.DeconvolveResponse(y=pb.Tensor(shape=[1])), {"y": y}))
print(held_bytes("VmHWM") - before_bytes)
"""

_LEAST_CALLS, _MOST_CALLS = 5, 3000


@dataclass(frozen=True)
class Row:
    """Tensors of one size; its fields are those of the JSON file.

    Attributes:
        bytes: Size of x, and of y.
        framing_ms, protobuf_framing_ms: What both ends' framing takes, by hand and by protobuf.
        framing_ratio: How many times as long protobuf's takes.
        call_ms, protobuf_call_ms: What a call takes with each.
        call_ratio: How many times as long one with protobuf's takes.
        gain: What framing by hand saves, as a part of `call_ms`.
    """

    bytes: int
    framing_ms: float
    protobuf_framing_ms: float
    framing_ratio: float
    call_ms: float
    protobuf_call_ms: float
    call_ratio: float
    gain: float

    def __str__(self) -> str:
        return (
            f"{self.bytes / 1024:6.0f} KiB  framing {self.framing_ms:7.4f} ms, protobuf "
            f"{self.protobuf_framing_ms:7.4f}, ratio {self.framing_ratio:5.2f}  call {self.call_ms:7.3f} ms, "
            f"protobuf {self.protobuf_call_ms:7.3f}, ratio {self.call_ratio:5.3f}  gain {self.gain:6.1%}"
        )


@click.command()
@click.option("--bytes", "sizes", type=click.IntRange(min=4), multiple=True, default=_SIZES)
@click.option("--time-s", default=2.0, show_default=True, help="For each size, twice.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(sizes: Sequence[int], time_s: float, json_file: Path | None) -> None:
    """Time the framing of unary calls, and whole calls, by hand and by protobuf alone."""
    raise_mmap_threshold()  # as the client does
    with ExitStack() as stack:
        stack.callback(vars(codec).update, _MAX_SMALL_BYTES=codec._MAX_SMALL_BYTES)
        sides = [stack.enter_context(_side(small_bytes)) for small_bytes in (0, _NEVER_BYTES)]
        rows = []
        for size_bytes in sizes:
            rows.append(_row(sides, size_bytes, time_s))
            print(rows[-1], flush=True)
    memory = {
        name: _peaks_mib(side.small_bytes)
        for name, side in zip(("by hand", "protobuf"), sides, strict=True)
    }
    for name, (read_mib, written_mib) in memory.items():
        print(f"32 MiB {name}: {read_mib:.0f} MiB more to read it, {written_mib:.0f} to write it")
    if json_file is not None:
        about = {
            "host": host(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        rows_json = [asdict(row) for row in rows]
        json_file.write_text(
            json.dumps(about | {"peaks_mib": memory, "rows": rows_json}, indent=1) + "\n"
        )


@dataclass(frozen=True)
class _Side:
    """One way to frame messages, and a server that frames them so.

    Attributes:
        small_bytes: The size up to which generated classes are used, see `deconvd.wire.codec`.
        call: Makes a call of the server, from bytes to bytes.
    """

    small_bytes: int
    call: Callable[[bytes], bytes]

    def choose(self) -> None:
        """Let this process frame messages so."""
        vars(codec)["_MAX_SMALL_BYTES"] = self.small_bytes

    def frame(self, request: Envelope[pb.DeconvolveRequest]) -> None:
        """Write and read a request, and a response with as many elements, as both ends of a call do."""
        codec.decode(pb.DeconvolveRequest, codec.encode(request))
        response = Envelope(_RESPONSE, {"y": request.raw["x"]})
        codec.decode(pb.DeconvolveResponse, codec.encode(response))

    def make_call(self, request: Envelope[pb.DeconvolveRequest]) -> Envelope[pb.DeconvolveResponse]:
        """Make a call, and return what it gives."""
        return codec.decode(pb.DeconvolveResponse, self.call(codec.encode(request)))


_RESPONSE = pb.DeconvolveResponse(y=pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=[1]))


@contextmanager
def _side(small_bytes: int) -> Iterator[_Side]:
    command = [sys.executable, "-c", _SERVER, str(small_bytes)]
    options = ["--device", "cpu", "--listen", "127.0.0.1:0", "--log-level", "warning"]
    with subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            target = address_in_startup_line(server.stdout.readline())
            with grpc.insecure_channel(target, _UNLIMITED) as channel:
                call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)
                yield _Side(small_bytes, call)
        finally:
            server.terminate()


def _row(sides: Sequence[_Side], size_bytes: int, time_s: float) -> Row:
    x = np.random.default_rng(0).standard_normal((1, 1, 1, size_bytes // 4), np.float32)
    W = np.ones((1, 1, 1, 1), np.float32)
    request = Envelope(
        pb.DeconvolveRequest(x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(W))),
        {"x": elements_of(x), "w": elements_of(W)},
    )
    for side in sides:  # both give what was sent: the filter is one
        side.choose()
        np.testing.assert_array_equal(
            np.frombuffer(side.make_call(request).raw["y"], "f4"), x[0, 0, 0]
        )
    framing_ms, protobuf_framing_ms = _times_ms(sides, lambda side: side.frame(request), time_s)
    call_ms, protobuf_call_ms = _times_ms(sides, lambda side: side.make_call(request), time_s)
    return Row(
        size_bytes,
        framing_ms,
        protobuf_framing_ms,
        protobuf_framing_ms / framing_ms,
        call_ms,
        protobuf_call_ms,
        protobuf_call_ms / call_ms,
        (protobuf_framing_ms - framing_ms) / call_ms,
    )


def _peaks_mib(small_bytes: int) -> tuple[float, float]:
    """Return what a process takes more, at most, to read a large request, and to write a large response."""
    command = [sys.executable, "-c", _MEMORY, str(small_bytes), str(_LARGE_BYTES)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    read_bytes, written_bytes = map(int, done.stdout.split())
    return read_bytes / 2**20, written_bytes / 2**20


def _times_ms(
    sides: Sequence[_Side], work: Callable[[_Side], object], time_s: float
) -> list[float]:
    """Return the median time of some work on each side; they take turns, so that both meet the same noise."""
    times_s: list[list[float]] = [[] for _ in sides]
    turns = list(zip(sides, times_s, strict=True))
    end_s = time.perf_counter() + time_s
    count = 0
    while count < _LEAST_CALLS or (time.perf_counter() < end_s and count < _MOST_CALLS):
        for side, times in turns:
            side.choose()
            start_s = time.perf_counter()
            work(side)
            times.append(time.perf_counter() - start_s)
        turns.reverse()  # so that neither always comes behind the other
        count += 1
    return [statistics.median(times) * 1e3 for times in times_s]


if __name__ == "__main__":
    main()
