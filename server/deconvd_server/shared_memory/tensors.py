"""The tensors of one call, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import numpy as np
from google.protobuf.message import Message

from deconvd.codec import Buffer
from deconvd.errors import InvalidArgumentError, StaleRegionError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array, array_of_spec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.device import Operand
from deconvd_server.shared_memory.lender import Lender
from deconvd_server.shared_memory.loans import Use
from deconvd_server.shared_memory.slices import check_slice

__all__ = ["CallTensors"]


class CallTensors:
    """The tensors of one call: those in shared memory stay mapped until the block ends.

    Args:
        lender: Whose memory they may be in; None if there is none.
    """

    def __init__(self, lender: Lender | None) -> None:
        self._lender = lender
        self._uses: dict[bytes, Use] = {}  # by region

    def operand(
        self, name: str, spec: TensorSpec, message: pb.Tensor, raw: Buffer | None
    ) -> Operand:
        """Return a tensor of a request: a read-only array, unless it lies on a card.

        Args:
            name: Name of the argument, for errors.
            spec: What the message declares.
            raw: Its elements, where `deconvd.codec` has taken them out of the message.

        Raises:
            InvalidArgumentError: As `array_of_spec`, `Lender.use` and `check_slice` do.
        """
        if message.WhichOneof("payload") != "shared":
            return array_of_spec(name, spec, message, raw)
        tensor = self._any_place(name, message.shared, spec)
        if isinstance(tensor, np.ndarray):
            tensor.flags.writeable = False
        return tensor

    def places(self, request: Message, results: Mapping[str, TensorSpec]) -> dict[str, Operand]:
        """Return where results are to be put, those that have a place, by field: writable arrays, or tensors on cards.

        Args:
            request: Has a field ``{name}_place`` for each result.
            results: What they will be, by the names of their fields.

        Raises:
            InvalidArgumentError: As `Lender.use` and `check_slice` do.
        """
        names = {field: f"{field}_place" for field in results}
        return {
            field: self._any_place(name, getattr(request, name), results[field])
            for field, name in names.items()
            if request.HasField(name)
        }

    def __enter__(self) -> CallTensors:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for use in self._uses.values():
            use.end()

    def place(self, name: str, shared: pb.SharedSlice, spec: TensorSpec) -> Array:
        """Return a slice of the host's memory as a writable array.

        Args:
            name: What it is for, for errors.

        Raises:
            InvalidArgumentError: There is no such slice, or it is of a card's memory.
        """
        tensor = self._any_place(name, shared, spec)
        if not isinstance(tensor, np.ndarray):
            raise InvalidArgumentError(
                f"{name} must lie in memory of the host, got memory of a card", argument=name
            )
        return tensor

    def _any_place(self, name: str, shared: pb.SharedSlice, spec: TensorSpec) -> Operand:
        region, offset_bytes = shared.region, shared.offset_bytes
        use = self._uses.get(region)
        if use is None:
            use = self._uses[region] = self._known_lender(name).use(name, region)
        check_slice(name, offset_bytes, spec, use.memory.size_bytes)
        return use.memory.tensor(spec, offset_bytes)

    def _known_lender(self, name: str) -> Lender:
        if self._lender is None:
            raise StaleRegionError(
                f"{name} must be sent in messages: this server lends no memory", argument=name
            )
        return self._lender
