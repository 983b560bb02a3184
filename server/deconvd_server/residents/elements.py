"""The elements of a kept tensor, wherever it lies, for the calls that use it."""

from __future__ import annotations

import numpy as np

from deconvd.errors import UnavailableError
from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor
from deconvd_server.residents.entry import RETRY_AFTER_S, ResidentEntry

__all__ = ["check_not_freed", "read_array", "read_samples", "write_samples"]


def check_not_freed(kept: ResidentEntry) -> None:
    """Raise UnavailableError if a tensor had to make room while all its users rested."""
    if kept.is_freed:
        raise UnavailableError(
            "the tensor had to make room for what another tenant may keep, since its caller took so long",
            retry_after_s=RETRY_AFTER_S,
        )


def read_array(kept: ResidentEntry, call: CallContext, out: Array | None = None) -> Array:
    """Return the elements of a tensor: in `out`, if given, an array of its form."""
    if not isinstance(kept.operand, np.ndarray):
        return kept.tier.device_engine.read(kept.operand, call, out)
    if out is None:
        return kept.operand
    copy_into(out, kept.operand)
    return out


def read_samples(kept: ResidentEntry, samples: slice | None, call: CallContext) -> Array:
    """Return a new array with the elements of some samples, or of all, of a tensor. Raises as `check_not_freed`."""
    check_not_freed(kept)
    operand = kept.operand
    if isinstance(operand, np.ndarray):
        return (operand if samples is None else operand[samples]).copy()
    return kept.tier.device_engine.read(_view(operand, samples), call)


def write_samples(
    kept: ResidentEntry, samples: slice | None, array: Array, call: CallContext
) -> None:
    """Set the elements of some samples, or of all, of a tensor that nobody else uses. Raises as `check_not_freed`."""
    check_not_freed(kept)
    operand = kept.operand
    if isinstance(operand, np.ndarray):
        copy_into(operand if samples is None else operand[samples], array)
    else:
        kept.tier.device_engine.write(_view(operand, samples), array, call)


def _view(tensor: DeviceTensor, samples: slice | None) -> DeviceTensor:
    return tensor if samples is None else tensor.samples(samples.start, samples.stop)
