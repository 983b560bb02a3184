"""Scrapes of a server's metrics, as Prometheus makes them, for tests from the outside."""

from __future__ import annotations

import socket
import ssl
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import ServerProcess

__all__ = ["Scrape", "metrics_address", "raw_answer", "scrape", "trusting"]

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Scrape:
    """What a server has answered.

    Attributes:
        status: The code.
        headers: By their names in small letters.
        body: The body as it came.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def families(self) -> Sequence[Metric]:
        """The metrics, as the parser of prometheus-client reads them."""
        assert self.status == 200, self.body
        return list(text_string_to_metric_families(self.body.decode()))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have a name and these labels, and perhaps others."""
        return sum(
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and sample.labels.items() >= labels.items()
        )

    def label_values(self, name: str, label: str) -> set[str]:
        """Return the values that a label has in the samples of a name."""
        return {
            sample.labels[label]
            for family in self.families
            for sample in family.samples
            if sample.name == name
        }


def metrics_address(server: ServerProcess) -> str:
    """Return where a server that was given ``--metrics-port`` serves metrics: its next line says it."""
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    address, _, _ = line.removeprefix("deconvd-server: metrics on ").partition(" (")
    assert address != line, line
    return address


def trusting(ca: Path, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Return the TLS of a scraper that trusts an authority, and may show a certificate."""
    context = ssl.create_default_context(cafile=ca)
    if client is not None:
        context.load_cert_chain(*client)
    return context


def scrape(
    address: str,
    path: str = "/metrics",
    *,
    method: str = "GET",
    token: str = "",
    tls: ssl.SSLContext | None = None,
    headers: Mapping[str, str] | None = None,
) -> Scrape:
    """Ask once, and return the answer, which may be an error's."""
    request = urllib.request.Request(
        f"http{'s' if tls else ''}://{address}{path}", method=method, headers={**(headers or {})}
    )
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=tls) as answer:
            return Scrape(answer.status, _lowered(answer.headers), answer.read())
    except HTTPError as error:
        with error:
            return Scrape(error.code, _lowered(error.headers), error.read())


def raw_answer(address: str, *parts: bytes, is_ended: bool = False) -> bytes:
    """Send bytes, and return all that comes until the server closes the connection; empty if it resets it.

    Args:
        is_ended: Whether to say after the last part that no more comes.
    """
    host, _, port = address.rpartition(":")
    answer = bytearray()
    try:
        with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
            with suppress(ConnectionError):  # it may have answered, and closed, before it has all
                for part in parts:
                    connection.sendall(part)
                if is_ended:
                    connection.shutdown(socket.SHUT_WR)
            while received := connection.recv(1 << 16):
                answer += received
    except ConnectionError:
        return bytes(answer)
    return bytes(answer)


def _lowered(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
