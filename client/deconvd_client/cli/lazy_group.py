"""A group of commands whose modules are imported when one of them runs."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem

from deconvd.console import ConsoleGroup

__all__ = ["LazyCommand", "LazyGroup"]


_INTERRUPTED: Final = 128 + signal.SIGINT


class LazyCommand(NamedTuple):
    """Where a command is.

    Attributes:
        module_name: Its module in the group's package. The function has the same name.
        summary: Its line in the help of the group: the first sentence of its own help.
    """

    module_name: str
    summary: str


class LazyGroup(ConsoleGroup):
    """A group of commands that are imported when they run.

    The group's help, and the completion of a command's name in a shell, import none of them.

    Args:
        package: The package of the commands' modules.
        lazy_commands: The commands by their names.
    """

    def __init__(
        self,
        *args: Any,
        package: str,
        lazy_commands: Mapping[str, LazyCommand],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._package = package
        self._lazy_commands = lazy_commands

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Ctrl-C ends it with the exit code that shells expect, without a traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(_INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return sorted(self._lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; return None if there is none of this name."""
        lazy = self._lazy_commands.get(cmd_name)
        if lazy is None:
            return None
        command = getattr(import_module(f"{self._package}.{lazy.module_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands into the help."""
        rows = [(name, self._lazy_commands[name].summary) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands, or the group's options, that begin with `incomplete`."""
        commands = [
            CompletionItem(name, help=self._lazy_commands[name].summary)
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]
