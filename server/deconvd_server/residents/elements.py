"""Read and write the elements of a resident tensor, whether it is on a device or in host memory."""

from __future__ import annotations

import numpy as np

from deconvd.errors import UnavailableError
from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor
from deconvd_server.residents.entry import RETRY_AFTER_S, ResidentEntry

__all__ = ["check_not_freed", "read_array", "read_samples", "write_samples"]


def check_not_freed(entry: ResidentEntry) -> None:
    """Raise UnavailableError if a tensor was evicted while all its users were resting."""
    if entry.is_freed:
        raise UnavailableError(
            "the tensor was evicted while the server waited for the call's client: another tenant needed the "
            "memory, and has a right to it within its own share",
            retry_after_s=RETRY_AFTER_S,
        )


def read_array(entry: ResidentEntry, call: CallContext, out: Array | None = None) -> Array:
    """Return the elements of a tensor, in `out` if given: an array of its shape and element type.

    Without `out` the result may be the tensor's own memory: do not write it, or use it after releasing the tensor.
    """
    if not isinstance(entry.operand, np.ndarray):
        return entry.tier.device_engine.read(entry.operand, call, out)
    if out is None:
        return entry.operand
    copy_into(out, entry.operand)
    return out


def read_samples(entry: ResidentEntry, samples: slice | None, call: CallContext) -> Array:
    """Return a new array with the elements of some samples, or of all if `samples` is None.

    Raises as `check_not_freed`.
    """
    check_not_freed(entry)
    operand = entry.operand
    if isinstance(operand, np.ndarray):
        return (operand if samples is None else operand[samples]).copy()
    return entry.tier.device_engine.read(_view(operand, samples), call)


def write_samples(
    entry: ResidentEntry, samples: slice | None, array: Array, call: CallContext
) -> None:
    """Set the elements of some samples, or of all if `samples` is None. Raises as `check_not_freed`.

    No other call may use the tensor meanwhile.
    """
    check_not_freed(entry)
    operand = entry.operand
    if isinstance(operand, np.ndarray):
        copy_into(operand if samples is None else operand[samples], array)
    else:
        entry.tier.device_engine.write(_view(operand, samples), array, call)


def _view(tensor: DeviceTensor, samples: slice | None) -> DeviceTensor:
    return tensor if samples is None else tensor.samples(samples.start, samples.stop)
