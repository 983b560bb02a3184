"""The layout of a call's tensors in its block of the card's memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion

__all__ = ["DeviceLayout"]


class DeviceLayout:
    """Regions of a block: operands first, then results, then a workspace.

    Small calls depend on that order: they copy all operands at once, and all results.

    Args:
        operands, results: None for a tensor that has a place elsewhere, and so no region.
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
