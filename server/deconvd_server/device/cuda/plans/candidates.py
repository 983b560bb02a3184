"""The plans that could serve a request: cuDNN's in both layouts, and our own kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from deconvd.model.options import UseCudnn
from deconvd.model.problem import Problem
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.cudnn import (
    Cudnn,
    CudnnError,
    CudnnPlan,
    EngineRules,
    EngineSearch,
    Layout,
)
from deconvd_server.device.cuda.cudnn.enums import HeuristicMode
from deconvd_server.device.cuda.plan import Plan, Product
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.casting import CastPlan, with_uniform_type
from deconvd_server.device.cuda.plans.channels_last import ChannelsLastPlan
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.crop import CropPlan, with_natural_outsize
from deconvd_server.device.cuda.plans.key import PlanKey

__all__ = ["Candidates"]

_SHORTLIST_COUNT = 2

_LAYOUTS = {Provider.CUDNN_NCHW: Layout.NCHW, Provider.CUDNN_NHWC: Layout.NHWC}


class Candidates:
    """Makes the plans that could serve a request. Thread-safe."""

    def __init__(self, cudnn: Cudnn) -> None:
        self._cudnn = cudnn

    def shortlist(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield the few candidates that are tried where nothing is tuned: the likely best first.

        The last one always works.
        """
        if key.options.use_cudnn is not UseCudnn.NEVER:
            yield from self._shortlist_cudnn(key, stream)
        if key.options.use_cudnn is not UseCudnn.ALWAYS:
            yield from islice(self.own_kernels(key), _SHORTLIST_COUNT)
        yield self.fallback(key)

    def _shortlist_cudnn(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        for mode in (HeuristicMode.A, HeuristicMode.FALLBACK):
            ready = self.cudnn_engines(key, stream, Provider.CUDNN_NCHW, (mode,), compiling=False)
            few = list(islice(ready, _SHORTLIST_COUNT))
            yield from few
            if few:
                return

    def list_all(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield every candidate that is worth timing: the likely best first, as time may run out.

        Those that compile come last, as a single one of them may take all of it.
        """
        own = key.options.use_cudnn is not UseCudnn.ALWAYS
        cudnn = key.options.use_cudnn is not UseCudnn.NEVER
        if own:
            yield from self.own_kernels(key)
        if cudnn:
            yield from self._cudnn_of_all_layouts(key, stream, (HeuristicMode.A,), compiling=False)
        if own:
            yield self.fallback(key)
        if cudnn:
            more = (HeuristicMode.B, HeuristicMode.FALLBACK)
            yield from self._cudnn_of_all_layouts(key, stream, more, compiling=False)
            yield from self._cudnn_of_all_layouts(
                key, stream, (HeuristicMode.A, *more), compiling=True
            )

    def _cudnn_of_all_layouts(
        self, key: PlanKey, stream: int, modes: Sequence[HeuristicMode], *, compiling: bool
    ) -> Iterator[Candidate]:
        for provider in _LAYOUTS:
            yield from self.cudnn_engines(key, stream, provider, modes, compiling=compiling)

    def own_kernels(self, key: PlanKey) -> Iterator[Candidate]:
        """Yield our own kernels, the most promising first."""
        names = Counter[str]()
        for plan in kernels.candidates(key.product, with_uniform_type(key.problem), key.options):
            names[plan.name] += 1
            yield self._own_candidate(key, plan, number=names[plan.name])

    def fallback(self, key: PlanKey) -> Candidate:
        """Return the plan that takes any problem."""
        plan = kernels.fallback(key.product, with_uniform_type(key.problem), key.options)
        return self._own_candidate(key, plan)

    def cudnn_engines(
        self,
        key: PlanKey,
        stream: int,
        provider: Provider,
        modes: Sequence[HeuristicMode],
        *,
        compiling: bool,
    ) -> Iterator[Candidate]:
        """Yield cuDNN's plans in one layout, its best first; none if it cannot do the operation.

        Args:
            compiling: Whether those that compile at run time are wanted, or the others.
        """
        problem = with_natural_outsize(with_uniform_type(key.problem))
        layout = _LAYOUTS[provider]
        rules = EngineRules.of(problem, key.options, compiling=compiling)
        try:
            search = EngineSearch(self._cudnn, stream, key.product, problem, layout)
        except CudnnError:
            return
        with search:
            for proposal in search.proposals(rules, modes):
                try:
                    plan = search.build(proposal)
                except CudnnError:
                    continue  # heuristics propose more than engines can do
                yield self._cudnn_candidate(key, plan, provider)

    def restore(self, key: PlanKey, choice: Choice, stream: int) -> Candidate:
        """Return the candidate that was chosen once.

        Raises:
            CudnnError: cuDNN does not take its blob.
            LookupError: We have no such kernel any more.
        """
        if choice.provider is Provider.OWN:
            return self._own_by_name(key, choice.name)
        plan = CudnnPlan(
            self._cudnn,
            stream,
            choice.blob.encode(),
            name=choice.name,
            deterministic=choice.deterministic,
        )
        return self._cudnn_candidate(key, plan, choice.provider)

    def _own_by_name(self, key: PlanKey, name: str) -> Candidate:
        for candidate in (*self.own_kernels(key), self.fallback(key)):
            if candidate.choice.name == name:
                return candidate
        raise LookupError(f"there is no kernel {name!r} for it")

    def _own_candidate(self, key: PlanKey, plan: Plan, *, number: int = 1) -> Candidate:
        # a choice must tell variants of one name apart
        name = plan.name if number == 1 else f"{plan.name} {number}"
        choice = Choice(Provider.OWN, name, plan.deterministic)
        return Candidate(_with_casts(key.product, key.problem, plan), choice)

    def _cudnn_candidate(self, key: PlanKey, plan: CudnnPlan, provider: Provider) -> Candidate:
        choice = Choice(provider, plan.name, plan.deterministic, plan.blob.decode())
        core = with_uniform_type(key.problem)
        whole: Plan = plan
        if provider is Provider.CUDNN_NHWC:
            whole = ChannelsLastPlan(key.product, with_natural_outsize(core), whole)
        if with_natural_outsize(core).output != core.output:
            whole = CropPlan(key.product, core, whole)
        return Candidate(_with_casts(key.product, key.problem, whole), choice, plan.close)


def _with_casts(operation: Product, problem: Problem, plan: Plan) -> Plan:
    return plan if problem.x.dtype == problem.W.dtype else CastPlan(operation, problem, plan)
