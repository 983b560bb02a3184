"""Errors to statuses (google.rpc.Status) with google.rpc details, and back. `grpc_status` reads the status of an RPC.

BadRequest    the argument at fault of an InvalidArgumentError
ResourceInfo  the argument of a NotFoundError, and the kind of resource
RetryInfo     when to retry after an UnavailableError
RequestInfo   the name of the call in the server's log
ErrorInfo     the error's class, in `reason`: it survives proxies that change the status code
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from deconvd import errors
from deconvd.errors import (
    DeconvdError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)

__all__ = ["error_from_status", "status_from_error"]

_DOMAIN: Final = "deconvd"
_MAX_TEXT_BYTES: Final = 2000
"""The longest error message on the wire, in bytes. It is sent in headers, for which gRPC has 8 KiB."""

_NAME_BY_CODE: Final[dict[int, str]] = {code: name for name, code in code_pb2.Code.items()}
_CLASS_BY_NAME: dict[str, type[DeconvdError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, DeconvdError)
}
# Only direct subclasses: another program's NOT_FOUND does not mean that a tensor is lost. Other classes are found by
# name.
_CLASS_BY_STATUS: dict[str, type[DeconvdError]] = {DeconvdError.status: DeconvdError}
_CLASS_BY_STATUS |= {cls.status: cls for cls in DeconvdError.__subclasses__()}


def status_from_error(error: DeconvdError, request_id: str = "") -> status_pb2.Status:
    """Return an error as the status that the caller receives.

    Args:
        request_id: The name of the call in the server's log, if it has one.
    """
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)
    ]
    text = _shorten(str(error))
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
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.status),
        message=text,
        details=[_pack_detail(detail) for detail in details],
    )


def error_from_status(status: status_pb2.Status) -> DeconvdError:
    """Return the error in a status.

    An error from `status_from_error` is restored completely. For other statuses, the code decides the class.
    """
    name = _NAME_BY_CODE.get(status.code, "UNKNOWN")
    details = _ParsedDetails(status.details)
    text = status.message or f"the call failed with status {name}"
    cls = details.error_class or _CLASS_BY_STATUS.get(name)
    if cls is None:
        error = DeconvdError(f"{name}: {text}")
    elif issubclass(cls, (InvalidArgumentError, NotFoundError)):
        error = cls(text, argument=details.argument)
    elif issubclass(cls, UnavailableError):
        error = cls(text, retry_after_s=details.retry_after_s)
    else:
        error = cls(text)
    if details.request_id:
        error.request_id = details.request_id
    return error


class _ParsedDetails:
    """The google.rpc details of a failed call."""

    def __init__(self, details: Iterable[any_pb2.Any]) -> None:
        self.error_class: type[DeconvdError] | None = None
        self.argument = ""
        self.request_id = ""
        self.retry_after_s: float | None = None
        with suppress(
            message.DecodeError
        ):  # not from a deconvd server; the details before it still count
            for packed in details:
                self._read(packed)

    def _read(self, packed: any_pb2.Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        resource = error_details_pb2.ResourceInfo()
        retry = error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        if packed.Unpack(info) and info.domain == _DOMAIN:
            self.error_class = _CLASS_BY_NAME.get(info.reason)
        elif packed.Unpack(bad_request) and bad_request.field_violations:
            self.argument = bad_request.field_violations[0].field
        elif packed.Unpack(resource):
            self.argument = resource.resource_name
        elif packed.Unpack(retry):
            # a negative delay would have the client retry without a pause
            self.retry_after_s = max(retry.retry_delay.ToMilliseconds(), 0) / 1000
        elif packed.Unpack(request):
            self.request_id = request.request_id


def _shorten(text: str) -> str:
    """Cut a text to the size that fits into headers. gRPC writes each byte of some letters as ``%`` and two digits."""
    is_plain = all(" " <= letter <= "~" and letter != "%" for letter in text)
    limit = _MAX_TEXT_BYTES if is_plain else _MAX_TEXT_BYTES // 3
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def _pack_detail(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
