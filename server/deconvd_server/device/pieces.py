"""Cuts tensors of devices into pieces that fit in host memory. For pieces of work see `array_pieces`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from deconvd.model.problem import TensorSpec
from deconvd.wire.stream_parts import slices
from deconvd_server.device.tensor import DeviceTensor

__all__ = ["piece_bytes", "pieces", "sample_pieces"]

_PIECE_BYTES: Final = 16 << 20
"""Size of the piece of a tensor that is in host memory while the tensor is copied, unless one sample is larger."""


def piece_bytes(spec: TensorSpec) -> int:
    """Return the size of the largest of a tensor's `pieces`."""
    if not spec.shape or not spec.shape[0]:
        return spec.nbytes
    return min(_piece_samples_count(spec), spec.shape[0]) * (spec.nbytes // spec.shape[0])


def sample_pieces(spec: TensorSpec) -> Iterator[tuple[slice | None, TensorSpec]]:
    """Yield ranges of a tensor's samples, each with the spec of its piece: at most _PIECE_BYTES, or one sample.

    A tensor of no dimensions has no samples. It is one piece, whose range is None.
    """
    if not spec.shape:
        yield None, spec
        return
    for samples in slices(spec.shape[0], _piece_samples_count(spec)):
        yield samples, TensorSpec((samples.stop - samples.start, *spec.shape[1:]), spec.dtype)


def pieces(tensor: DeviceTensor) -> Iterator[DeviceTensor]:
    """Yield views of a tensor, in the pieces of `sample_pieces`."""
    for samples, _ in sample_pieces(tensor.spec):
        yield tensor if samples is None else tensor.samples(samples.start, samples.stop)


def _piece_samples_count(spec: TensorSpec) -> int:
    """Return the samples of a piece: as many as fit in _PIECE_BYTES, and at least one."""
    sample_bytes = spec.nbytes // max(spec.shape[0], 1)
    return max(_PIECE_BYTES // max(sample_bytes, 1), 1)
