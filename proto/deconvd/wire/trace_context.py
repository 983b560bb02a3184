"""The context of a span as text, in the two headers of W3C Trace Context (https://www.w3.org/TR/trace-context)."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["TRACEPARENT", "TRACESTATE", "is_traceparent", "limit_tracestate", "trace_id_of"]

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
"""The names of the headers, and of the fields of `Telemetry`."""

_MAX_TRACESTATE_LENGTH: Final = 512
"""What each participant should pass on, at least."""

_LARGE_MEMBER_LENGTH: Final = 128
"""A tracestate that is too long loses its members longer than this first."""

_MAX_TRACEPARENT_LENGTH: Final = 256
"""Later versions may be longer than the 55 characters of version 00."""

_TRACEPARENT: Final = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
    r"(?P<rest>-[!-~]*)?"
)


def is_traceparent(text: str) -> bool:
    """Return whether a text is a valid traceparent. Later versions than 00 may have more after a hyphen."""
    if len(text) > _MAX_TRACEPARENT_LENGTH:
        return False
    match = _TRACEPARENT.fullmatch(text)
    return match is not None and (match["version"] != "00" or match["rest"] is None)


def trace_id_of(traceparent: str) -> str:
    """Return the trace id, 32 hexadecimal digits, of a valid traceparent; an empty text of an empty one."""
    return traceparent[3:35]


def limit_tracestate(text: str) -> str:
    """Return a tracestate without the members that make it longer than 512 characters.

    As W3C has it, members of more than 128 characters go first, and then the last ones. A text that no header can have
    is not a tracestate: then the result is empty.
    """
    if not text.isascii() or not text.isprintable():
        return ""
    if len(text) <= _MAX_TRACESTATE_LENGTH:
        return text
    kept: list[str] = []
    length = -1  # of the members and the commas between them
    for member in text.split(","):
        if len(member) <= _LARGE_MEMBER_LENGTH:
            length += 1 + len(member)
            if length > _MAX_TRACESTATE_LENGTH:
                break
            kept.append(member)
    return ",".join(kept)
