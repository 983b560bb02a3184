"""cuDNN's channels-last (NHWC) plans for channels-first tensors, which are transposed before and after."""

from __future__ import annotations

from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion
from deconvd_server.device.cuda.plan import Plan, Product
from deconvd_server.device.cuda.plans.casting import operands_of, result_of

__all__ = ["ChannelsLastPlan"]


class ChannelsLastPlan:
    """A plan for channels-first tensors, made of a plan for channels-last tensors. See `Plan`.

    Args:
        inner: A plan for the same problem, with all three tensors in NHWC order.
    """

    def __init__(self, product: Product, problem: Problem, inner: Plan) -> None:
        self._inner = inner
        self._specs = (*operands_of(product, problem), result_of(product, problem))
        regions = BlockLayout()
        self._regions = [_region(regions, spec) for spec in self._specs]
        self._scratch = regions.add(inner.workspace_bytes)
        self.workspace_bytes = regions.total_bytes

    @property
    def name(self) -> str:
        """The inner plan's."""
        return self._inner.name

    @property
    def deterministic(self) -> bool:
        """Whether the inner plan is."""
        return self._inner.deterministic

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the product. See `Plan`."""
        last_a, last_b, last_out = (
            given if region is None else workspace + region.offset
            for given, region in zip((a, b, out), self._regions, strict=True)
        )
        for given, last, spec in ((a, last_a, self._specs[0]), (b, last_b, self._specs[1])):
            if last != given:
                n, c, h, w = spec.shape
                kernels.transpose_to_nhwc(given, last, n, c, h, w, spec.dtype, stream)
        self._inner.execute(last_a, last_b, last_out, workspace + self._scratch.offset, stream)
        if last_out != out:
            n, c, h, w = self._specs[2].shape
            kernels.transpose_to_nchw(last_out, out, n, c, h, w, self._specs[2].dtype, stream)


def _region(regions: BlockLayout, spec: TensorSpec) -> BlockRegion | None:
    """Return a region for a tensor's transpose; None if both orders are the same."""
    _, c, h, w = spec.shape
    return None if c == 1 or h * w == 1 else regions.add(spec.nbytes)
