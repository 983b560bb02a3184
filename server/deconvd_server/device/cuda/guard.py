"""Tells the errors of a call from those of the card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deconvd.errors import DeconvdError, ExhaustedError, InternalError
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.runtime import CudaError, synchronize
from deconvd_server.device.faults import DeviceLostError

__all__ = ["guarded"]

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""


@contextmanager
def guarded(name: str, on_lost: Callable[[DeviceLostError], None]) -> Iterator[None]:
    """Raise what the block raises as one of our errors.

    Args:
        name: The card's name, for messages.
        on_lost: Called if the card is of no use any more.

    Raises:
        ExhaustedError: Memory ran out, on the card or the host.
        DeviceLostError: The card must be reset: even waiting for it fails.
        InternalError: Anything else of CUDA's and cuDNN's.
    """
    try:
        yield
    except DeconvdError:
        raise
    except MemoryError as error:
        raise ExhaustedError(f"{name}: memory ran out: {error}") from None
    except (RuntimeError, CudnnError) as error:
        log.exception("%s failed", name)
        lost = _lost(name)
        if lost is not None:
            on_lost(lost)
            raise lost from error
        if getattr(error, "status", None) == _OUT_OF_MEMORY and isinstance(error, CudaError):
            raise ExhaustedError(f"{name}: memory ran out: {error}") from error
        raise InternalError(f"{name} failed, see the server's log") from error


def _lost(name: str) -> DeviceLostError | None:
    """Return the error of a card that must be reset; None if it still works."""
    try:
        synchronize()
    except CudaError as error:
        return DeviceLostError(f"{name} must be reset: {error}")
    return None
