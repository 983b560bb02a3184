"""Requests for metrics, as they come from strangers: each is answered, or told what is wrong with it."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from prometheus_client import CollectorRegistry

from deconvd.errors import UnauthenticatedError
from deconvd_server.access.bearer_token import bearer_token
from deconvd_server.metrics.request import BadRequestError, find_end, parse_head
from deconvd_server.metrics.server import metrics_response
from tests.fuzz.case import Case, Seed
from tests.fuzz.frames import TOKEN
from tests.fuzz.target import Target

__all__ = ["Scrapes"]

_HEADERS: Final = (
    b"Host: 127.0.0.1:9464",
    b"User-Agent: Prometheus/3.5.0",
    b"Accept: application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    b"text/plain;version=0.0.4;q=0.4,*/*;q=0.2",
    b"Accept-Encoding: gzip;q=0.5, identity",
    f"Authorization: Bearer {TOKEN}".encode(),
)


class Scrapes(Target):
    """The head of a request, byte by byte."""

    seeds = (
        Seed("lines", [b"GET /metrics HTTP/1.1", *_HEADERS, b"", b""]),
        Seed("lines", [b"HEAD http://host:1/metrics?name[]=a HTTP/1.0", *_HEADERS[:2], b"", b""]),
    )
    bounded_count = 2000
    share = 4

    def feed(self, case: Case) -> None:
        data = b"\r\n".join(case.parts)
        try:
            end = find_end(data)
            request = parse_head(data[:end])
        except BadRequestError:
            return
        with suppress(UnauthenticatedError):
            token = bearer_token(request.headers.get_all("Authorization", []))
            assert token.encode() in data
        head, empty_line, body = metrics_response(request, CollectorRegistry()).partition(
            b"\r\n\r\n"
        )
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert empty_line
        assert bool(body) <= (not request.is_head)
        assert all(b": " in line for line in head.split(b"\r\n")[1:])  # nothing of the request
