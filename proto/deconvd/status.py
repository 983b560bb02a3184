"""Errors to gRPC statuses and back, each with google.rpc details.

BadRequest    the argument at fault of an InvalidArgumentError
ResourceInfo  the argument of a NotFoundError, and what it names
RetryInfo     when to come back after an UnavailableError
ErrorInfo     the class, in `reason`, so that it survives proxies that change the status
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from deconvd import errors
from deconvd.errors import (
    DeconvdError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

__all__ = ["error_from_rpc", "error_from_status", "status_from_error", "told_as_status"]

_DOMAIN: Final = "deconvd"
_DETAILS_KEY: Final = "grpc-status-details-bin"
_MAX_TEXT_BYTES: Final = 2000
"""Bytes of a message that cross the wire: they travel in headers, of which gRPC takes 8 KiB."""

_NAME_BY_CODE: Final = {int(code.value[0]): code.name for code in grpc.StatusCode}
_CLASSES: dict[str, type[DeconvdError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, DeconvdError)
}
# Finer classes than these are known by their name alone: a stranger's NOT_FOUND says nothing of tensors.
_CLASS_BY_STATUS: dict[str, type[DeconvdError]] = {DeconvdError.status: DeconvdError}
_CLASS_BY_STATUS |= {cls.status: cls for cls in DeconvdError.__subclasses__()}


def status_from_error(error: DeconvdError) -> grpc.Status:
    """Return the status to end a call with, for ``context.abort_with_status``."""
    return rpc_status.to_status(told_as_status(error))


def told_as_status(error: DeconvdError) -> status_pb2.Status:
    """Return what a caller is told of an error."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)
    ]
    text = _shortened(str(error))
    if isinstance(error, InvalidArgumentError) and error.argument:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.argument, description=text
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, NotFoundError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource, resource_name=error.argument, description=text
            )
        )
    if isinstance(error, UnavailableError) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code: int = grpc.StatusCode[error.status].value[0]
    packed = [_packed(detail) for detail in details]
    return status_pb2.Status(code=code, message=text, details=packed)


def error_from_rpc(failure: grpc.Call) -> DeconvdError:
    """Return the error that a failed call stands for: the `grpc.RpcError` that it raised.

    One that a deconvd server raised comes back as it was. Of others, gRPC's own and those of
    proxies, the status picks the class.
    """
    return _error(failure.code().name, failure.details() or "", _details_of(failure))


def error_from_status(status: status_pb2.Status) -> DeconvdError:
    """Return the error that a status tells of, as `told_as_status` has made it."""
    return _error(_NAME_BY_CODE.get(status.code, "UNKNOWN"), status.message, status.details)


def _error(status: str, text: str, packed: Iterable[any_pb2.Any]) -> DeconvdError:
    details = _Details(packed)
    text = text or f"the call failed with status {status}"
    cls = details.error_class or _CLASS_BY_STATUS.get(status)
    if cls is None:
        return DeconvdError(f"{status}: {text}")
    if issubclass(cls, (InvalidArgumentError, NotFoundError)):
        return cls(text, argument=details.argument)
    if issubclass(cls, UnavailableError):
        return cls(text, retry_after_s=details.retry_after_s)
    return cls(text)


class _Details:
    """What the google.rpc details of a failed call say."""

    def __init__(self, details: Iterable[any_pb2.Any]) -> None:
        self.error_class: type[DeconvdError] | None = None
        self.argument = ""
        self.retry_after_s: float | None = None
        with suppress(message.DecodeError):  # a stranger's; what was read before it counts
            for packed in details:
                self._read(packed)

    def _read(self, packed: any_pb2.Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        resource = error_details_pb2.ResourceInfo()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.domain == _DOMAIN:
            self.error_class = _CLASSES.get(info.reason)
        elif packed.Unpack(bad_request) and bad_request.field_violations:
            self.argument = bad_request.field_violations[0].field
        elif packed.Unpack(resource):
            self.argument = resource.resource_name
        elif packed.Unpack(retry):
            self.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000


def _details_of(failure: grpc.Call) -> Iterator[any_pb2.Any]:
    # not rpc_status.from_call, which refuses details once a proxy has changed the status
    for key, value in failure.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            yield from status_pb2.Status.FromString(value).details
            return


def _shortened(text: str) -> str:
    """Cut a text to what headers have room for: gRPC writes some letters as ``%`` and two digits."""
    is_plain = all(" " <= letter <= "~" and letter != "%" for letter in text)
    limit = _MAX_TEXT_BYTES if is_plain else _MAX_TEXT_BYTES // 3
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
