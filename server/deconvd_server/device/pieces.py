"""Tensors of devices in pieces that the host's memory has room for. Pieces of work: `array_pieces`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from deconvd.model.problem import TensorSpec
from deconvd.wire.stream_parts import slices
from deconvd_server.device.tensor import DeviceTensor

__all__ = ["piece_bytes", "pieces", "sample_pieces"]

_PIECE_BYTES: Final = 16 << 20
"""What is held of a tensor in host memory while it arrives or leaves, unless one sample has more."""


def piece_bytes(spec: TensorSpec) -> int:
    """Return what the largest of a tensor's `pieces` takes."""
    if not spec.shape or not spec.shape[0]:
        return spec.nbytes
    return min(_piece_samples_count(spec), spec.shape[0]) * (spec.nbytes // spec.shape[0])


def sample_pieces(spec: TensorSpec) -> Iterator[tuple[slice | None, TensorSpec]]:
    """Yield the samples of a tensor in pieces that are small enough to be held in host memory, if that can be.

    Each comes with what it is. A tensor without samples is one piece, None.
    """
    if not spec.shape:
        yield None, spec
        return
    for samples in slices(spec.shape[0], _piece_samples_count(spec)):
        yield samples, TensorSpec((samples.stop - samples.start, *spec.shape[1:]), spec.dtype)


def pieces(tensor: DeviceTensor) -> Iterator[DeviceTensor]:
    """Yield a tensor in the pieces of `sample_pieces`."""
    for samples, _ in sample_pieces(tensor.spec):
        yield tensor if samples is None else tensor.samples(samples.start, samples.stop)


def _piece_samples_count(spec: TensorSpec) -> int:
    """Return how many samples of a tensor have about _PIECE_BYTES together: at least one."""
    sample_bytes = spec.nbytes // max(spec.shape[0], 1)
    return max(_PIECE_BYTES // max(sample_bytes, 1), 1)
