"""Where the tensors of a call lie on the card. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion

__all__ = ["DeviceLayout"]


class DeviceLayout:
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
        regions = BlockLayout()
        self.operands = [_add_region(regions, spec) for spec in operands]
        self.operands_bytes = regions.total_bytes
        self.results = [_add_region(regions, spec) for spec in results]
        self.results_bytes = regions.total_bytes - self.operands_bytes
        self.workspace: BlockRegion = regions.add(workspace_bytes)
        self.total_bytes = regions.total_bytes


def _add_region(regions: BlockLayout, spec: TensorSpec | None) -> BlockRegion | None:
    return None if spec is None else regions.add(spec.nbytes)
