"""Translates the errors of CUDA and cuDNN: does the call fail, or is the card lost?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from deconvd.errors import DeconvdError, ExhaustedError, InternalError
from deconvd_server.device.cuda.api.runtime import CudaError, synchronize
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.faults import DeviceLostError

__all__ = ["ErrorTranslation"]

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""


class ErrorTranslation:
    """A context manager that raises the errors of a with-block as deconvd's own. Threads may share it.

        memory of the card or the host ran out      ExhaustedError
        even a wait for the card fails              DeviceLostError: the card must be reset
        any other error of CUDA or cuDNN            InternalError

    Args:
        name: The card's name, for messages.
        on_lost: Called if the card must be reset.
    """

    def __init__(self, name: str, on_lost: Callable[[DeviceLostError], None]) -> None:
        self._name = name
        self._on_lost = on_lost

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, DeconvdError):
            return
        if isinstance(exc, MemoryError):
            raise ExhaustedError(f"{self._name}: memory ran out: {exc}") from None
        if isinstance(exc, (RuntimeError, CudnnError)):
            self._raise_translated(exc)

    def _raise_translated(self, error: Exception) -> NoReturn:
        _log.error("%s failed", self._name, exc_info=error)
        # CUDA reports an error of an earlier kernel at any later call, so the status does not tell whether the card
        # works.
        lost = _find_lost_error(self._name)
        if lost is not None:
            self._on_lost(lost)
            raise lost from error
        if getattr(error, "status", None) == _OUT_OF_MEMORY and isinstance(error, CudaError):
            raise ExhaustedError(f"{self._name}: memory ran out: {error}") from error
        raise InternalError(f"{self._name} failed, see the server's log") from error


def _find_lost_error(name: str) -> DeviceLostError | None:
    """Return the error to raise if the card must be reset; None if it still works."""
    try:
        synchronize()
    except CudaError as error:
        return DeviceLostError(f"{name} must be reset: {error}")
    return None
