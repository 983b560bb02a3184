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
from deconvd_server.device.cuda.plan import Plan, Preparation, preparation_of
from deconvd_server.device.cuda.tensors.prepacking import Forms
from deconvd_server.device.cuda.tensors.tensor import CudaTensor
from deconvd_server.device.tensor import Tensor, never

__all__ = ["Prepared", "prepared"]

_KINDS_COUNT: Final = 64
"""Kinds of calls that a tensor remembers."""


class _Stream(Protocol):
    @property
    def pointer(self) -> int: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """W as a call has it.

    Attributes:
        W: Itself, or a form of it.
        plan: The plan for that form; None for the plan for W itself.
        key: The form's; None for W itself.
    """

    W: Operand
    plan: Plan | None = None
    key: Hashable = None


def prepared(
    W: Tensor,
    kind: Hashable,
    find_plan: Callable[[], Plan],
    memory: DeviceMemory,
    stream: _Stream,
) -> Prepared:
    """Return W in the form that its plan makes of it if that is there, or worth making now; else itself.

    Args:
        kind: What tells the plan from others.
        find_plan: Returns the plan.
        memory: Where a form may lie, if the tensor may grow.
        stream: Where a form may be made; it is waited for then.

    Raises as `find_plan` does, and as the making of a form.
    """
    if not isinstance(W, CudaTensor) or W.forms is None or W.may_grow is never:
        return Prepared(W)
    preparation = _preparation(W, kind, find_plan)
    if preparation is None:
        return Prepared(W)
    form = W.forms.get(preparation.key)
    if form is None and W.forms.is_to_be_made(preparation.key):
        form = _made(preparation, W, W.forms, memory, stream)
    if form is None:
        return Prepared(W)
    spec = TensorSpec((preparation.size_bytes,), np.dtype(np.uint8))
    form_of_W = CudaTensor(spec, W.device_id, form)
    return Prepared(form_of_W, preparation.plan, preparation.key)


def _preparation(
    W: CudaTensor, kind: Hashable, find_plan: Callable[[], Plan]
) -> Preparation | None:
    if kind in W.preparations:
        return W.preparations.get(kind)
    preparation = preparation_of(find_plan())
    if len(W.preparations) >= _KINDS_COUNT:
        W.preparations.clear()
    W.preparations[kind] = preparation
    return preparation


def _made(
    preparation: Preparation, W: CudaTensor, forms: Forms, memory: DeviceMemory, stream: _Stream
) -> Lease | None:
    """Return a form, made and among the tensor's forms; None if there is no room for it."""
    size_bytes = preparation.size_bytes
    if not W.may_grow(size_bytes):
        forms.give_up(preparation.key)
        return None
    try:
        lease = memory.take_to_stay(size_bytes)
    except BaseException as error:
        W.may_grow(-size_bytes)
        forms.give_up(preparation.key)
        if isinstance(error, ExhaustedError):
            return None
        raise
    try:
        preparation.make(W.pointer, lease.pointer, stream.pointer)
        stream.wait()
    except BaseException:
        lease.free()
        W.may_grow(-size_bytes)
        forms.give_up(preparation.key)
        raise
    forms.put(preparation.key, lease)
    return lease
