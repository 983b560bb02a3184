"""Draws what the dashboard shows of a server under load: ``python -m benchmarks.monitoring -o docs/dashboard.svg``.

It starts a server, clients of two tenants, and Debian's Prometheus. In the middle one tenant floods the server. It
takes about a minute.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click

from benchmarks.monitoring.configuration import SCRAPE_S, quick_configuration
from benchmarks.monitoring.load import Load, flood, jobs_of, refusals_of
from benchmarks.monitoring.picture import draw, read_main_panels
from benchmarks.monitoring.prometheus import prometheus_process
from benchmarks.monitoring.watched_server import watched_server

_RANGE_S: Final = 6 * SCRAPE_S
"""Over how long rates are averaged."""


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="An SVG file.")
@click.option(
    "--phase-s", default=15.0, show_default=True, help="How long it is calm, and then not."
)
def main(output: Path, phase_s: float) -> None:
    """Start a server and Prometheus, and draw the main panels before, during and after the flood of a tenant."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        server = stack.enter_context(watched_server(directory))
        configuration = quick_configuration(directory, server)
        prometheus = stack.enter_context(prometheus_process(directory, configuration))
        jobs = stack.enter_context(jobs_of(server))
        flooding = [
            stack.enter_context(flood(server, "bob")),
            stack.enter_context(refusals_of(server, "bob")),
        ]
        with Load(jobs):
            while not prometheus.query("deconvd_calls_total"):
                time.sleep(SCRAPE_S)
            time.sleep(_RANGE_S)  # rates need a past
            begin_s = time.time()
            time.sleep(phase_s)
            flood_s = time.time()
            with Load(flooding):
                time.sleep(phase_s)
            flooded_s = time.time()
            time.sleep(phase_s)
        spans = {"bob floods": (flood_s, flooded_s)}
        end_s = time.time() - SCRAPE_S
        panels = read_main_panels(prometheus, (begin_s, end_s), _RANGE_S, server.metrics_address)
        draw(panels, spans, begin_s, output)


if __name__ == "__main__":
    main()
