"""What click lacks for deconvd-server: sizes, seconds, ids, and a variable in the environment for each option."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Final

import click

from deconvd.command_line import ENVVAR_PREFIX, CliCommand, envvar_of
from deconvd.host.system import MAX_TIMEOUT_S

__all__ = [
    "LAST_ACCOUNT_ID",
    "ByteSize",
    "Seconds",
    "ServerCommand",
    "is_account_id",
    "unknown_variables",
]

LAST_ACCOUNT_ID: Final = 2**32 - 2
"""The largest id of a user or a group: the system uses the next one, -1, for "no change"."""

_ACCOUNT_ID = re.compile(r"[0-9]{1,10}")

_SIZE = re.compile(r"(?P<count>[0-9]+)(?P<unit>[kKMGT]?|[KMGT]i)")
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_MOST_BYTES = 2**63 - 1
"""The largest number of bytes that a message of the schema can tell."""

_CLIENT_VARIABLES = frozenset(
    {
        "DECONVD_CLIENT_CERT",
        "DECONVD_CLIENT_KEY",
        "DECONVD_TARGET",
        "DECONVD_TENANT_KEY",
        "DECONVD_TLS_CA",
        "DECONVD_TOKEN",
        "DECONVD_TOKEN_FILE",
    }
)
_KUBERNETES_VARIABLES = re.compile(
    r"DECONVD_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Variables that Kubernetes sets in every container where a Service has the name deconvd."""


class ServerCommand(CliCommand, click.Group):
    """A command whose options can all be set in the environment, by a variable with the option's own name.

    It has further commands, with options of their own.

    click would name the variable after the Python parameter instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.settable:
            option.envvar = envvar_of(option)

    @property
    def settable(self) -> list[click.Option]:
        """The options that set something: all but --version and --help."""
        return [o for o in self.params if isinstance(o, click.Option) and o.expose_value]

    @property
    def variables(self) -> list[str]:
        """The environment variables of all options."""
        return [envvar_of(option) for option in self.settable]


class ByteSize(click.IntRange):
    """A number of bytes: ``4096``, ``512M`` (times 10^6) or ``4Gi`` (times 2^30)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(
                f"{value!r} is not a size: a whole number of bytes, or one with k, M, G or T "
                "(powers of 1000) or Ki, Mi, Gi or Ti (powers of 1024), as in 4G or 512Mi",
                param,
                ctx,
            )
        unit = match["unit"].upper()
        base = 1024 if unit.endswith("I") else 1000
        size_bytes = int(match["count"]) * base ** _UNITS[unit.removesuffix("I")]
        if size_bytes > _MOST_BYTES:
            self.fail(f"{value!r} is more than {_MOST_BYTES} bytes", param, ctx)
        return int(super().convert(size_bytes, param, ctx))


class Seconds(click.FloatRange):
    """A time in seconds that can be waited for."""

    name = "number of seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            is_finite = math.isfinite(float(value))
        except ValueError:
            is_finite = False
        if not is_finite or float(value) > MAX_TIMEOUT_S:
            lower = f"above {self.min}" if self.min_open else f"from {self.min}"
            self.fail(
                f"{value!r} is not a number of seconds {lower} up to {MAX_TIMEOUT_S:.0f}",
                param,
                ctx,
            )
        return float(super().convert(value, param, ctx))


def unknown_variables(names: Iterable[str], known: list[str]) -> list[str]:
    """Return the environment variables that look like options and are not, each with the option that is nearest.

    Args:
        names: The names of all environment variables.
        known: The variables of the options.

    Variables of the client are left out, and those that Kubernetes sets for a Service with the name deconvd.
    """
    unknown = sorted(
        name
        for name in names
        if name.startswith(ENVVAR_PREFIX)
        and name not in _CLIENT_VARIABLES.union(known)
        and not _KUBERNETES_VARIABLES.fullmatch(name)
    )
    # Compared without the prefix: it would make all of them look alike.
    by_suffix = {name.removeprefix(ENVVAR_PREFIX): name for name in known}
    described = []
    for name in unknown:
        matches = get_close_matches(name.removeprefix(ENVVAR_PREFIX), by_suffix, 1)
        described.append(f"{name} (did you mean {by_suffix[matches[0]]}?)" if matches else name)
    return described


def is_account_id(text: str) -> bool:
    """Return whether a text is the id of a user or a group."""
    return _ACCOUNT_ID.fullmatch(text) is not None and int(text) <= LAST_ACCOUNT_ID
