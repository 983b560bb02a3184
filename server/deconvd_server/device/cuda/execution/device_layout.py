"""Where the tensors of a call lie on the card. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import Region, Regions

__all__ = ["Frame"]


class Frame:
    """Where a call's tensors lie in a block of memory: operands first, then results, then a workspace.

    Args:
        operands, results: None for one that lies elsewhere, and has no region.
    """

    def __init__(
        self,
        operands: Sequence[TensorSpec | None],
        results: Sequence[TensorSpec | None],
        workspace_bytes: int,
    ) -> None:
        regions = Regions()
        self.operands = [_added(regions, spec) for spec in operands]
        self.operands_bytes = regions.total_bytes
        self.results = [_added(regions, spec) for spec in results]
        self.results_bytes = regions.total_bytes - self.operands_bytes
        self.workspace: Region = regions.add(workspace_bytes)
        self.total_bytes = regions.total_bytes


def _added(regions: Regions, spec: TensorSpec | None) -> Region | None:
    return None if spec is None else regions.add(spec.nbytes)
