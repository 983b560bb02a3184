"""The operands of a stream: those that are on the server already, and those that arrive behind its header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deconvd.model.operation import ARGUMENTS
from deconvd.model.problem import TensorSpec
from deconvd.wire.stream_parts import PartReader
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Operand, Tensor
from deconvd_server.device.arriving import require
from deconvd_server.engine.engine import Engine
from deconvd_server.service.call_tensors import CallTensors

__all__ = ["StreamOperands"]


class StreamOperands:
    """The operands of a stream. They must be read in the order in which they stream.

    They arrive in memory that the engine's device reads fastest. An operand that becomes a resident is copied to the
    device as it arrives.

    Args:
        call_tensors: Has the operands that are on the server already.
        reader: Reads the operands that arrive.
    """

    def __init__(
        self, call_tensors: CallTensors, reader: PartReader[Any], engine: Engine, call: CallContext
    ) -> None:
        self._call_tensors = call_tensors
        self._specs = call_tensors.parsed.operands
        self._reader = reader
        self._engine = engine
        self._call = call
        if engine.info.has_own_memory:
            reader.empty = engine.allocate_host_array
        self._present: Mapping[str, Operand] = {}
        self._residents: Mapping[str, DeviceTensor] = {}

    def prepare(self) -> None:
        """Bring present operands to the engine and allocate new residents, before anything is computed.

        Raises as `CallTensors.bring_operands` and `CallTensors.make_residents` do.
        """
        self._present = self._call_tensors.bring_operands(self._engine)
        self._residents = self._call_tensors.make_residents(self._specs, self._engine)

    def read(self, field: str, spec: TensorSpec, samples: slice | None = None) -> Tensor:
        """Return an operand, or the next of its samples.

        Args:
            spec: That of what is returned.
            samples: Those to return; None for all of the operand.

        Raises as `PartReader.read` and `Engine.write` do.
        """
        operand = self._present.get(field)
        if operand is None:
            array = self._reader.read(ARGUMENTS[field], spec)
            self._call.received_bytes += spec.nbytes
            resident = self._residents.get(field)
            if resident is not None:
                if samples is not None:
                    resident = resident.samples(samples.start, samples.stop)
                self._engine.write(resident, array, self._call)
            if field in self._call_tensors.parsed.remember:
                return self._call_tensors.remember(field, array, self._engine)
            return array if resident is None else resident
        tensor = require(
            operand
        )  # a stream has no `Arriving` operands: this class reads them itself
        if samples is None:
            return tensor
        if isinstance(tensor, np.ndarray):
            return tensor[samples]
        return tensor.samples(samples.start, samples.stop)

    def expect_end(self) -> None:
        """Raise InvalidArgumentError if more arrives."""
        self._reader.expect_end()
