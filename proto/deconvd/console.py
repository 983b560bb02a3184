"""Standard streams for both commands: always open, and able to print any text."""

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
    """A command that works with standard streams of any encoding, even if they are closed or their disk is full.

    If its output cannot be written, it exits with code 1 and one line on standard error, without a traceback.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command."""
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
    """A group of commands with the same guarantees."""


def _prepare_streams() -> None:
    """Make standard output and standard error open, and able to write any text.

    Letters that the encoding does not have are written as escapes. A closed stream is replaced by the null device:
    otherwise the next file or socket that the process opens would get the stream's number, and its output.
    """
    for descriptor in _STANDARD_DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # open() returns the lowest free number, which is this one
    sys.stdout = sys.stdout or _open_descriptor(1)
    sys.stderr = sys.stderr or _open_descriptor(2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Redirect standard output to the null device, including text that is still buffered."""
    _discard(sys.stdout, 1)


def _print_error(text: str) -> None:
    with suppress(OSError):  # the disk of standard error may be full, too
        click.echo(text, err=True)


def _flush_or_discard() -> None:
    """Flush both streams, and discard what cannot be written.

    Otherwise Python would try to flush again at exit, and would exit with another code.
    """
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            _discard(stream, descriptor)


def _discard(stream: TextIO, descriptor: int) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)
    stream.flush()


def _is_output_error(error: OSError) -> bool:
    """Return whether click's echo raised the error: then standard output failed, not a file of the command."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_code is click.echo.__code__


def _open_descriptor(descriptor: int) -> TextIO:
    return open(
        descriptor, "w", encoding="utf-8", closefd=False
    )  # it stays open until the process ends
