"""The options of deconvd-server that say what it logs, and how."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TextIO, TypeVar

import click

from deconvd_server.log_handler import LogHandler
from deconvd_server.log_stream import LogStream
from deconvd_server.log_text import JsonLogFormatter, LogFormatter

__all__ = ["add_log_options", "log_to_standard_error"]

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS: Final = (
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        help="The least severe messages to log, on standard error.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="text: a line for each message; json: an object on a line for each message.",
    ),
    click.option(
        "--access-log/--no-access-log",
        "logs_access",
        default=False,
        help="Whether to log each call: method, peer, caller, request id, status, shapes, bytes each way and times.",
    ),
)


def add_log_options(command: _F) -> _F:
    """Give a command the options that say what the server logs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def log_to_standard_error(level: str, log_format: str, worker: str = "") -> LogHandler:
    """Log to standard error from now on, and return what writes there.

    Args:
        level: The least severe messages to log.
        log_format: ``text`` or ``json``.
        worker: This process's name among those that write to the same log; empty if it is alone.
    """
    handler = LogHandler(_standard_error())
    handler.setFormatter(JsonLogFormatter(worker) if log_format == "json" else LogFormatter(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    return handler


def _standard_error() -> TextIO | LogStream:
    with suppress(AttributeError, OSError):  # closed, or not a file: a test's
        return LogStream(sys.stderr.fileno(), sys.stderr.encoding)
    return sys.stderr
