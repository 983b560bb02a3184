"""W in the form that its plan makes of it, where W stays and the form with it. Needs no CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from deconvd.errors import ExhaustedError
from deconvd.model.problem import TensorSpec
from deconvd_server.device.arriving import Operand
from deconvd_server.device.cuda.api.memory import DeviceMemory, Lease
from deconvd_server.device.cuda.plan import Plan, Prepacking, prepacking_of
from deconvd_server.device.cuda.tensors.prepacking import PrepackedForms
from deconvd_server.device.cuda.tensors.tensor import CudaTensor
from deconvd_server.device.tensor import Tensor, refuse_growth

__all__ = ["PrepackedW", "prepack"]

_KINDS_COUNT: Final = 64
"""Kinds of calls that a tensor remembers."""


class _WaitableStream(Protocol):
    @property
    def pointer(self) -> int: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PrepackedW:
    """W as a call has it.

    Attributes:
        W: Itself, or a form of it.
        plan: The plan for that form; None for the plan for W itself.
        key: The form's; None for W itself.
    """

    W: Operand
    plan: Plan | None = None
    key: Hashable = None


def prepack(
    W: Tensor,
    kind: Hashable,
    find_plan: Callable[[], Plan],
    memory: DeviceMemory,
    stream: _WaitableStream,
) -> PrepackedW:
    """Return W in the form that its plan makes of it if that is there, or worth making now; else itself.

    Args:
        kind: What tells the plan from others.
        find_plan: Returns the plan.
        memory: Where a form may lie, if the tensor may grow.
        stream: Where a form may be made; it is waited for then.

    Raises as `find_plan` does, and as the making of a form.
    """
    if not isinstance(W, CudaTensor) or W.prepacked is None or W.may_grow is refuse_growth:
        return PrepackedW(W)
    preparation = _find_prepacking(W, kind, find_plan)
    if preparation is None:
        return PrepackedW(W)
    form = W.prepacked.get(preparation.key)
    if form is None and W.prepacked.claim_making(preparation.key):
        form = _make_form(preparation, W, W.prepacked, memory, stream)
    if form is None:
        return PrepackedW(W)
    spec = TensorSpec((preparation.size_bytes,), np.dtype(np.uint8))
    form_of_W = CudaTensor(spec, W.device_id, form)
    return PrepackedW(form_of_W, preparation.plan, preparation.key)


def _find_prepacking(
    W: CudaTensor, kind: Hashable, find_plan: Callable[[], Plan]
) -> Prepacking | None:
    if kind in W.prepackings:
        return W.prepackings.get(kind)
    preparation = prepacking_of(find_plan())
    if len(W.prepackings) >= _KINDS_COUNT:
        W.prepackings.clear()
    W.prepackings[kind] = preparation
    return preparation


def _make_form(
    preparation: Prepacking,
    W: CudaTensor,
    forms: PrepackedForms,
    memory: DeviceMemory,
    stream: _WaitableStream,
) -> Lease | None:
    """Return a form, made and among the tensor's forms; None if there is no room for it."""
    size_bytes = preparation.size_bytes
    if not W.may_grow(size_bytes):
        forms.give_up(preparation.key)
        return None
    try:
        lease = memory.lease_resident(size_bytes)
    except BaseException as error:
        W.may_grow(-size_bytes)
        forms.give_up(preparation.key)
        if isinstance(error, ExhaustedError):
            return None
        raise
    try:
        preparation.pack(W.pointer, lease.pointer, stream.pointer)
        stream.wait()
    except BaseException:
        lease.free()
        W.may_grow(-size_bytes)
        forms.give_up(preparation.key)
        raise
    forms.put(preparation.key, lease)
    return lease
