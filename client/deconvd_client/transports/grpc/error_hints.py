"""Adds to gRPC's error messages what users need: the server's target, the limit, and the option that changes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from deconvd.errors import DeadlineError, DeconvdError, ExhaustedError, UnavailableError
from deconvd_client.calls.transport import TlsFailureError
from deconvd_client.credentials import NO_CREDENTIALS, Credentials
from deconvd_client.transports.grpc.proxies import Proxy
from deconvd_client.transports.grpc.tls_failures import find_tls_failure

__all__ = ["ErrorHints"]

_TOO_LARGE: Final = re.compile(
    r"(CLIENT|SERVER): Received message larger than max \((\d+) vs\. (\d+)\)"
)

_UNREACHABLE: Final = re.compile(
    r"failed to connect to all addresses|errors resolving|DNS resolution failed|empty address list"
)
"""gRPC's messages if no server was reached at all."""

_DEADLINE_PASSED: Final = "Deadline Exceeded"
"""gRPC's message for a deadline, which says no more than the class of the error does."""


@dataclass(frozen=True, slots=True)
class ErrorHints:
    """What the errors of one channel have in common.

    Attributes:
        target: The target of the channel.
        proxy: The proxy of the channel; None if there is none.
        credentials: Those of the channel.
    """

    target: str
    proxy: Proxy | None
    credentials: Credentials = NO_CREDENTIALS

    def explain(self, error: DeconvdError) -> DeconvdError:
        """Return an error with a better message, or the error itself."""
        if isinstance(error, ExhaustedError):
            return _with_limit(error)
        if isinstance(error, DeadlineError):
            why = str(error)
            if _DEADLINE_PASSED in why:
                why = "the server did not answer in time"
            return DeadlineError(why + self._proxy_hint())
        if isinstance(error, UnavailableError):
            text = str(error)
            failure = find_tls_failure(text, self.target, self.credentials, self.proxy)
            if failure:
                return TlsFailureError(failure + self._proxy_hint())
            if _UNREACHABLE.search(text):
                text = f"no server was reached: is deconvd-server running at {self.target}? {text}"
            text += self._proxy_hint()
            return UnavailableError(text, retry_after_s=error.retry_after_s)
        return error

    def _proxy_hint(self) -> str:
        if self.proxy is None:
            return ""
        return (
            f"; the call used the proxy {self.proxy.address} (from the environment variable {self.proxy.variable}). "
            "To connect directly, add the server's host to no_proxy."
        )


def _with_limit(error: ExhaustedError) -> ExhaustedError:
    """Return an error that names the option to change, if the message is one of gRPC's own."""
    too_large = _TOO_LARGE.search(str(error))
    if too_large is None:
        return error
    receiver, size, limit = too_large.groups()
    if receiver == "CLIENT":
        return ExhaustedError(
            f"the response has {size} bytes, and this client accepts {limit}: raise "
            "max_message_bytes of connect(), or send fewer samples at a time"
        )
    return ExhaustedError(
        f"the request has {size} bytes, and the server accepts {limit}: start it with a larger "
        "--max-message-bytes, or send fewer samples at a time"
    )
