"""The part of HTTP that a scrape needs, without I/O: what a request asks for, and the bytes of a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from io import BytesIO
from typing import Final, NamedTuple
from urllib.parse import urlsplit

__all__ = [
    "BadRequestError",
    "Request",
    "accepted_encodings",
    "accepted_formats",
    "find_end",
    "parse_head",
    "response",
]

_MAX_HEAD_BYTES: Final = 16 << 10
"""The largest head of a request. Prometheus sends some 400 bytes, and a long token is 512."""

_PATH: Final = "/metrics"
_METHODS: Final = ("GET", "HEAD")
_VERSIONS: Final = ("HTTP/1.0", "HTTP/1.1")
_FORMAT_VERSION: Final = re.compile(r"version=\d{1,3}(\.\d{1,3}){0,2}", re.ASCII)

_IS_REFUSED: Final = re.compile(r";\s*q=0(\.0*)?\s*$", re.ASCII | re.IGNORECASE)


class BadRequestError(Exception):
    """A request asks for nothing that there is.

    Attributes:
        status: What to answer.
    """

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Request(NamedTuple):
    """A request for the metrics.

    Attributes:
        is_head: Whether only the head of the response is wanted.
        headers: Its headers.
    """

    is_head: bool
    headers: Message


def find_end(data: bytes | bytearray) -> int:
    """Return where the head at the start of some data ends, behind its empty line; 0 if it has not come to its end.

    Raises:
        BadRequestError: It is too long.
    """
    ends = [at + len(end) for end in (b"\r\n\r\n", b"\n\n") if (at := data.find(end)) >= 0]
    end = min(ends, default=0)
    if max(end, len(data) if not end else 0) > _MAX_HEAD_BYTES:
        raise BadRequestError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the head of a request may have {_MAX_HEAD_BYTES} bytes",
        )
    return end


def parse_head(head: bytes) -> Request:
    """Return what a complete head asks for.

    Raises:
        BadRequestError: It asks for nothing that there is.
    """
    line, _, rest = head.partition(b"\n")
    words = line.decode("latin-1").rstrip("\r").split(" ")
    if len(words) != 3 or words[2] not in _VERSIONS:
        raise BadRequestError(
            HTTPStatus.BAD_REQUEST, "the first line must be like GET /metrics HTTP/1.1"
        )
    method, target, _ = words
    try:
        path = urlsplit(target).path
        headers = parse_headers(BytesIO(rest))
    except (ValueError, HTTPException):
        raise BadRequestError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1") from None
    if path != _PATH:
        raise BadRequestError(HTTPStatus.NOT_FOUND, f"there is nothing here but {_PATH}")
    if method not in _METHODS:
        raise BadRequestError(
            HTTPStatus.METHOD_NOT_ALLOWED, f"{_PATH} can be read, by {' or '.join(_METHODS)}"
        )
    return Request(method == "HEAD", headers)


def accepted_formats(headers: Message) -> str:
    """Return the formats that a scraper accepts, but for those with a version that is none.

    prometheus-client compares versions as numbers, and repeats them in its answer.
    """
    formats = str(headers.get("Accept", "")).split(",")
    return ",".join(filter(_is_format, formats))


def accepted_encodings(headers: Message) -> str:
    """Return the encodings that a scraper accepts, but for those that it refuses by a weight of 0.

    prometheus-client does not look at weights.
    """
    encodings = str(headers.get("Accept-Encoding", "")).split(",")
    return ",".join(each for each in encodings if not _IS_REFUSED.search(each))


def _is_format(text: str) -> bool:
    parameters = map(str.strip, text.split(";"))
    return all(
        _FORMAT_VERSION.fullmatch(each) for each in parameters if each.startswith("version=")
    )


def response(
    status: str, headers: Sequence[tuple[str, str]], body: bytes, *, is_head: bool = False
) -> bytes:
    """Return the bytes of a response, after which the connection ends.

    Args:
        status: The code and its reason, as in ``200 OK``.
        headers: What there is to say in addition to the size of the body.
        is_head: Whether to leave the body out.
    """
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{name}: {value}" for name, value in headers),
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + (b"" if is_head else body)
