"""A bar for people who wait for a call, drawn by the package rich if it is there and standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deconvd_client.calls.transfer import Transfer

__all__ = ["show_progress"]

_REFRESHES_PER_S = 10


@contextmanager
def show_progress(transfer: Transfer, send_bytes: int, receive_bytes: int) -> Iterator[None]:
    """Show during the block what has been sent and received. Nothing is shown without rich, or without a terminal.

    Args:
        send_bytes: The size of the operands.
        receive_bytes: The size of the results.
    """
    try:
        from rich.console import Console, RenderableType
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )
    except ImportError:  # it is in the extra `cli`
        yield
        return
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_terminal):
        yield
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        auto_refresh=False,
        console=console,
    )
    task = progress.add_task("connecting", total=send_bytes + receive_bytes)

    def render() -> RenderableType:
        sent, received = transfer.sent_bytes, transfer.received_bytes
        progress.update(
            task,
            completed=min(sent, send_bytes) + min(received, receive_bytes),
            description=_describe(sent, received, send_bytes),
        )
        return progress.get_renderable()

    live = Live(
        get_renderable=render,
        console=console,
        refresh_per_second=_REFRESHES_PER_S,
        transient=True,
        redirect_stdout=False,
    )
    with live:
        yield


def _describe(sent_bytes: int, received_bytes: int, send_bytes: int) -> str:
    if received_bytes:
        return "receiving"
    if not sent_bytes:
        return "connecting"
    return "sending" if sent_bytes < send_bytes else "computing"
