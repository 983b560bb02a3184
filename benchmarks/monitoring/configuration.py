"""The sample files of deploy/ for a server of a benchmark or a test: minutes in them become less than a second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.monitoring.watched_server import READER, WatchedServer

__all__ = ["RULES", "SCRAPE_S", "quick_configuration"]

_DEPLOY: Final = Path(__file__).parents[2] / "deploy"

RULES: Final = _DEPLOY / "prometheus-rules.yaml"

SCRAPE_S: Final = 0.5
"""How often Prometheus reads metrics and tries its rules."""


def quick_configuration(
    directory: Path, server: WatchedServer, absent_targets: Sequence[str] = ()
) -> str:
    """Return the sample configuration for a server. Its alerts fire at once.

    Args:
        directory: Where a copy of the rules goes: a directory that exists.
        absent_targets: Further servers that it is told of, ``host:port``, where there is none.
    """
    rules = directory / "rules.yaml"
    rules.write_text(re.sub(r"\bfor: \d+m\b", "for: 0s", RULES.read_text()))
    text = (_DEPLOY / "prometheus.yaml").read_text()
    targets = ", ".join(f'"{target}"' for target in (server.metrics_address, *absent_targets))
    for documented, ours in (
        ("scrape_interval: 15s", f"scrape_interval: {SCRAPE_S * 1000:.0f}ms"),
        ("evaluation_interval: 15s", f"evaluation_interval: {SCRAPE_S * 1000:.0f}ms"),
        ("[prometheus-rules.yaml]", f"[{rules}]"),
        ("/etc/prometheus/deconvd.token", str(server.token_files[READER])),
        ("/etc/prometheus/deconvd-ca.pem", str(server.ca)),
        ('"gpu-host:9464"', targets),
    ):
        assert documented in text, documented
        text = text.replace(documented, ours)
    return text
