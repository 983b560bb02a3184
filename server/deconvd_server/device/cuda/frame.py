"""Where the tensors of a call lie in one block of memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from deconvd.problem import TensorSpec
from deconvd_server.device.cuda.memory import Region, Regions

__all__ = ["Frame"]


class Frame:
    """Where a call's tensors lie in a block: operands first, then results, then a workspace."""

    def __init__(
        self,
        operands: Sequence[TensorSpec],
        results: Sequence[TensorSpec],
        workspace_bytes: int,
    ) -> None:
        regions = Regions()
        self.operands = [regions.add(spec.nbytes) for spec in operands]
        self.operands_bytes = regions.total_bytes
        self.results = [regions.add(spec.nbytes) for spec in results]
        self.results_bytes = regions.total_bytes - self.operands_bytes
        self.workspace: Region = regions.add(workspace_bytes)
        self.total_bytes = regions.total_bytes
