"""The lines on standard output that say where the server listens, and who may call: programs read them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from deconvd.console import discard_output
from deconvd.host.startup_line import health_line, metrics_line, startup_line
from deconvd_server.access_options import AccessPolicy

__all__ = ["print_addresses"]

_log = logging.getLogger("deconvd_server")


def print_addresses(
    addresses: Iterable[str],
    health_addresses: Iterable[str],
    metrics_addresses: Iterable[str],
    policy: AccessPolicy,
    readers: Collection[str],
) -> None:
    """Print a line for each address. If that fails, the server serves all the same.

    Args:
        addresses: Where calls are served.
        health_addresses: Where health alone is served.
        metrics_addresses: Where metrics are served.
        readers: The names that see all metrics.
    """
    try:
        for address in addresses:
            print(startup_line(address, policy.describe(address)), flush=True)
        for address in health_addresses:
            print(health_line(address), flush=True)
        for address in metrics_addresses:
            print(metrics_line(address, policy.describe_readers(address, readers)), flush=True)
    except OSError as error:
        _log.warning("cannot print the addresses to standard output: %s", error.strerror)
        discard_output()
