"""The tensors of one call in shared memory."""

from __future__ import annotations

import numpy as np

from deconvd.errors import InvalidArgumentError, StaleRegionError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.device import Tensor
from deconvd_server.shared_memory.lender import Lender
from deconvd_server.shared_memory.loans import Lendable, RegionUse

__all__ = ["SharedTensors"]


class SharedTensors:
    """The tensors of one call in shared memory, which stays mapped until the block ends.

    Args:
        lender: Whose memory they may be in; None if there is none.
    """

    def __init__(self, lender: Lender | None) -> None:
        self._lender = lender
        self._uses: dict[bytes, RegionUse] = {}  # by region

    def __enter__(self) -> SharedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        for use in self._uses.values():
            use.end()

    def operand(self, name: str, spec: TensorSpec, lies_at: SharedSlice) -> Tensor:
        """Return a tensor to be read: a read-only array, unless it lies on a card.

        Args:
            name: Name of the argument, for errors.
            spec: What it is.

        Raises:
            InvalidArgumentError: As `Lender.use` and `SharedSlice.check` do.
        """
        return self._memory(name, lies_at).tensor(name, spec, lies_at, is_writable=False)

    def place(self, name: str, spec: TensorSpec, lies_at: SharedSlice) -> Tensor:
        """Return where a tensor is to be put: a writable array, or a tensor on a card. Otherwise as `operand`."""
        return self._memory(name, lies_at).tensor(name, spec, lies_at, is_writable=True)

    def host_place(self, name: str, spec: TensorSpec, lies_at: SharedSlice) -> Array:
        """Return a place as a writable array. As `place`, and raises InvalidArgumentError for memory of a card."""
        tensor = self.place(name, spec, lies_at)
        if not isinstance(tensor, np.ndarray):
            raise InvalidArgumentError(
                f"{name} must lie in memory of the host, got memory of a card", argument=name
            )
        return tensor

    def _memory(self, name: str, lies_at: SharedSlice) -> Lendable:
        region = lies_at.region
        use = self._uses.get(region)
        if use is None:
            if self._lender is None:
                raise StaleRegionError(
                    f"{name} must be sent in messages: this server lends no memory", argument=name
                )
            use = self._uses[region] = self._lender.use(name, region)
        return use.memory
