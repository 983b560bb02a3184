"""The base of both commands: options can come from the environment, and errors say what is wrong and what allowed."""

from __future__ import annotations

import os
from typing import Any, Final

import click
from click.core import ParameterSource

from deconvd import console
from deconvd.errors import InvalidArgumentError

__all__ = ["ENVVAR_PREFIX", "CliCommand", "NamedPath", "WholeNumber", "envvar_of"]

ENVVAR_PREFIX: Final = "DECONVD_"
"""Prefix of all environment variables that set an option."""


class CliCommand(console.ConsoleCommand):
    """A command that exits with code 2 if an option is wrong.

    The error names the option, or the environment variable if the value came from there. An InvalidArgumentError
    of the command is reported in the same way if its `argument` is one of the options.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line and the environment."""
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and error.param_hint is None:
                error.param_hint = _param_hint(error.param, ctx)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InvalidArgumentError as error:
            for option in self.params:
                if isinstance(option, click.Option) and error.argument in _argument_names(option):
                    hint = _param_hint(option, ctx)
                    raise click.BadParameter(str(error), ctx, option, hint) from None
            raise click.ClickException(str(error)) from None


class WholeNumber(click.IntRange):
    """An integer in a range. Of what is no number click tells only that it is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        try:
            int(value)
        except ValueError:
            upper = "" if self.max is None else f" up to {self.max}"
            self.fail(f"{value!r} is not a whole number from {self.min}{upper}", param, ctx)
        return int(super().convert(value, param, ctx))


class NamedPath(click.Path):
    """A file or a folder. An empty name, as an unset variable of a shell leaves it, would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not os.fspath(value):
            self.fail(
                f"it must name a {'file' if self.file_okay else 'folder'}, got ''", param, ctx
            )
        return super().convert(value, param, ctx)


def envvar_of(option: click.Option) -> str:
    """Return the environment variable that sets an option: ``DECONVD_DIRECT_PORT`` for ``--direct-port``."""
    return ENVVAR_PREFIX + _argument_names(option)[0].upper()


def _argument_names(option: click.Option) -> list[str]:
    """Return an option's long names, as names of Python arguments: ``direct_port`` for ``--direct-port``."""
    long = [name for name in option.opts if name.startswith("--")]
    return [name.removeprefix("--").replace("-", "_") for name in long]


def _param_hint(parameter: click.Parameter, ctx: click.Context) -> str:
    """Return the name for a parameter in errors: the environment variable if the value came from there."""
    source = ctx.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT and isinstance(parameter.envvar, str):
        return parameter.envvar
    return parameter.get_error_hint(ctx)
