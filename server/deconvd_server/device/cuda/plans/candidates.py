"""The plans that could serve a request: cuDNN's in both layouts, and our own kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from deconvd.options import UseCudnn
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.casting import CastPlan, uniform
from deconvd_server.device.cuda.channels_last import ChannelsLastPlan
from deconvd_server.device.cuda.cudnn import Cudnn, CudnnError, CudnnPlan, Layout, Rules, Search
from deconvd_server.device.cuda.cudnn.enums import Mode
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.candidate import Candidate
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.window import WindowPlan, enlarged

__all__ = ["Candidates"]

_FEW = 2

_LAYOUTS = {Provider.CUDNN_NCHW: Layout.NCHW, Provider.CUDNN_NHWC: Layout.NHWC}


class Candidates:
    """Makes the plans that could serve a request. Thread-safe.

    Args:
        processors_count: Multiprocessors of the card that the plans are for.
    """

    def __init__(self, cudnn: Cudnn, processors_count: int) -> None:
        self._cudnn = cudnn
        self._processors_count = processors_count

    def promising(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield the few candidates that are tried where nothing is tuned: the likely best first.

        The last one always works.
        """
        if key.options.use_cudnn is not UseCudnn.NEVER:
            yield from self._promising_of_cudnn(key, stream)
        if key.options.use_cudnn is not UseCudnn.ALWAYS:
            yield from islice(self.own(key), _FEW)
        yield self.fallback(key)

    def _promising_of_cudnn(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        for mode in (Mode.A, Mode.FALLBACK):
            ready = self.cudnn(key, stream, Provider.CUDNN_NCHW, (mode,), compiling=False)
            few = list(islice(ready, _FEW))
            yield from few
            if few:
                return

    def all(self, key: PlanKey, stream: int) -> Iterator[Candidate]:
        """Yield every candidate that is worth timing: the likely best first, as time may run out.

        Those that compile come last, as a single one of them may take all of it.
        """
        own = key.options.use_cudnn is not UseCudnn.ALWAYS
        cudnn = key.options.use_cudnn is not UseCudnn.NEVER
        if own:
            yield from self.own(key)
        if cudnn:
            yield from self._of_cudnn(key, stream, (Mode.A,), compiling=False)
        if own:
            yield self.fallback(key)
        if cudnn:
            more = (Mode.B, Mode.FALLBACK)
            yield from self._of_cudnn(key, stream, more, compiling=False)
            yield from self._of_cudnn(key, stream, (Mode.A, *more), compiling=True)

    def _of_cudnn(
        self, key: PlanKey, stream: int, modes: Sequence[Mode], *, compiling: bool
    ) -> Iterator[Candidate]:
        for provider in _LAYOUTS:
            yield from self.cudnn(key, stream, provider, modes, compiling=compiling)

    def own(self, key: PlanKey) -> Iterator[Candidate]:
        """Yield our own kernels, the most promising first."""
        names = Counter[str]()
        problem, count = uniform(key.problem), self._processors_count
        for plan in kernels.candidates(key.operation, problem, key.options, count):
            names[plan.name] += 1
            yield self._own_candidate(key, plan, number=names[plan.name])

    def fallback(self, key: PlanKey) -> Candidate:
        """Return the plan that takes any problem."""
        problem = uniform(key.problem)
        plan = kernels.fallback(key.operation, problem, key.options, self._processors_count)
        return self._own_candidate(key, plan)

    def cudnn(
        self,
        key: PlanKey,
        stream: int,
        provider: Provider,
        modes: Sequence[Mode],
        *,
        compiling: bool,
    ) -> Iterator[Candidate]:
        """Yield cuDNN's plans in one layout, its best first; none if it cannot do the operation.

        Args:
            compiling: Whether those that compile at run time are wanted, or the others.
        """
        problem = enlarged(uniform(key.problem))
        layout = _LAYOUTS[provider]
        rules = Rules.of(problem, key.options, compiling=compiling)
        try:
            search = Search(self._cudnn, stream, key.operation, problem, layout)
        except CudnnError:
            return
        with search:
            for proposal in search.proposals(rules, modes):
                try:
                    plan = search.build(proposal)
                except CudnnError:
                    continue  # heuristics propose more than engines can do
                yield self._cudnn_candidate(key, plan, provider)

    def revived(self, key: PlanKey, choice: Choice, stream: int) -> Candidate:
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
        for candidate in (*self.own(key), self.fallback(key)):
            if candidate.choice.name == name:
                return candidate
        raise LookupError(f"there is no kernel {name!r} for it")

    def _own_candidate(self, key: PlanKey, plan: Plan, *, number: int = 1) -> Candidate:
        # a choice must tell variants of one name apart
        name = plan.name if number == 1 else f"{plan.name} {number}"
        choice = Choice(Provider.OWN, name, plan.deterministic)
        return Candidate(self._cast(key, plan), choice)

    def _cudnn_candidate(self, key: PlanKey, plan: CudnnPlan, provider: Provider) -> Candidate:
        choice = Choice(provider, plan.name, plan.deterministic, plan.blob.decode())
        core = uniform(key.problem)
        whole: Plan = plan
        if provider is Provider.CUDNN_NHWC:
            whole = ChannelsLastPlan(key.operation, enlarged(core), whole)
        if enlarged(core).output != core.output:
            whole = WindowPlan(key.operation, core, whole)
        return Candidate(self._cast(key, whole), choice, plan.close)

    def _cast(self, key: PlanKey, plan: Plan) -> Plan:
        """Return a plan for a request, made of one for its operands in one element type."""
        problem = key.problem
        if problem.x.dtype == problem.W.dtype:
            return plan
        return CastPlan(key.operation, problem, plan, self._processors_count)
