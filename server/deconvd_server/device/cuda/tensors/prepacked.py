"""Prepacks a resident W: keeps the form that a plan makes of it, for later calls. Needs no CUDA."""

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
"""Kinds of calls whose prepacking a tensor remembers."""


class _WaitableStream(Protocol):
    @property
    def pointer(self) -> int: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PrepackedW:
    """W as a call uses it.

    Attributes:
        W: W itself, or a form of it.
        plan: The plan that takes the form; None for W itself.
        key: The key of the form; None for W itself.
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
    """Return the form that a plan makes of W, if it is kept or is worth making now; else W itself.

    Args:
        kind: Identifies the plan.
        find_plan: Returns the plan.
        memory: Where a form's memory comes from. It counts as the tensor's growth.
        stream: Where a form is made. This waits for it.

    Raises as `find_plan` does, and as the plan does when it makes a form.
    """
    # Views have no forms, and a tensor that may not grow belongs to no session that could be charged for one.
    if not isinstance(W, CudaTensor) or W.prepacked is None or W.may_grow is refuse_growth:
        return PrepackedW(W)
    prepacking = _find_prepacking(W, kind, find_plan)
    if prepacking is None:
        return PrepackedW(W)
    form = W.prepacked.get(prepacking.key)
    if form is None and W.prepacked.claim_making(prepacking.key):
        form = _make_form(prepacking, W, W.prepacked, memory, stream)
    if form is None:
        return PrepackedW(W)
    spec = TensorSpec((prepacking.size_bytes,), np.dtype(np.uint8))
    form_of_W = CudaTensor(spec, W.device_id, form)
    return PrepackedW(form_of_W, prepacking.plan, prepacking.key)


def _find_prepacking(
    W: CudaTensor, kind: Hashable, find_plan: Callable[[], Plan]
) -> Prepacking | None:
    if kind in W.prepackings:
        return W.prepackings.get(kind)
    prepacking = prepacking_of(find_plan())
    if len(W.prepackings) >= _KINDS_COUNT:
        W.prepackings.clear()
    W.prepackings[kind] = prepacking
    return prepacking


def _make_form(
    prepacking: Prepacking,
    W: CudaTensor,
    forms: PrepackedForms,
    memory: DeviceMemory,
    stream: _WaitableStream,
) -> Lease | None:
    """Make a form and put it among the tensor's forms. Return None if there is no room for it.

    Each failure undoes the steps before it, in reverse: the lease, the growth, the claim.
    """
    size_bytes = prepacking.size_bytes
    if not W.may_grow(size_bytes):
        forms.give_up(prepacking.key)
        return None
    try:
        lease = memory.lease_resident(size_bytes)
    except BaseException as error:
        W.may_grow(-size_bytes)
        forms.give_up(prepacking.key)
        if isinstance(error, ExhaustedError):
            return None  # the call can do without the form
        raise
    try:
        prepacking.pack(W.pointer, lease.pointer, stream.pointer)
        stream.wait()  # other calls, on other streams, use the form as soon as it is put
    except BaseException:
        lease.free()
        W.may_grow(-size_bytes)
        forms.give_up(prepacking.key)
        raise
    forms.put(prepacking.key, lease)
    return lease
