"""What tensors that stay on the server save: ``python -m benchmarks.resident --device cuda --json FILE``.

A training step of two models over TCP, with and without residency: the demo's decoder, and the five layers of a DCGAN
generator (A. Radford et al., "Unsupervised representation learning with deep convolutional generative adversarial
networks", ICLR 2016). A step computes each layer's y, then each layer's gradients from the last to the first. What lies
between the layers is a ReLU, computed here. Three steps differ in what may stay:

- `step`: W and b are changed after each step, as in training; x and W stay from y to gradients (`F.vjp`).
- `step, W unchanged`: the same with W and b as they were, as when gradients are summed over several batches; W stays
  from step to step (`F.put`).
- `layers alone`: no ReLU, so that nothing but the first x, the last gy, W, the last y and gW need to move (`F.remote`).

Bytes are counted by a proxy between client and server, in a step of its own; they are all that TCP carries, HTTP/2's
frames included. Times are medians, without the proxy, of steps that take turns. Without residency the server is told to
keep nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

import deconvd_client
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.host import host
from benchmarks.layers import Layer
from benchmarks.ports import free_port
from benchmarks.wire import count_traffic
from deconvd.model.dtypes import Array
from deconvd.model.gradients import Gradients
from deconvd_client import Connection, RemoteTensor
from examples.local_server import local_server

_FLOAT32 = np.dtype(np.float32)

_DECODER = (
    Layer("decoder 16-32 1", 16, 16, 32, 1, 4),
    Layer("decoder 32-1 4", 16, 32, 1, 4, 4, 2, 1),
)
_GENERATOR = (
    Layer("generator 100-1024 1", 64, 100, 1024, 1, 4),
    Layer("generator 1024-512 4", 64, 1024, 512, 4, 4, 2, 1),
    Layer("generator 512-256 8", 64, 512, 256, 8, 4, 2, 1),
    Layer("generator 256-128 16", 64, 256, 128, 16, 4, 2, 1),
    Layer("generator 128-3 32", 64, 128, 3, 32, 4, 2, 1),
)

_WARM_UPS = 2
_LEAST_STEPS = 5
_TIME_S = 6.0


@dataclass(frozen=True)
class ResidentRow:
    """One kind of step; its fields are those of the JSON file.

    Attributes:
        model: Its name, and which of the steps.
        resident: Whether tensors stay on the server.
        wire_bytes: What one step moves, both ways together.
        sent_bytes: What of it the client sends.
        ms: How long a step takes.
    """

    model: str
    resident: bool
    wire_bytes: int
    sent_bytes: int
    ms: float


class Model:
    """Layers with their W and b, and the first x."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        random = np.random.default_rng(0)
        self.layers = layers
        self._there: dict[Connection, list[RemoteTensor]] = {}
        problems = [layer.problem(_FLOAT32) for layer in layers]
        self.x = random.standard_normal(problems[0].x.shape, np.float32)
        self.Ws: list[Array] = [
            random.standard_normal(p.W.shape, np.float32) / 64 for p in problems
        ]
        self.bs: list[Array] = [np.zeros(p.b.shape, np.float32) for p in problems]

    def change(self) -> None:
        """Change each W and b, as an optimizer does."""
        for parameter in [*self.Ws, *self.bs]:
            parameter *= 0.999

    def Ws_there(self, F: Connection) -> list[RemoteTensor]:
        """Return what stands for W at a connection; it is put there once."""
        if F not in self._there:
            self._there[F] = [F.put(W) for W in self.Ws]
        return self._there[F]

    def geometry(self, i: int) -> tuple[int, int]:
        """Return the stride and the pad of a layer."""
        return self.layers[i].stride, self.layers[i].pad


def plain_step(F: Connection, model: Model) -> list[Gradients]:
    """Send each operand with each call."""
    xs, ys, x = [], [], model.x
    for i, (W, b) in enumerate(zip(model.Ws, model.bs, strict=True)):
        y = F.deconvolution_2d(x, W, b, *model.geometry(i))
        xs.append(x)
        ys.append(y)
        x = np.maximum(y, 0)

    def gradients(i: int, gy: Array) -> Gradients:
        return F.deconvolution_2d_grad(xs[i], model.Ws[i], model.bs[i], gy, *model.geometry(i))

    return _backward(ys, gradients)


def resident_step(F: Connection, model: Model) -> list[Gradients]:
    """Let x and W stay from y to the gradients."""
    return _resident_step(F, model, model.Ws)


def resident_step_with_W_there(F: Connection, model: Model) -> list[Gradients]:
    """Let W stay from step to step too."""
    return _resident_step(F, model, model.Ws_there(F))


def _resident_step(
    F: Connection, model: Model, Ws: Sequence[Array | RemoteTensor]
) -> list[Gradients]:
    pullbacks, ys, x = [], [], model.x
    for i, (W, b) in enumerate(zip(Ws, model.bs, strict=True)):
        y, pullback = F.vjp(x, W, b, *model.geometry(i))
        pullbacks.append(pullback)
        ys.append(y)
        x = np.maximum(y, 0)
    return _backward(ys, lambda i, gy: pullbacks[i](gy))


def _backward(ys: list[Array], gradients: Callable[[int, Array], Gradients]) -> list[Gradients]:
    """Return the gradients of half the sum of the squares of the last y, from the last layer on."""
    results: list[Gradients] = []
    gy = ys[-1]
    for i in reversed(range(len(ys))):
        results.append(gradients(i, gy))
        gx = results[-1].gx
        assert gx is not None
        if i:
            gy = gx * (ys[i - 1] > 0)
    return results


def plain_layers(F: Connection, model: Model) -> list[Gradients]:
    """Send each operand with each call, with nothing between the layers."""
    xs = [model.x]
    for i, (W, b) in enumerate(zip(model.Ws, model.bs, strict=True)):
        xs.append(F.deconvolution_2d(xs[-1], W, b, *model.geometry(i)))
    results: list[Gradients] = []
    gy: Array | None = xs[-1]
    for i in reversed(range(len(model.layers))):
        assert gy is not None
        operands = xs[i], model.Ws[i], model.bs[i], gy
        results.append(F.deconvolution_2d_grad(*operands, *model.geometry(i)))
        gy = results[-1].gx
    return results


def resident_layers(F: Connection, model: Model) -> list[Gradients]:
    """Let all stay that the client has no use for."""
    Ws = [F.put(W) for W in model.Ws]
    xs: list[Array | RemoteTensor] = [model.x]
    for i, (W, b) in enumerate(zip(Ws, model.bs, strict=True)):
        xs.append(F.remote.deconvolution_2d(xs[-1], W, b, *model.geometry(i)))
    y = xs[-1]
    assert isinstance(y, RemoteTensor)
    gy: Array | RemoteTensor = y.numpy()
    results: list[Gradients] = []
    for i in reversed(range(len(model.layers))):
        operands = xs[i], Ws[i], model.bs[i], gy
        geometry = model.geometry(i)
        _, gW, gb = F.deconvolution_2d_grad(*operands, *geometry, wanted=["gW", "gb"])
        gx = F.remote.deconvolution_2d_grad(*operands, *geometry, wanted=["gx"]).gx
        assert gx is not None
        gy = gx
        results.append(Gradients(gx.numpy() if i == 0 else None, gW, gb))
    return results


Step = Callable[[Connection, Model], list[Gradients]]

_STEPS: dict[str, tuple[Step, Step, bool]] = {
    "step": (plain_step, resident_step, True),
    "step, W unchanged": (plain_step, resident_step_with_W_there, False),
    "layers alone": (plain_layers, resident_layers, True),
}
"""Without and with residency, and whether W changes after each step."""


@click.command()
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option(
    "--samples", type=int, help="Batch size of the generator: 64, or 4 on the CPU, unless given."
)
def main(device: str, json_file: Path | None, samples: int | None) -> None:
    """Count what training steps move, and time them, with and without residency."""
    n = samples or (4 if device == "cpu" else 64)
    rows: list[ResidentRow] = []
    for row in _rows(device, n):
        rows.append(row)
        print(_format(row), flush=True)
    _print_ratios(rows)
    if json_file is not None:
        about = {
            "card": card_name(device),
            "host": host(),
            "samples": n,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        rows_json = [asdict(row) for row in rows]
        json_file.write_text(json.dumps(about | {"rows": rows_json}, indent=1) + "\n")


def _rows(device: str, n: int) -> Iterator[ResidentRow]:
    models = {
        "decoder": _DECODER,
        "generator": tuple(replace(layer, n=n) for layer in _GENERATOR),
    }
    listen = "127.0.0.1:0"
    ports = [("--direct-port", str(free_port())) for _ in range(2)]
    with (
        local_server(device, "--resident-memory-bytes", "0", *ports[0], address=listen) as plain,
        local_server(device, *ports[1], address=listen) as resident,
    ):
        for name, layers in models.items():
            for kind, (plain_step, resident_step, changes) in _STEPS.items():
                sides = (
                    Side(plain, plain_step, Model(layers), changes),
                    Side(resident, resident_step, Model(layers), changes),
                )
                times_ms = _times_ms(sides)
                for side, ms in zip(sides, times_ms, strict=True):
                    sent, received = side.counted_bytes()
                    is_resident = side.target == resident
                    yield ResidentRow(f"{name}, {kind}", is_resident, sent + received, sent, ms)


@dataclass(frozen=True)
class Side:
    """A server, and the step that is made there."""

    target: str
    step: Step
    model: Model
    changes: bool

    def run(self, F: Connection) -> None:
        """Make a step."""
        self.step(F, self.model)
        if self.changes:
            self.model.change()

    def counted_bytes(self) -> tuple[int, int]:
        """Return what one step sends, and what comes back, once the server is warm."""
        with (
            count_traffic(self.target) as wire,
            deconvd_client.connect(wire.target, transport="tcp") as F,
        ):
            for _ in range(_WARM_UPS):
                self.run(F)
            before = wire.sent_bytes, wire.received_bytes
            self.run(F)
            return wire.sent_bytes - before[0], wire.received_bytes - before[1]


def _times_ms(sides: Sequence[Side]) -> list[float]:
    """Return the median time of a step on each side; they take turns, so that both meet the same noise."""
    times_s: list[list[float]] = [[] for _ in sides]
    with ExitStack() as stack:
        connections = [
            stack.enter_context(deconvd_client.connect(side.target, transport="tcp"))
            for side in sides
        ]
        for _ in range(_WARM_UPS):
            for side, F in zip(sides, connections, strict=True):
                side.run(F)
        while len(times_s[0]) < _LEAST_STEPS or sum(map(sum, times_s)) < _TIME_S:
            for side, F, times in zip(sides, connections, times_s, strict=True):
                start_s = time.perf_counter()
                side.run(F)
                times.append(time.perf_counter() - start_s)
    return [statistics.median(times) * 1e3 for times in times_s]


def _format(row: ResidentRow) -> str:
    kind = "resident" if row.resident else "plain"
    wire, sent = row.wire_bytes / 1e6, row.sent_bytes / 1e6
    return f"{row.model:32} {kind:9} {wire:10.3f} MB, {sent:10.3f} of them sent {row.ms:10.2f} ms"


def _print_ratios(rows: list[ResidentRow]) -> None:
    for plain in rows:
        for other in rows:
            if (other.resident, plain.resident, other.model) == (True, False, plain.model):
                fewer, faster = plain.wire_bytes / other.wire_bytes, plain.ms / other.ms
                print(
                    f"{plain.model:32} {fewer:5.2f} times fewer bytes, {faster:5.2f} times as fast"
                )


if __name__ == "__main__":
    main()
