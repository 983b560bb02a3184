"""A Prometheus in a process of its own, Debian's or any other that is on PATH, and what it answers."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

__all__ = ["Prometheus", "Series", "find_program", "prometheus_process"]

_TIMEOUT_S: Final = 30.0
_POLL_PERIOD_S: Final = 0.02
_LISTENS: Final = re.compile(r'msg="Listening on".* address=(\S+):(\d+)')


def find_program(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``. Raises FileNotFoundError if it is not on PATH."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"there is no {name}: install Debian's package prometheus")
    return found


@dataclass(frozen=True, slots=True)
class Series:
    """What an expression gave for one set of labels.

    Attributes:
        labels: The labels.
        times_s: When, in seconds of the Unix clock.
        values: The value at each time.
    """

    labels: Mapping[str, str]
    times_s: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def numbers(self) -> list[float]:
        """Those of the values that are numbers: 0 / 0 is none."""
        return [value for value in self.values if math.isfinite(value)]

    @classmethod
    def from_json(cls, result: Mapping[str, Any]) -> Series:
        """Return an element of the result of a query, for an instant or a range."""
        points = result["values"] if "values" in result else [result["value"]]
        return cls(
            result["metric"],
            tuple(float(time_s) for time_s, _ in points),
            tuple(float(value) for _, value in points),
        )


class Prometheus:
    """Asks a Prometheus over its HTTP API. Not thread-safe."""

    def __init__(self, host: str, port: int) -> None:
        self._http = HTTPConnection(host, port, timeout=_TIMEOUT_S)

    def query(self, expression: str) -> list[Series]:
        """Return what an expression gives now: one value for each series."""
        result = self._get("query", query=expression)["result"]
        return [Series.from_json(each) for each in result]

    def query_range(
        self, expression: str, begin_s: float, end_s: float, step_s: float
    ) -> list[Series]:
        """Return what an expression gave from one time of the Unix clock to another, at each step."""
        answer = self._get("query_range", query=expression, start=begin_s, end=end_s, step=step_s)
        return [Series.from_json(each) for each in answer["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """Return the rules that it has loaded, as its API describes them."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """Return what it scrapes, as its API describes it: ``health`` is ``up`` if the last scrape succeeded."""
        targets: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return targets

    def is_ready(self) -> bool:
        """Return whether it answers queries: at first it only listens."""
        self._http.request("GET", "/-/ready")
        response = self._http.getresponse()
        response.read()
        return response.status == HTTPStatus.OK

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _get(self, path: str, **fields: object) -> dict[str, Any]:
        """Return the data of an answer. Raises ValueError if Prometheus refuses the question."""
        self._http.request("GET", f"/api/v1/{path}?{urlencode(fields)}")
        answer: dict[str, Any] = json.loads(self._http.getresponse().read())
        if answer["status"] != "success":
            raise ValueError(f"{answer['error']}: {fields}")
        data: dict[str, Any] = answer["data"]
        return data


@contextmanager
def prometheus_process(directory: Path, configuration: str) -> Iterator[Prometheus]:
    """Run Prometheus for the block, on a free port of the loopback interface.

    Args:
        directory: Where its data, its log and its configuration go: a directory that exists.
        configuration: In YAML.
    """
    config = directory / "prometheus.yaml"
    config.write_text(configuration)
    command = [
        find_program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    log = directory / "prometheus.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={
                **os.environ,
                "GOMAXPROCS": "1",
            },  # the server that is watched needs the processors
        )
    try:
        with closing(Prometheus(*_read_address(process, log))) as prometheus:
            while not prometheus.is_ready():
                time.sleep(_POLL_PERIOD_S)
            yield prometheus
    finally:
        process.kill()
        process.wait()


def _read_address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    """Return where Prometheus listens, once its log says so."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while (found := _LISTENS.search(log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"Prometheus did not start:\n{log.read_text()}")
        time.sleep(_POLL_PERIOD_S)
    return found[1], int(found[2])
