"""Makes the plans that could serve a request: cuDNN's in both layouts, and our own kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice

from deconvd.model.options import UseCudnn
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
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.casting import CastPlan, with_uniform_type
from deconvd_server.device.cuda.plans.channels_last import ChannelsLastPlan
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.cost_model import (
    MEASURED_CAPABILITY,
    CostModel,
    Family,
    is_measured,
    order_families,
    worth_trying,
)
from deconvd_server.device.cuda.plans.crop import CropPlan, with_natural_outsize
from deconvd_server.device.cuda.plans.key import PlanKey

__all__ = ["Candidates"]

_SHORTLIST_COUNT = 2
"""Candidates of each provider that are tried if nothing is tuned."""

_TIMED_ENGINES_COUNT = 3
"""cuDNN's engines that are timed where the cost model cannot tell them from our plans."""

_FALLBACKS_COUNT = 16
"""Fallbacks that are remembered. They hold no memory of the card, and up to some thousand steps."""

_LAYOUTS = {Provider.CUDNN_NCHW: Layout.NCHW, Provider.CUDNN_NHWC: Layout.NHWC}


class Candidates:
    """Makes the plans that could serve a request. Thread-safe.

    Args:
        processors_count: Multiprocessors of the card that the plans are for.
        cost_model: Predicts how long plans take on such a card; None if nobody knows.
    """

    def __init__(
        self, cudnn: Cudnn, processors_count: int, cost_model: CostModel | None = None
    ) -> None:
        self._cudnn = cudnn
        self._processors_count = processors_count
        self._cost_model = cost_model
        # a call of a new problem needs it three times: for its size, for the prediction, and to stand in
        self._fallback_plan = lru_cache(_FALLBACKS_COUNT)(
            partial(kernels.fallback, processors_count=processors_count)
        )

    def contenders(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield the candidates that the cost model picks, the most promising first. None where it has no opinion.

        For deterministic results these are of all families, and cuDNN is asked when its turn comes. Else they are the
        few that may be the fastest: often one, and often none of cuDNN's, which is then not asked.
        """
        ours, predicted_ms = self._predict(key)
        is_steady = key.options.cudnn_deterministic
        count = _SHORTLIST_COUNT if is_steady else _TIMED_ENGINES_COUNT
        for family in order_families(predicted_ms) if is_steady else worth_trying(predicted_ms):
            if family is Family.CUDNN:
                yield from self._shortlist_cudnn(key, stream, count)
            else:
                yield ours[family]

    def stand_in(self, key: PlanKey, search_ms: float) -> tuple[Plan, float] | None:
        """Return a plan that may serve a key until its plan has been searched, and its predicted milliseconds.

        It is the fallback, which always runs, and compiles nothing. None where results must be those of the first call,
        where all plans are to be tried, where nothing is known, where one of our plans is picked at once, and where a
        search takes less than would be lost.

        Args:
            search_ms: What the search takes.
        """
        if key.options.cudnn_deterministic or key.options.autotune:
            return None
        ours, predicted_ms = self._predict(key)
        if Family.FALLBACK not in ours or self._is_picked_at_once(key, worth_trying(predicted_ms)):
            return None
        took_ms = predicted_ms[Family.FALLBACK]
        if took_ms - min(predicted_ms.values()) > search_ms:
            return None
        return ours[Family.FALLBACK].plan, took_ms

    def _is_picked_at_once(self, key: PlanKey, families: Sequence[Family]) -> bool:
        """Return whether only one family is worth a try, whose plan is ours and need not be compiled."""
        family, *others = families
        if others or family is Family.CUDNN:
            return False
        problem, count = with_uniform_type(key.problem), self._processors_count
        plans = kernels.candidates(key.product, problem, key.options, count)
        picked = [plan for plan in plans if plan.name == family][:1]
        return all(kernels.is_shipped(plan, MEASURED_CAPABILITY) for plan in picked)

    def _predict(self, key: PlanKey) -> tuple[dict[Family, Candidate], dict[Family, float]]:
        """Return our first plan of each family, and what the cost model predicts of those that may be used, in ms.

        Both are empty where it has no opinion.
        """
        problem, options = with_uniform_type(key.problem), key.options
        knows = is_measured(options) and problem.has_products
        knows = knows and options.use_cudnn is not UseCudnn.ALWAYS
        if self._cost_model is None or not knows:
            return {}, {}
        ours: dict[Family, Candidate] = {}
        for candidate in (*self.own_kernels(key), self.fallback(key)):
            if candidate.plan.workspace_bytes <= key.workspace_limit_bytes:
                ours.setdefault(Family(candidate.plan.name), candidate)
        families = {*ours, Family.FALLBACK}
        if options.use_cudnn is not UseCudnn.NEVER:
            families.add(Family.CUDNN)
        predicted_ms = self._cost_model.predict_ms(key.product, problem, options, families)
        if Family.FALLBACK not in ours:
            del predicted_ms[Family.FALLBACK]
        return ours, predicted_ms

    def shortlist(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield the few candidates that are tried if nothing is tuned, nor known: the most promising first.

        The last one always works.
        """
        if key.options.use_cudnn is not UseCudnn.NEVER:
            yield from self._shortlist_cudnn(key, stream, _SHORTLIST_COUNT)
        if key.options.use_cudnn is not UseCudnn.ALWAYS:
            yield from islice(self.own_kernels(key), _SHORTLIST_COUNT)
        yield self.fallback(key)

    def _shortlist_cudnn(self, key: PlanKey, stream: int, count: int) -> Iterator[Candidate]:
        for mode in (HeuristicMode.A, HeuristicMode.FALLBACK):
            ready = self.cudnn_engines(key, stream, Provider.CUDNN_NCHW, (mode,), compiling=False)
            has_any = False
            for candidate in islice(ready, count):
                has_any = True
                yield candidate  # before the next is built, which may not be wanted
            if has_any:
                return

    def list_all(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield every candidate that is worth timing: the most promising first, as time may run out.

        Engines that compile come last, because a single one of them may take all of the time.
        """
        uses_own = key.options.use_cudnn is not UseCudnn.ALWAYS
        uses_cudnn = key.options.use_cudnn is not UseCudnn.NEVER
        if uses_own:
            yield from self.own_kernels(key)
        if uses_cudnn:
            yield from self._cudnn_of_all_layouts(key, stream, (HeuristicMode.A,), compiling=False)
        if uses_own:
            yield self.fallback(key)
        if uses_cudnn:
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
        problem, count = with_uniform_type(key.problem), self._processors_count
        for plan in kernels.candidates(key.product, problem, key.options, count):
            names[plan.name] += 1
            yield self._own_candidate(key, plan, number=names[plan.name])

    def fallback(self, key: PlanKey) -> Candidate:
        """Return the plan that takes any problem."""
        problem = with_uniform_type(key.problem)
        plan = self._fallback_plan(key.product, problem, key.options)
        return replace(self._own_candidate(key, plan), always_runs=True)

    def cudnn_engines(
        self,
        key: PlanKey,
        stream: int,
        provider: Provider,
        modes: Sequence[HeuristicMode],
        *,
        compiling: bool,
    ) -> Iterator[Candidate]:
        """Yield cuDNN's plans in one layout, the best by its heuristics first. None if it cannot compute the product.

        Args:
            compiling: Whether to yield the engines that compile at run time, or the others.
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
                    continue  # heuristics propose engines that then refuse the problem
                yield self._cudnn_candidate(key, plan, provider)

    def restore(self, key: PlanKey, choice: Choice, get_stream: Callable[[], int]) -> Candidate:
        """Return the candidate of an earlier choice.

        Args:
            get_stream: Returns the calling thread's stream. Called for cuDNN's plans alone.

        Raises:
            CudnnError: cuDNN does not accept the blob.
            LookupError: This version has no kernel of that name.
        """
        if choice.provider is Provider.OWN:
            return self._own_by_name(key, choice.name)
        plan = CudnnPlan(
            self._cudnn,
            get_stream(),
            choice.blob.encode(),
            name=choice.name,
            deterministic=choice.deterministic,
        )
        return self._cudnn_candidate(key, plan, choice.provider)

    def _own_by_name(self, key: PlanKey, name: str) -> Candidate:
        for candidate in (*self.own_kernels(key), self.fallback(key)):
            if candidate.choice.name == name:
                return candidate
        raise LookupError(f"no kernel {name!r} for {key.product} of {key.problem}")

    def _own_candidate(self, key: PlanKey, plan: Plan, *, number: int = 1) -> Candidate:
        # Variants of one kernel have one name. The number tells them apart when a choice is restored.
        name = plan.name if number == 1 else f"{plan.name} {number}"
        choice = Choice(Provider.OWN, name, plan.deterministic)
        return Candidate(self._with_casts(key, plan), choice)

    def _cudnn_candidate(self, key: PlanKey, plan: CudnnPlan, provider: Provider) -> Candidate:
        choice = Choice(provider, plan.name, plan.deterministic, plan.blob.decode())
        core = with_uniform_type(key.problem)
        whole: Plan = plan
        if provider is Provider.CUDNN_NHWC:
            whole = ChannelsLastPlan(key.product, with_natural_outsize(core), whole)
        if with_natural_outsize(core).output != core.output:
            whole = CropPlan(key.product, core, whole)
        return Candidate(self._with_casts(key, whole), choice, plan.close)

    def _with_casts(self, key: PlanKey, plan: Plan) -> Plan:
        """Return a plan for a request, made of a plan for its problem in one element type."""
        problem = key.problem
        if problem.x.dtype == problem.W.dtype:
            return plan
        return CastPlan(key.product, problem, plan, self._processors_count)
