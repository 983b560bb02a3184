"""Results of problems without products: an operand is empty, so a device has nothing to compute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import numpy as np

from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd.model.operation import spec_of_field
from deconvd.model.problem import Problem
from deconvd_server.call.context import CallContext
from deconvd_server.device.array_pieces import piece_indices
from deconvd_server.device.pieces import piece_bytes, pieces
from deconvd_server.device.protocol import Device
from deconvd_server.device.tensor import Tensor

__all__ = ["SUM_BYTES", "bytes_without_products", "run_without_products", "set_gb"]

_SUMMED_CHANNELS_COUNT: Final = 1 << 16
"""Channels that `set_gb` sums at once."""

SUM_BYTES: Final = 4 * 8 * _SUMMED_CHANNELS_COUNT
"""Memory that `set_gb` takes in addition to its operands: float64 sums of the channels, and numpy's copies of them."""


def run_without_products(
    device: Device,
    problem: Problem,
    operands: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
    call: CallContext,
) -> None:
    """Set results to zeros, except y with a bias, and gb if gy has elements. See `Device.run`."""

    def fetch(operand: Tensor) -> Array:
        return operand if isinstance(operand, np.ndarray) else device.read(operand, call)

    for field, place in places.items():
        if field == "gb" and problem.y.nbytes:
            gb = place if isinstance(place, np.ndarray) else np.empty(problem.c_O, problem.b.dtype)
            for _ in set_gb(gb, fetch(operands["gy"])):
                call.check()
            if not isinstance(place, np.ndarray):
                device.write(place, gb, call)
        elif field == "y" and "b" in operands:
            _fill(device, place, fetch(operands["b"])[:, None, None], call)
        else:
            _fill(device, place, np.zeros((), spec_of_field(problem, field).dtype), call)


def bytes_without_products(
    problem: Problem, operands: Collection[str], results: Collection[str]
) -> int:
    """Return a bound on the host memory that `run_without_products` takes, in addition to operands and results.

    It needs a copy of each operand that it reads from a device, and of each piece of a result that it writes there.
    """
    read = sum(spec_of_field(problem, field).nbytes for field in operands if field in ("b", "gy"))
    written = max(piece_bytes(spec_of_field(problem, field)) for field in results)
    return read + written + ("gb" in results) * (problem.b.nbytes + SUM_BYTES)


def set_gb(gb: Array, gy: Array) -> Iterator[None]:
    """Set gb, of gy's element type, to the sums of gy, step by step. A sum beyond that type's range is infinite."""
    # In float32, sums over whole batches lose digits. float64 costs little: reading gy takes longer than adding.
    for begin in range(0, len(gb), _SUMMED_CHANNELS_COUNT):
        some = gy[:, begin : begin + _SUMMED_CHANNELS_COUNT]
        total = np.zeros(some.shape[1], np.float64)
        for piece in piece_indices(some.shape):
            with np.errstate(all="ignore"):
                total[piece[1:2]] += some[piece].sum(axis=(0, 2, 3), dtype=np.float64)
            yield
        with np.errstate(all="ignore"):
            gb[begin : begin + len(total)] = total


def _fill(device: Device, place: Tensor, value: Array, call: CallContext) -> None:
    """Set each sample of a place to the same value."""
    if isinstance(place, np.ndarray):
        copy_into(place, np.broadcast_to(value, place.shape))
        return
    for piece in pieces(place):
        call.check()
        filled = np.empty(piece.spec.shape, piece.spec.dtype)
        filled[...] = value
        device.write(piece, filled, call)
