"""One call of one connection whose operands and results are in files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import spec_of_field
from deconvd.model.problem import TensorSpec
from deconvd_client.arguments import GRADIENT_NAMES, CallBuilder
from deconvd_client.calls.cancel_scope import CancelScope, current_cancel_scope
from deconvd_client.calls.transfer import Transfer
from deconvd_client.calls.uninterrupted import call_uninterrupted
from deconvd_client.cli.outputs import Output
from deconvd_client.cli.progress import show_progress
from deconvd_client.config import Config
from deconvd_client.residents import Call
from deconvd_client.server import Server

__all__ = ["FileCall", "Report"]

_NAMES = {"gw": "gW"}
"""The names of results in files, where they differ from those of their fields."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a call did.

    Attributes:
        results: Shapes and element types, by name.
        sent_bytes: The size of the operands.
        received_bytes: The size of the results.
        duration_s: How long the call took, the connection included.
        transport: How its tensors travelled, as `Server.current_transport` says.
    """

    results: Mapping[str, TensorSpec]
    sent_bytes: int
    received_bytes: int
    duration_s: float
    transport: str


class FileCall:
    """A deconvolution, or its gradients, of arrays that are mapped from files.

    Args:
        server: Computes it.
        config: The options of the call.
        x, W, b: The operands.
        gy: None for y, else the gradient with respect to y.

    Raises:
        InvalidArgumentError: The operands do not fit together.

    Attributes:
        specs: Shapes and element types of the results in files, by name.
    """

    def __init__(
        self,
        server: Server,
        config: Config,
        x: Array,
        W: Array,
        b: Array | None,
        gy: Array | None,
        geometry: Geometry,
    ) -> None:
        builder = CallBuilder(server.residents, config)
        self._server = server
        self._call: Call = (
            builder.deconvolution(x, W, b, geometry)
            if gy is None
            else builder.differentiation(x, W, b, gy, geometry, GRADIENT_NAMES)
        )
        results = self._call.results
        self.specs: dict[str, TensorSpec] = {
            _NAMES.get(field, field): spec.raw for field, spec in results.items()
        }

    def run(self, output: Output, *, shows_progress: bool) -> Report:
        """Make the call and write its results. Raises DeconvdErrors, and OSError if the output cannot be written."""
        with output.write(self.specs) as memory:
            transfer = Transfer(
                {field: memory[_NAMES.get(field, field)] for field in self._call.results}
            )
            sent_bytes = sum(
                spec_of_field(self._call.problem, field).nbytes for field in self._call.operands
            )
            received_bytes = sum(spec.nbytes for spec in self.specs.values())
            bar = (
                show_progress(transfer, sent_bytes, received_bytes)
                if shows_progress
                else nullcontext()
            )
            began_s = time.perf_counter()
            with bar:
                self._execute(transfer)
            duration_s = time.perf_counter() - began_s
            transport = self._server.current_transport
        return Report(self.specs, sent_bytes, received_bytes, duration_s, str(transport))

    def _execute(self, transfer: Transfer) -> None:
        """Make the call in another thread, so that a signal strikes where this one only waits. It ends the call."""
        scope = CancelScope()
        context = copy_context()
        context.run(current_cancel_scope.set, scope)
        work = partial(context.run, self._server.execute_into, self._call, transfer)
        call_uninterrupted(work, scope.cancel)
