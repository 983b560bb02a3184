"""The load of a server as tables that take a terminal's whole screen. Needs the package rich."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deconvd_client.cli.formats import format_bytes, format_duration, format_part
from deconvd_client.cli.load_lines import Reading
from deconvd_client.cli.load_rates import LoadRates

__all__ = ["LiveTable"]

_METHODS_COUNT: Final = 6
"""How many kinds of calls are shown, those with most calls: the tables below them must fit on the screen, too."""


class LiveTable:
    """Shows readings on the screen for the length of a block, each in place of the one before."""

    def __init__(self) -> None:
        self._live = Live(
            Text("waiting for the first interval"),
            console=Console(),
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        self._live.refresh()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(exc_type, error, traceback)

    def show(self, reading: Reading) -> None:
        """Show a reading."""
        self._live.update(Group(*_render(reading)), refresh=True)


def _render(reading: Reading) -> Iterator[RenderableType]:
    rates = reading.rates
    head = f"{reading.target}  {reading.time:%H:%M:%S}"
    if reading.error is not None:
        yield Text(head, "bold")
        yield Text(f"away: {reading.error}", "bold red")
    elif rates is None:
        yield Text(head, "bold")
        yield Text("It answers, its rates follow.")
    else:
        yield Text(f"{head}  {_describe(rates)}", "bold")
        if rates.methods is None:
            yield Text("This server is too old to count calls.")
        else:
            yield _methods_table(rates)
            yield _stages_table(rates)
        yield _devices_table(rates)
        if any(device.caches for device in rates.devices):
            yield _caches_table(rates)
        if rates.memory is not None:
            yield _memory_table(rates)


def _describe(rates: LoadRates) -> str:
    words = [f"deconvd {rates.version}"]
    if rates.uptime_s is not None:
        started = "restarted" if rates.is_restarted else "up"
        words += [
            f"{started} {format_duration(rates.uptime_s)}",
            f"{rates.calls_per_s:.1f} calls/s",
            f"sessions: {rates.sessions_count}",
            f"direct connections: {rates.direct_connections_count}",
            f"borrowers of memory: {rates.borrowers_count}",
            f"streams: {rates.running_streams_count} running, {rates.waiting_streams_count} waiting",
        ]
    return "; ".join(words)


def _make_table(*names: str, texts_count: int = 1) -> Table:
    """Return a table whose first columns are text, and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", title="")
    for index, name in enumerate(names):
        table.add_column(
            name, justify="left" if index < texts_count else "right", no_wrap=True, min_width=8
        )
    return table


def _methods_table(rates: LoadRates) -> Table:
    table = _make_table(
        *("call", "by", "calls/s", "failed/s", "running", "in/s", "out/s", "failures"),
        texts_count=2,
    )
    methods = sorted(rates.methods or (), key=lambda each: -each.calls_per_s)  # else by name
    for each in methods[:_METHODS_COUNT]:
        failures = ", ".join(f"{count} {status}" for status, count in each.failures.items())
        table.add_row(
            each.method,
            each.transport,
            f"{each.calls_per_s:.1f}",
            f"{each.failures_per_s:.1f}",
            str(each.running_count),
            format_bytes(each.received_bytes_per_s),
            format_bytes(each.sent_bytes_per_s),
            Text(failures, "red"),
        )
    if len(methods) > _METHODS_COUNT:
        table.add_row(f"and {len(methods) - _METHODS_COUNT} kinds of calls with no more")
    return table


def _stages_table(rates: LoadRates) -> Table:
    table = _make_table("stage", "calls", "mean ms", "p50 ms", "p99 ms")
    for each in rates.stages or ():
        times = (f"{time_ms:.2f}" for time_ms in (each.mean_ms, each.p50_ms, each.p99_ms))
        table.add_row(each.stage, str(each.calls_count), *times)
    return table


def _devices_table(rates: LoadRates) -> Table:
    table = _make_table("device", "busy", "running", "waiting", "memory", "of")
    for each in rates.devices:
        table.add_row(
            f"{each.id}: {each.name}",
            format_part(each.busy_part),
            str(each.running_calls_count),
            str(each.waiting_calls_count),
            format_bytes(each.used_bytes),
            format_bytes(each.budget_bytes),
        )
    return table


def _caches_table(rates: LoadRates) -> Table:
    table = _make_table("cache", "entries", "size", "of", "hits", "evictions/s")
    for device in rates.devices:
        for each in device.caches:
            table.add_row(
                f"{device.id}: {each.name}",
                str(each.count),
                format_bytes(each.size_bytes),
                format_bytes(each.limit_bytes),
                format_part(each.hit_part),
                f"{each.evictions_per_s:.1f}",
            )
    return table


def _memory_table(rates: LoadRates) -> Table:
    table = _make_table("host memory", "used", "of")
    for each in rates.memory or ():
        table.add_row(each.name, format_bytes(each.used_bytes), format_bytes(each.limit_bytes))
    return table
