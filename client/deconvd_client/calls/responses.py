"""Responses that no faultless server sends. The client does not trust what it receives."""

from __future__ import annotations

from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from deconvd.errors import ExhaustedError, InternalError, InvalidArgumentError

__all__ = ["MALFORMED_ERRORS", "malformed_response", "parse_response"]

_M = TypeVar("_M", bound=Message)

MALFORMED_ERRORS: Final = (DecodeError, InvalidArgumentError, ExhaustedError)
"""What the decoders, which the server uses, too, raise for bytes that are not what they must be.

To the caller of a client they would say that an argument of the call was wrong.
"""


def parse_response(message_type: type[_M], data: bytes) -> _M:
    """Return the message in some bytes. Raises InternalError if they are not one."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise malformed_response(message_type, error) from None


def malformed_response(message_type: type[Message], why: object) -> InternalError:
    """Return the error for a response that is not what it must be."""
    name = message_type.DESCRIPTOR.full_name
    return InternalError(
        f"the server's {name} is malformed, so the server or a proxy before it is faulty: {why}"
    )
