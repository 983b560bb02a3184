"""What the commands deconvd and deconvd-server share: a wrong option ends both alike."""

from __future__ import annotations

from typing import Any, Final

import click
from click.core import ParameterSource

from deconvd import console
from deconvd.errors import InvalidArgumentError

__all__ = ["ENVVAR_PREFIX", "CliCommand", "envvar_of"]

ENVVAR_PREFIX: Final = "DECONVD_"
"""What the names of all environment variables begin with."""


class CliCommand(console.ConsoleCommand):
    """A command that exits with 2 if an option is wrong, and names the variable that it came from.

    An InvalidArgumentError that the command raises counts as a wrong option if its `argument` is one.
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


def envvar_of(option: click.Option) -> str:
    """Return the environment variable of an option: ``DECONVD_DIRECT_PORT`` for ``--direct-port``."""
    return ENVVAR_PREFIX + _argument_names(option)[0].upper()


def _argument_names(option: click.Option) -> list[str]:
    """Return the names of an option, each as that of a Python argument: ``direct_port``."""
    long = [name for name in option.opts if name.startswith("--")]
    return [name.removeprefix("--").replace("-", "_") for name in long]


def _param_hint(parameter: click.Parameter, ctx: click.Context) -> str:
    """Return what to call a parameter whose value is wrong: the variable, if it came from there."""
    source = ctx.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT and isinstance(parameter.envvar, str):
        return parameter.envvar
    return parameter.get_error_hint(ctx)
