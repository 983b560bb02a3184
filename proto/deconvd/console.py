"""What both commands need of a console: standard streams that are there, and take whatever is printed."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Any, Final, TextIO

import click

__all__ = ["ConsoleCommand", "ConsoleGroup", "discard_output"]

_STANDARD_DESCRIPTORS: Final = (0, 1, 2)


class ConsoleCommand(click.Command):
    """A command for standard streams of any encoding, open, closed or full.

    It ends with one line, not a traceback, if its output cannot be written.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        _prepare_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _is_output_error(error):
                raise
            _print_error(f"Error: cannot write to standard output: {error.strerror}")
            sys.exit(1)
        finally:
            _flush_or_discard()


class ConsoleGroup(ConsoleCommand, click.Group):
    """A group of commands, likewise."""


def _prepare_streams() -> None:
    """Let standard output and error take any text, and be there.

    What their encoding lacks is written as an escape. Where one is closed, what is written goes
    nowhere: else the next file or socket to be opened would have its number, and get the output.
    """
    for descriptor in _STANDARD_DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout = sys.stdout or _open_devnull()
    sys.stderr = sys.stderr or _open_devnull()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Have standard output go nowhere from now on, with what could not be written yet."""
    _discard(sys.stdout, 1)


def _print_error(text: str) -> None:
    with suppress(OSError):  # standard error may be as full
        click.echo(text, err=True)


def _flush_or_discard() -> None:
    """Forget what cannot be written, or Python would try again at exit and end with a code of its own."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            _discard(stream, descriptor)


def _discard(stream: TextIO, descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    stream.flush()


def _is_output_error(error: OSError) -> bool:
    """Return whether an error was raised by click's own printing."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_code is click.echo.__code__


def _open_devnull() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # for as long as the process runs
