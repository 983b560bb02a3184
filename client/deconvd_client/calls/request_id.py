"""Request ids: names that the caller gives to calls, for the server's log and for errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd_client.calls.call_spec import CallSpec

__all__ = ["current_request_id", "name_call", "using_request_id"]

_MAX_LENGTH: Final = 128

current_request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Empty if the caller has set none. A plain variable: most calls read it, and nothing else."""


@contextmanager
def using_request_id(request_id: str) -> Iterator[None]:
    """Set the request id for a ``with`` block. See `Connection.using_request_id`."""
    is_text = isinstance(request_id, str) and request_id.isascii() and request_id.isprintable()
    if not is_text or not 0 < len(request_id) <= _MAX_LENGTH:
        raise InvalidArgumentError(
            f"request_id must be 1 to {_MAX_LENGTH} printable ASCII characters, got {request_id!r}",
            argument="request_id",
        )
    token = current_request_id.set(request_id)
    try:
        yield
    finally:
        current_request_id.reset(token)


def name_call(call_spec: CallSpec, request_id: str) -> CallSpec:
    """Return a call with a request id. Its request is a copy, since other calls share the original."""
    request = deepcopy(call_spec.request)
    request.telemetry.request_id = request_id
    return replace(call_spec, request=request)
