"""Connections to servers behind slow links, in network namespaces of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import deconvd_client
from benchmarks.links.namespaces import LinkUnavailableError, linked_namespace
from deconvd_client import Connection
from tests.servers import server_process

__all__ = ["slow_link_to_server"]


@contextmanager
def slow_link_to_server(directory: Path, transport: str, rate_gbit: float) -> Iterator[Connection]:
    """Connect to a server in another network namespace, over a link of that rate.

    The test is skipped where no such link can be made.
    """
    with ExitStack() as stack:
        try:
            link = stack.enter_context(linked_namespace(rate_gbit))
        except LinkUnavailableError as error:
            pytest.skip(f"no slow link may be made here: {error}")
        listen = (f"{link.server_address}:0",)
        server = stack.enter_context(
            server_process(directory, "--insecure", listen=listen, within=link)
        )
        yield stack.enter_context(deconvd_client.connect(server.target, transport=transport))
