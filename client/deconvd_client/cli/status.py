"""The command `deconvd status`: shows the state of a server."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Final

import click

from deconvd.command_line import CliCommand
from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd.wire.server_counts import MethodCounts, ServerCounts, StageTimes
from deconvd_client.cli.formats import format_bytes, format_duration, format_part
from deconvd_client.cli.load_rates import quantile_us
from deconvd_client.cli.options import report_errors, target_option, timeout_option
from deconvd_client.connector import connect
from deconvd_client.server_info import DeviceDescription, ServerInfo, WorkerDescription
from deconvd_client.transports.targets import parse_targets

__all__ = ["status"]

_SERVING: Final = "SERVING"


@click.command(cls=CliCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@target_option
@timeout_option
def status(as_json: bool, target: str, timeout_s: float) -> None:
    """Show whether a server serves, and its version, devices and caches. Several servers have commas between them.

    What is counted is counted since the server started: the calls of your token or certificate, or of all clients if
    you have neither. deconvd top shows the same as rates.

    With several servers and --json, each has a line. Of a server with several processes, all are listed, and one is
    shown.

    Exit codes: 0 if all of them serve, 1 if one does not serve or cannot be reached, 2 if an option is wrong.
    """
    failures = []
    servers = parse_targets(target)
    for server in servers:
        try:
            health, info = _ask(server, timeout_s)
        except DeconvdError as error:
            if len(servers) == 1 or isinstance(error, InvalidArgumentError):
                with report_errors():
                    raise
            health, info = f"{error}", None
        if health != _SERVING:
            failures.append(server)
        if as_json:
            click.echo(_format_json(server, health, info, indent=2 if len(servers) == 1 else None))
        else:
            click.echo(_format_text(server, health, info))
    if failures:
        raise SystemExit(1)


def _ask(target: str, timeout_s: float) -> tuple[str, ServerInfo | None]:
    """Return a server's health, and what it says about itself if it serves."""
    with connect(target, timeout_s=timeout_s, fail_fast=True) as F:
        health = F.health()
        return health, F.server_info() if health == _SERVING else None


def _format_json(target: str, health: str, info: ServerInfo | None, indent: int | None) -> str:
    fields = {} if info is None else asdict(info)
    return json.dumps({"target": target, "health": health, **fields}, indent=indent)


def _format_text(target: str, health: str, info: ServerInfo | None) -> str:
    lines = [f"{target}: {health}"]
    if info is not None:
        lines += [_worker_line(worker, info) for worker in info.workers]
        lines.append(f"  deconvd {info.version}, messages up to {info.max_message_bytes} bytes")
        lines.append(f"  element types: {', '.join(info.element_types)}")
        if info.direct_port:
            lines.append(f"  direct connections: TCP port {info.direct_port}")
        for device in info.devices:
            lines += _device_lines(device, info.counts)
        if info.counts is not None:
            lines += _counts_lines(info.counts)
    return "\n".join(lines)


def _worker_line(worker: WorkerDescription, info: ServerInfo) -> str:
    serving = "serves" if worker.is_serving else "does not serve"
    shown = "; shown below" if worker.name == info.worker_name else ""
    return (
        f"  worker {worker.name} ({', '.join(worker.devices)}) {serving}, active direct connections: "
        f"{worker.active_connections_count}{shown}"
    )


def _counts_lines(counts: ServerCounts) -> list[str]:
    return [
        f"  up {format_duration(counts.uptime_us / 1e6)}; sessions: {counts.sessions_count}; direct connections: "
        f"{counts.direct_connections_count}; borrowers of memory: {counts.borrowers_count}; streams: "
        f"{counts.running_streams_count} running, {counts.waiting_streams_count} waiting",
        *map(_method_line, counts.methods),
        *map(_stage_line, counts.stages),
        *(
            f"    {each.name}: {format_bytes(each.used_bytes)} of {format_bytes(each.limit_bytes)} in use"
            for each in counts.memory
        ),
    ]


def _method_line(counts: MethodCounts) -> str:
    ended = "".join(f"{count} {status}, " for status, count in counts.ended.items())
    return (
        f"    {counts.method} by {counts.transport}: {ended}{counts.running_count} running, "
        f"{format_bytes(counts.received_bytes)} in, {format_bytes(counts.sent_bytes)} out"
    )


def _stage_line(times: StageTimes) -> str:
    mean_ms = times.total_us / max(times.count, 1) / 1e3
    p50_ms, p99_ms = (quantile_us(times.counts, part) / 1e3 for part in (0.5, 0.99))
    return (
        f"    {times.stage}: {times.count} calls, {mean_ms:.2f} ms on average, p50 {p50_ms:.2f} ms, "
        f"p99 {p99_ms:.2f} ms"
    )


def _device_lines(device: DeviceDescription, counts: ServerCounts | None) -> list[str]:
    threads = f", {device.threads_count} threads" if device.threads_count else ""
    busy = (
        ""
        if counts is None
        else f", {format_part(device.busy_us / counts.uptime_us)} of the time busy"
    )
    calls = f"{device.running_calls_count} running, {device.waiting_calls_count} waiting"
    return [
        f"  {device.id}: {device.name}, {_format_gibibytes(device.memory_bytes)}{threads}",
        f"    calls: {calls}{busy}",
        f"    memory: {_format_gibibytes(device.used_bytes)} of {_format_gibibytes(device.budget_bytes)} in use",
        *(
            f"    {cache.name}: {cache.count} entries, {cache.size_bytes} of {cache.limit_bytes} bytes, "
            f"{cache.hits_count} hits, {cache.misses_count} misses, {cache.evictions_count} evictions"
            for cache in device.caches
        ),
    ]


def _format_gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
