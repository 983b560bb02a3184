"""The load of a server as lines of text for people, and of JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime

from deconvd_client.cli.formats import format_bytes, format_part
from deconvd_client.cli.load_rates import DeviceRates, LoadRates

__all__ = ["Reading", "json_line", "text_line"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of a server at the end of an interval.

    Attributes:
        target: Its address.
        time: When it was asked.
        rates: What it did; None if that is not known (see `rates_between`), or if there is an error.
        error: Why it did not answer; None if it did.
    """

    target: str
    time: datetime
    rates: LoadRates | None = None
    error: str | None = None


def json_line(reading: Reading) -> str:
    """Return a JSON object in one line."""
    fields = {
        "time": reading.time.isoformat(timespec="milliseconds"),
        "target": reading.target,
        "state": "away" if reading.error is not None else "serving",
        "error": reading.error,
    }
    return json.dumps(fields | ({} if reading.rates is None else asdict(reading.rates)))


def text_line(reading: Reading) -> str:
    """Return one line of text."""
    return f"{reading.time:%H:%M:%S}  {_describe(reading)}"


def _describe(reading: Reading) -> str:
    rates = reading.rates
    if reading.error is not None:
        return f"{reading.target} is away: {' '.join(reading.error.split())}"
    if rates is None:
        return f"{reading.target} answers, its rates follow"
    words = ["restarted"] if rates.is_restarted else []
    if rates.methods is not None:
        words += [
            f"{rates.calls_per_s:.1f} calls/s",
            f"{rates.failures_per_s:.1f} failed/s",
            f"{format_bytes(rates.received_bytes_per_s or 0)}/s in",
            f"{format_bytes(rates.sent_bytes_per_s or 0)}/s out",
        ]
    words += [f"{each.stage} {each.mean_ms:.2f} ms" for each in rates.stages or ()]
    return ", ".join([*words, *map(_describe_device, rates.devices)])


def _describe_device(device: DeviceRates) -> str:
    busy = "" if device.busy_part is None else f" {format_part(device.busy_part)} busy,"
    calls = f" {device.running_calls_count} running, {device.waiting_calls_count} waiting,"
    memory = f" {format_bytes(device.used_bytes)} of {format_bytes(device.budget_bytes)}"
    return f"{device.id}:{busy}{calls}{memory}"
