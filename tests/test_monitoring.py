"""Prometheus reads a real server under load: every expression of the dashboard and of the rules gives numbers."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from benchmarks.monitoring.configuration import RULES, SCRAPE_S, quick_configuration
from benchmarks.monitoring.grafana import Panel, Target, read_panels
from benchmarks.monitoring.load import Load, flood, jobs_of, refusals_of
from benchmarks.monitoring.picture import MAIN_PANELS, Line, draw, read_main_panels
from benchmarks.monitoring.prometheus import Prometheus, prometheus_process
from benchmarks.monitoring.watched_server import WatchedServer, watched_server
from deconvd.errors import DeconvdError
from tests.faulty_device import FAULTY_SAMPLES_COUNT, PRELUDE
from tests.processes import wait_until
from tests.servers import free_port

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus")

RANGE_S = 10 * SCRAPE_S  # a scrape of a busy server may be late

FAULTY = np.ones((FAULTY_SAMPLES_COUNT, 1, 4, 4), np.float32)
ONE = np.ones((1, 1, 1, 1), np.float32)

TARGETS = [(panel, target) for panel in read_panels() for target in panel.targets]

ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
WORKER_ALERTS = [alert for alert in ALERTS if alert.startswith("DeconvdWorker")]
"""Those of servers of several processes, whose metrics no other server has."""


@dataclass(frozen=True)
class Watched:
    """A server under load, and the Prometheus that reads it.

    Attributes:
        absent: Where Prometheus looks for another server, ``host:port``.
    """

    server: WatchedServer
    prometheus: Prometheus
    absent: str

    def numbers(self, expression: str) -> list[float]:
        """Return the numbers that an expression gives now."""
        return [number for each in self.prometheus.query(expression) for number in each.numbers]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    script = f"{PRELUDE}; from deconvd_server.__main__ import main; main()"
    absent = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        enter = stack.enter_context
        server = enter(watched_server(directory, module=("-c", script)))
        F = enter(deconvd_client.connect(server.unix_target))

        def meet_the_fault() -> None:
            with pytest.raises(DeconvdError, match="unforeseen"):
                F.deconvolution_2d(FAULTY, ONE)

        jobs = [*enter(jobs_of(server)), enter(refusals_of(server, "bob"))]
        enter(Load([*jobs, enter(flood(server, "bob")), *6 * [meet_the_fault]]))
        configuration = quick_configuration(directory, server, [absent])
        prometheus = enter(prometheus_process(directory, configuration))
        yield Watched(server, prometheus, absent)


@pytest.fixture(scope="module")
def watched_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server of two processes, and the Prometheus that reads it."""
    directory = tmp_path_factory.mktemp("workers")
    with (
        watched_server(directory, "--processes=2") as server,
        prometheus_process(directory, quick_configuration(directory, server)) as prometheus,
    ):
        yield Watched(server, prometheus, absent="")


def test_the_sample_configuration_reads_a_server_with_tls_and_a_token(watched: Watched) -> None:
    def health() -> dict[str, str]:
        return {each["labels"]["instance"]: each["health"] for each in watched.prometheus.targets()}

    wait_until(lambda: health().get(watched.server.metrics_address) == "up")
    wait_until(lambda: health().get(watched.absent) == "down")


@pytest.mark.parametrize(
    ("panel", "target"), TARGETS, ids=[f"{p.row}-{p.title}-{t.legend}" for p, t in TARGETS]
)
def test_every_expression_of_the_dashboard_gives_numbers(
    watched: Watched, panel: Panel, target: Target
) -> None:
    expression = target.with_values(RANGE_S)

    wait_until(lambda: bool(watched.numbers(expression)))


@pytest.mark.parametrize("alert", [alert for alert in ALERTS if alert not in WORKER_ALERTS])
def test_every_expression_of_the_rules_gives_numbers(watched: Watched, alert: str) -> None:
    assert_gives_numbers(watched, alert)


@pytest.mark.parametrize("alert", WORKER_ALERTS)
def test_every_expression_for_several_processes_gives_numbers(
    watched_workers: Watched, alert: str
) -> None:
    assert_gives_numbers(watched_workers, alert)


def assert_gives_numbers(watched: Watched, alert: str) -> None:
    (rule,) = [rule for rule in watched.prometheus.rules() if rule["name"] == alert]
    expression = with_results(in_short(rule["query"]))

    wait_until(lambda: bool(watched.numbers(expression)))


@pytest.mark.parametrize(
    "status",
    [
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "OK",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
    ],
)
def test_calls_are_seen_however_they_end(watched: Watched, status: str) -> None:
    expression = f'sum(rate(deconvd_calls_total{{status="{status}"}}[{RANGE_S * 1000:.0f}ms])) > 0'

    wait_until(lambda: bool(watched.numbers(expression)))


@pytest.mark.parametrize("direction", ["received", "sent"])
@pytest.mark.parametrize("transport", ["grpc", "shared_memory", "tcp", "unix"])
def test_bytes_are_seen_however_they_travel(
    watched: Watched, transport: str, direction: str
) -> None:
    metric = f'deconvd_{direction}_bytes_total{{transport="{transport}"}}'
    expression = f"sum(rate({metric}[{RANGE_S * 1000:.0f}ms])) > 0"

    wait_until(lambda: bool(watched.numbers(expression)))


@pytest.mark.parametrize("tenant", ["alice", "bob", ""])
def test_the_reader_sees_the_calls_of_all_tenants(watched: Watched, tenant: str) -> None:
    wait_until(lambda: bool(watched.numbers(f'deconvd_calls_total{{tenant="{tenant}"}} > 0')))


def test_an_alert_fires_for_a_server_that_is_gone_and_not_for_one_that_is_there(
    watched: Watched,
) -> None:
    def firing() -> set[str]:
        alerts = watched.prometheus.query('ALERTS{alertname="DeconvdDown", alertstate="firing"}')
        return {alert.labels["instance"] for alert in alerts}

    up = f'up{{instance="{watched.server.metrics_address}"}} == 1'
    # a scrape of a busy server may be late, and would be an alert for a moment
    wait_until(lambda: bool(watched.numbers(up)) and firing() == {watched.absent})


@pytest.mark.parametrize("alert", ["DeconvdInternalErrors", "DeconvdRefusing"])
def test_an_alert_fires_for_failures(watched: Watched, alert: str) -> None:
    expression = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'

    wait_until(lambda: bool(watched.prometheus.query(expression)))


def test_the_main_panels_can_be_drawn(watched: Watched, tmp_path: Path) -> None:
    def read() -> list[tuple[Panel, list[Line]]]:
        span = time.time() - RANGE_S, time.time()
        instance = watched.server.metrics_address
        return read_main_panels(watched.prometheus, span, RANGE_S, instance)

    wait_until(lambda: all(lines for _, lines in read()))
    panels = read()
    begin_s = panels[0][1][0].series.times_s[0]
    draw(panels, {"a flood": (begin_s + 1, begin_s + 2)}, begin_s, tmp_path / "all.svg")
    for name in ("one.svg", "again.svg"):
        draw(panels[:2], {}, begin_s, tmp_path / name)

    text = (tmp_path / "all.svg").read_text()
    assert all(f">{title}</text>" in text for title in (*MAIN_PANELS, "server cpu limit", "alice"))
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "again.svg").read_text()


def in_short(expression: str) -> str:
    """Return an expression with the ranges of a test."""
    return re.sub(r"\[\d+[smh]\]", f"[{RANGE_S * 1000:.0f}ms]", expression)


def with_results(expression: str) -> str:
    """Return an alert's expression so that it gives 0 where the alert does not fire."""
    compared, count = re.subn(r" (==|>|<) (?=[\d.]+$)", r" \1 bool ", expression)
    assert count == 1, expression
    return compared
