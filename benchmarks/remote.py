"""How near a far server is: ``python -m benchmarks.remote --device cuda --json FILE``.

Client processes call a server over TCP, and by the other ways in the same run: shared memory, gRPC, and the bare
program of `deconvd_client.cli.bare_sockets`, which moves the same bytes there and back and computes nothing. Its rate
with four connections a call is the floor, and each row tells how much of it was reached. The clients of a row begin
together and call for the same time. Rows are added to those that FILE has, so the table can be made in parts; a row
that is measured again replaces the one before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import numpy as np

import deconvd_client
from benchmarks.call_options import (
    clients_option,
    layer_option,
    processes_option,
    time_option,
    type_option,
    warm_up_option,
)
from benchmarks.client_processes import ClientProcesses, Meet, start_client_processes
from benchmarks.commit import commit
from benchmarks.floor import card_name
from benchmarks.host import host
from benchmarks.layer_calls import SERVICE_LAYERS, call_layer, operands_of
from benchmarks.layers import Layer
from benchmarks.remote_rows import FLOOR_PATH, RemoteRow, RowsFile
from benchmarks.timed_calls import Durations, time_calls, warm_up
from deconvd.model.dtypes import DType
from deconvd_client.cli.bare_sockets import bare_calls, bare_server
from examples.local_server import local_server

_BARE_CONNECTIONS = {FLOOR_PATH: 4, "bare_1": 1}
"""How many connections a call of the bare program has, by its path."""

_PATHS = (*_BARE_CONNECTIONS, "tcp", "grpc", "shared_memory")
"""In the order of measuring: the floor is first, so that the others can be compared with it at once."""

_TIMEOUT_S = 300.0


@click.command()
@click.option("--device", default="cpu", show_default=True, help="As of deconvd-server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@layer_option(SERVICE_LAYERS)
@type_option
@clients_option
@click.option("--path", "paths", type=click.Choice(_PATHS), multiple=True, default=_PATHS)
@time_option
@click.option(
    "--warm-up-calls",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Calls of each client before, at most.",
)
@warm_up_option(1.5)
@processes_option(0)
def main(
    device: str,
    json_file: Path | None,
    layers: Sequence[Layer],
    dtypes: Sequence[DType],
    clients_counts: Sequence[int],
    paths: Sequence[str],
    time_s: float,
    warm_up_calls: int,
    warm_up_s: float,
    processes: int,
) -> None:
    """Time calls over TCP, and by other ways, as parts of what a bare program reaches over TCP."""
    about = {
        "card": card_name(device),
        "host": host(),
        "commit": commit(),
        "processes": processes,
    }
    file = RowsFile(json_file, about)
    durations = Durations(warm_up_calls, warm_up_s, time_s)
    with ExitStack() as stack:
        addresses = _start_servers(stack, device, paths, processes)
        clients = stack.enter_context(start_client_processes(clients_counts))
        for layer in layers:
            for dtype in dtypes:
                for count in clients_counts:
                    for path, address in addresses.items():
                        row = _row(clients, layer, dtype, count, path, address, durations)
                        print(file.add(row), flush=True)


def _start_servers(
    stack: ExitStack, device: str, paths: Sequence[str], processes: int
) -> Mapping[str, str]:
    """Start what the paths need, one server or two. Return their addresses by path, in the order of measuring."""
    ours = bare = ""
    if not _BARE_CONNECTIONS.keys() >= set(paths):
        options = ("--processes", str(processes))
        ours = stack.enter_context(local_server(device, *options, address="127.0.0.1:0"))
    if not _BARE_CONNECTIONS.keys().isdisjoint(paths):
        bare = stack.enter_context(bare_server())
    return {path: bare if path in _BARE_CONNECTIONS else ours for path in _PATHS if path in paths}


def _row(
    clients: ClientProcesses,
    layer: Layer,
    dtype: DType,
    clients_count: int,
    path: str,
    address: str,
    durations: Durations,
) -> RemoteRow:
    figures = clients.run(clients_count, _time_client, layer, dtype, path, address, durations)
    return RemoteRow(
        layer.name,
        dtype.name,
        clients_count,
        path,
        ms=statistics.median(ms for ms, _ in figures),
        gb_per_s=sum(rate for _, rate in figures) * layer.nbytes(dtype) / 1e9,
    )


def _time_client(
    meet: Meet, layer: Layer, dtype: DType, path: str, address: str, durations: Durations
) -> tuple[float, float]:
    """Call together with others. Return the median latency in milliseconds, and the rate in calls per second."""
    with _calls(layer, dtype, path, address) as call:
        call()
        meet()
        warm_up(call, durations)
        meet()
        return time_calls(call, durations.time_s)


@contextmanager
def _calls(layer: Layer, dtype: DType, path: str, address: str) -> Iterator[Callable[[], None]]:
    """Connect by a path, and give what makes a call."""
    operands = operands_of(layer, dtype)
    if path in _BARE_CONNECTIONS:
        sent = np.concatenate([array.reshape(-1).view(np.uint8) for array in operands])
        received = np.ones(layer.problem(dtype).y.nbytes, np.uint8)
        with bare_calls(address, _BARE_CONNECTIONS[path], sent, received) as call:
            yield call
        return
    with deconvd_client.connect(address, transport=path, timeout_s=_TIMEOUT_S) as F:
        yield lambda: call_layer(F, layer, operands)


if __name__ == "__main__":
    main()
