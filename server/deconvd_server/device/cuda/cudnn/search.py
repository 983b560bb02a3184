"""Searches for engines: lists what cuDNN's heuristics propose for an operation, and builds plans of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.cudnn.convolution import Layout, operation_graph
from deconvd_server.device.cuda.cudnn.descriptor import Descriptor, DescriptorScope
from deconvd_server.device.cuda.cudnn.enums import (
    Attribute,
    AttributeType,
    BehaviorNote,
    DescriptorType,
    HeuristicMode,
    NumericalNote,
)
from deconvd_server.device.cuda.cudnn.library import Cudnn, CudnnError
from deconvd_server.device.cuda.cudnn.plan import CudnnPlan
from deconvd_server.device.cuda.plan import Product

__all__ = ["EngineProposal", "EngineRules", "EngineSearch", "Layout"]


@dataclass(frozen=True, slots=True)
class EngineRules:
    """The rules by which engines are selected.

    Attributes:
        unwanted: Notes that rule an engine out.
        compiling: True for engines that compile kernels at run time, which takes 0.25 to 8 s; False for the others.
    """

    unwanted: frozenset[NumericalNote]
    compiling: bool

    @classmethod
    def of(cls, problem: Problem, options: Options, *, compiling: bool) -> EngineRules:
        """Return the rules that keep results as exact as `Options` and the reference promise."""
        unwanted = {NumericalNote.DOWN_CONVERT_INPUTS, NumericalNote.REDUCED_PRECISION_REDUCTION}
        if options.cudnn_deterministic:
            unwanted.add(NumericalNote.NONDETERMINISTIC)
        if problem.x.dtype == problem.compute_type and not options.allow_tf32:
            unwanted.add(NumericalNote.TENSOR_CORE)  # on float32 that note means TF32
        if problem.x.dtype.itemsize == 8:
            unwanted.discard(NumericalNote.TENSOR_CORE)  # float64 loses nothing on tensor cores
        if options.use_cudnn_tensor_core is UseCudnnTensorCore.NEVER:
            unwanted.add(NumericalNote.TENSOR_CORE)
        return cls(frozenset(unwanted), compiling)


@dataclass(frozen=True, slots=True)
class EngineProposal:
    """An engine with its settings, as the heuristics propose it.

    Attributes:
        config: The descriptor. It lives as long as the search.
        engine: The engine's number.
        notes: How the engine's numbers differ from plain arithmetic.
        compiles: Whether it compiles kernels when its plan is built.
    """

    config: Descriptor
    engine: int
    notes: frozenset[NumericalNote]
    compiles: bool


class EngineSearch:
    """A search for plans of one product in one layout, for the length of a with-block.

    Args:
        stream: A stream whose handle may be used meanwhile.

    Raises:
        CudnnError: cuDNN does not support the product.
    """

    def __init__(
        self, cudnn: Cudnn, stream: int, product: Product, problem: Problem, layout: Layout
    ) -> None:
        self._cudnn = cudnn
        self._stream = stream
        self._layout = layout
        with ExitStack() as stack:
            self._scope = stack.enter_context(DescriptorScope(cudnn))
            handle = cudnn.handle(stream)
            with handle.lock:
                self._graph = operation_graph(self._scope, handle.pointer, product, problem, layout)
            self._stack = stack.pop_all()

    def __enter__(self) -> EngineSearch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def proposals(
        self, rules: EngineRules, modes: Sequence[HeuristicMode]
    ) -> Iterator[EngineProposal]:
        """Yield the proposals of each mode's heuristics that the rules allow, the best first."""
        for mode in modes:
            for config in self._configs(mode):
                proposal = self._proposal(config)
                if _is_allowed(proposal, rules):
                    yield proposal

    def build(self, proposal: EngineProposal) -> CudnnPlan:
        """Return a plan of the proposed engine.

        Raises:
            CudnnError: The engine does not support the product after all.
        """
        return CudnnPlan(
            self._cudnn,
            self._stream,
            self._serialize_plan(proposal),
            name=f"cudnn {self._layout} engine {proposal.engine}",
            deterministic=NumericalNote.NONDETERMINISTIC not in proposal.notes,
        )

    def _serialize_plan(self, proposal: EngineProposal) -> bytes:
        handle = self._cudnn.handle(self._stream)
        with DescriptorScope(self._cudnn) as scope, handle.lock:
            plan = scope.new(DescriptorType.EXECUTION_PLAN)
            plan.set(Attribute.EXECUTION_PLAN_HANDLE, AttributeType.HANDLE, handle.pointer)
            plan.set(
                Attribute.EXECUTION_PLAN_ENGINE_CONFIG,
                AttributeType.BACKEND_DESCRIPTOR,
                proposal.config.address,
            )
            plan.finalize()
            return plan.get_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION)

    def _configs(self, mode: HeuristicMode) -> list[Descriptor]:
        heuristics = self._scope.new(DescriptorType.ENGINEHEUR)
        heuristics.set(
            Attribute.ENGINEHEUR_OPERATION_GRAPH,
            AttributeType.BACKEND_DESCRIPTOR,
            self._graph.address,
        )
        heuristics.set(Attribute.ENGINEHEUR_MODE, AttributeType.HEUR_MODE, mode)
        try:
            heuristics.finalize()
            count = heuristics.count(Attribute.ENGINEHEUR_RESULTS, AttributeType.BACKEND_DESCRIPTOR)
        except CudnnError as error:
            if error.is_unsupported:
                return []
            raise
        configs = [self._scope.new(DescriptorType.ENGINECFG) for _ in range(count)]
        return configs[: heuristics.get_into(Attribute.ENGINEHEUR_RESULTS, configs)]

    def _proposal(self, config: Descriptor) -> EngineProposal:
        engine = self._scope.new(DescriptorType.ENGINE)
        config.get_into(Attribute.ENGINECFG_ENGINE, [engine])
        notes = engine.get(
            Attribute.ENGINE_NUMERICAL_NOTE, AttributeType.NUMERICAL_NOTE, len(NumericalNote)
        )
        behaviors = engine.get(Attribute.ENGINE_BEHAVIOR_NOTE, AttributeType.BEHAVIOR_NOTE, 16)
        return EngineProposal(
            config,
            engine.get(Attribute.ENGINE_GLOBAL_INDEX, AttributeType.INT64)[0],
            frozenset(NumericalNote(note) for note in notes),
            BehaviorNote.RUNTIME_COMPILATION in behaviors,
        )


def _is_allowed(proposal: EngineProposal, rules: EngineRules) -> bool:
    return not proposal.notes & rules.unwanted and proposal.compiles == rules.compiling
