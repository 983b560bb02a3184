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
    """Finds the tensors of one call in shared memory, and keeps that memory mapped until the block ends.

    Only the call's own thread may use it.

    Args:
        lender: The lender of the memory; None if the server lends none.
        identity: The identity of the call.
    """

    def __init__(self, lender: Lender | None, identity: str = "") -> None:
        self._lender = lender
        self._identity = identity
        self._uses: dict[bytes, RegionUse] = {}  # by region

    def __enter__(self) -> SharedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        for use in self._uses.values():
            use.end()

    def operand(self, name: str, spec: TensorSpec, location: SharedSlice) -> Tensor:
        """Return a tensor to read: a read-only array, or a tensor on a card.

        Args:
            name: Name of the argument, for errors.
            spec: Its shape and element type.
            location: Where it is.

        Raises:
            StaleRegionError: As `Lender.use` does.
            InvalidArgumentError: As `SharedSlice.check` does.
        """
        return self._memory(name, location).tensor(name, spec, location, is_writable=False)

    def place(self, name: str, spec: TensorSpec, location: SharedSlice) -> Tensor:
        """Return where to put a result: a writable array, or a tensor on a card. Otherwise as `operand`."""
        return self._memory(name, location).tensor(name, spec, location, is_writable=True)

    def host_place(self, name: str, spec: TensorSpec, location: SharedSlice) -> Array:
        """Return where to put a result, as a writable array. Otherwise as `place`.

        Raises:
            InvalidArgumentError: As `place`, and for memory of a card.
        """
        tensor = self.place(name, spec, location)
        if not isinstance(tensor, np.ndarray):
            raise InvalidArgumentError(
                f"{name} must be in host memory, got memory of a card", argument=name
            )
        return tensor

    def _memory(self, name: str, location: SharedSlice) -> Lendable:
        region = location.region
        use = self._uses.get(region)
        if use is None:
            if self._lender is None:
                raise StaleRegionError(
                    f"{name} must be sent in messages: this server lends no memory", argument=name
                )
            use = self._uses[region] = self._lender.use(name, region, self._identity)
        return use.memory
