"""When a certificate ends, as read from its bytes: beside what `ssl` and `cryptography` say."""

from __future__ import annotations

import datetime
import math

import pytest

from deconvd_server.access.certificate_end import certificate_end_s
from tests.certificates import Authority


@pytest.mark.parametrize("year", [1999, 2001, 2049, 2050, 9999])  # two digits until 2049
def test_the_end_is_that_of_the_certificate(authority: Authority, year: int) -> None:
    end = datetime.datetime(year, 12, 31, 23, 59, 58, tzinfo=datetime.UTC)
    begin = datetime.datetime(1998, 1, 1, tzinfo=datetime.UTC)
    files = authority.issue("client.example", not_before=begin, not_after=end)

    assert certificate_end_s(files.cert.read_bytes()) == end.timestamp()


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_what_cannot_be_read_has_ended(authority: Authority, cut: int) -> None:
    pem = authority.issue("client.example").cert.read_bytes()
    lines = pem.splitlines(keepends=True)

    assert certificate_end_s(b"".join([*lines[:cut], lines[-1]])) == -math.inf
