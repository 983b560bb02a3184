"""The operands of a stream: those that are here already, and those that arrive behind its header."""

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
    """The operands of a stream, to be asked for in the order in which they stream.

    What arrives and is to be kept is put onto the engine's device as it comes.

    Args:
        exchange: What is here already.
        reader: What arrives.
    """

    def __init__(
        self, exchange: CallTensors, reader: PartReader[Any], engine: Engine, call: CallContext
    ) -> None:
        self._exchange = exchange
        self._specs = exchange.parsed.operands
        self._reader = reader
        self._engine = engine
        self._call = call
        self._present: Mapping[str, Operand] = {}
        self._kept: Mapping[str, DeviceTensor] = {}

    def take_missing(self, missing: Mapping[str, TensorSpec]) -> None:
        """Wait for what the client was told is missing.

        Raises as `PartReader.read_missing` and `Exchange.take_missing` do.
        """
        specs = {ARGUMENTS[field]: spec for field, spec in missing.items()}
        arrays = self._reader.read_missing(specs)
        self._exchange.take_missing(dict(zip(missing, arrays.values(), strict=True)), self._engine)

    def prepare(self) -> None:
        """Find the places of what is here and of what is to be kept, before anything is computed.

        Raises as `Exchange.bring_operands` and `Exchange.make_residents` do.
        """
        self._present = self._exchange.bring_operands(self._engine)
        self._kept = self._exchange.make_residents(self._specs, self._engine)

    def read_operand(self, field: str) -> Tensor:
        """Return an operand. Raises as `PartReader.read` and `Engine.write` do."""
        if field not in self._present:
            return self._receive(field, self._specs[field], None)
        return require(self._present[field])  # what streams is read here, and none is `Arriving`

    def read_operand_samples(self, field: str, spec: TensorSpec, part: slice) -> Tensor:
        """Return the next samples of an operand, which have that form. Raises as `whole` does."""
        if field not in self._present:
            return self._receive(field, spec, part)
        present = require(self._present[field])
        if isinstance(present, np.ndarray):
            return present[part]
        return present.samples(part.start, part.stop)

    def expect_end(self) -> None:
        """Raise InvalidArgumentError if more arrives."""
        self._reader.expect_end()

    def _receive(self, field: str, spec: TensorSpec, part: slice | None) -> Tensor:
        array = self._reader.read(ARGUMENTS[field], spec)
        kept = self._kept.get(field)
        if kept is None:
            return array
        if part is not None:
            kept = kept.samples(part.start, part.stop)
        self._engine.write(kept, array, self._call)
        return kept
