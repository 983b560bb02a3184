"""Checks the arguments of `connect` where they come in, and turns them into plain numbers and strings."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any, Final, SupportsFloat, SupportsIndex

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.host.system import MAX_TIMEOUT_S
from deconvd.model.dtypes import BFLOAT16
from deconvd.model.geometry import parse_sizes, shorten
from deconvd_client.transports.grpc.channel import MAX_MESSAGE_BYTES
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.targets import parse_targets, proxy_of

__all__ = [
    "TARGET_VARIABLE",
    "TENANT_KEY_VARIABLE",
    "parse_dtype",
    "parse_fail_fast",
    "parse_max_concurrent_calls",
    "parse_max_message_bytes",
    "parse_shape",
    "parse_tenant_key",
    "parse_timeout",
    "parse_transport",
    "target_from_environment",
]

TARGET_VARIABLE: Final = "DECONVD_TARGET"
"""The environment variable with the target of connections that are given none."""

TENANT_KEY_VARIABLE: Final = "DECONVD_TENANT_KEY"
"""The environment variable with the tenant key of connections that are given none."""

_MAX_KEY_BYTES: Final = 64
_MAX_SIZE_BITS: Final = 63


def target_from_environment() -> str:
    """Return the targets that the environment names. Raises InvalidArgumentError if it names none, or a wrong one."""
    target = os.environ.get(TARGET_VARIABLE, "")
    if not target:
        raise InvalidArgumentError(
            f"target must be given, as host:port or unix:path, or set by the environment variable {TARGET_VARIABLE}",
            argument="target",
        )
    try:
        return ",".join(parse_targets(target))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{TARGET_VARIABLE}: {error}", argument="target") from None


def parse_timeout(timeout_s: object) -> float:
    """Return a number of seconds as a float, at most `MAX_TIMEOUT_S`.

    Raises:
        InvalidArgumentError: It is not a number, or not positive and finite.
    """
    try:
        seconds = _parse_float(timeout_s)
    except OverflowError:
        seconds = math.inf
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"timeout_s must be a number of seconds, got {timeout_s!r}", argument="timeout_s"
        ) from None
    if not 0 < seconds < math.inf:
        raise InvalidArgumentError(
            f"timeout_s must be positive and finite, got {seconds}", argument="timeout_s"
        )
    return min(seconds, MAX_TIMEOUT_S)


def parse_max_message_bytes(size_bytes: object) -> int:
    """Return a size as an int.

    Raises:
        InvalidArgumentError: It is not an integer, or out of range.
    """
    try:
        size = operator.index(size_bytes)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        size = 0
    if isinstance(size_bytes, bool) or not 1 <= size <= MAX_MESSAGE_BYTES:
        raise InvalidArgumentError(
            f"max_message_bytes must be an int from 1 to {MAX_MESSAGE_BYTES}, got {size_bytes!r}",
            argument="max_message_bytes",
        )
    return size


def parse_max_concurrent_calls(count: object) -> int:
    """Return a number of calls as an int.

    Raises:
        InvalidArgumentError: It is not an integer, or not positive.
    """
    try:
        parsed = operator.index(count)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        parsed = 0
    if isinstance(count, bool) or parsed < 1:
        raise InvalidArgumentError(
            f"max_concurrent_calls must be an int of at least 1, got {count!r}",
            argument="max_concurrent_calls",
        )
    return parsed


def parse_transport(name: object, targets: Sequence[str]) -> TransportName:
    """Return the transport with a name. Raises InvalidArgumentError if there is none, or a target needs another."""
    try:
        transport = TransportName(name)  # type: ignore[arg-type]  # this is the check
    except ValueError:
        raise InvalidArgumentError(
            f"transport must be one of {', '.join(TransportName)}, got {name!r}",
            argument="transport",
        ) from None
    if any(map(proxy_of, targets)) and transport not in (TransportName.AUTO, TransportName.GRPC):
        raise InvalidArgumentError(
            f"transport must be auto or grpc behind a proxy, got {name!r} for {', '.join(targets)}",
            argument="transport",
        )
    return transport


def parse_fail_fast(fail_fast: object) -> bool:
    """Return a bool of Python or numpy as a bool. Raises InvalidArgumentError for anything else."""
    if not isinstance(fail_fast, (bool, np.bool_)):
        raise InvalidArgumentError(
            f"fail_fast must be True or False, got {fail_fast!r}", argument="fail_fast"
        )
    return bool(fail_fast)


def parse_tenant_key(key: object) -> bytes:
    """Return a tenant key as bytes. None means the key in the environment; empty if there is none either.

    Raises:
        InvalidArgumentError: It is neither text nor bytes, or too long. The message does not show it: it is a secret.
    """
    name = "tenant_key"
    if key is None:
        name, key = TENANT_KEY_VARIABLE, os.fsencode(os.environ.get(TENANT_KEY_VARIABLE, ""))
    try:
        secret = key.encode(errors="surrogateescape") if isinstance(key, str) else key
    except UnicodeEncodeError:  # which has the key in an attribute
        given = "a str that UTF-8 cannot encode"
    else:
        if isinstance(secret, bytes) and len(secret) <= _MAX_KEY_BYTES:
            return bytes(secret)
        given = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(key).__name__
    raise InvalidArgumentError(
        f"{name} must be a str or bytes of at most {_MAX_KEY_BYTES} bytes, got {given}",
        argument="tenant_key",
    )


def parse_shape(shape: object) -> tuple[int, ...]:
    """Return a shape, or the size of a single dimension, as a tuple of ints.

    Raises:
        InvalidArgumentError: It is neither an integer nor a sequence of integers, or a size is too large.
    """
    try:
        size = operator.index(shape)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        given = parse_sizes(shape)
        if given is None:
            raise InvalidArgumentError(
                f"shape must be an int or a sequence of ints, got {shorten(shape)}",
                argument="shape",
            ) from None
    else:
        given = (size,)
    bits = max((size.bit_length() for size in given), default=0)
    if bits > _MAX_SIZE_BITS:  # too long to be shown, perhaps
        raise InvalidArgumentError(
            f"each size in shape must be less than 2**{_MAX_SIZE_BITS}, got one of {bits} bits",
            argument="shape",
        )
    return given


def parse_dtype(dtype: object) -> np.dtype[Any]:
    """Return a dtype that is given in any form that numpy accepts. Raises InvalidArgumentError for anything else."""
    try:
        made: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]  # this is the check
    except (TypeError, ValueError, SyntaxError):
        raise InvalidArgumentError(
            f"dtype must be a numpy.dtype or the name of one, got {shorten(dtype)}",
            argument="dtype",
        ) from None
    return made


def _parse_float(value: object) -> float:
    """Return a number as a float. Raises TypeError, ValueError or OverflowError if that cannot be done.

    Text, booleans, masked numbers and timedelta64 are not accepted, although Python or numpy would convert some of
    them: each is more likely a mistake.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        is_real = value.dtype.kind in "iuf" or value.dtype == BFLOAT16
        if value.ndim or not is_real or isinstance(value, np.ma.MaskedArray):
            raise TypeError
    elif isinstance(value, bool) or not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError
    return float(value)
