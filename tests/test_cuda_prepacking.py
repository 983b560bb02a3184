"""The forms of a W that stays: made when they come again, counted, given up for want of room. No card is needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import DeviceMemory
from deconvd_server.device.cuda.plan import Plan, Prepacking
from deconvd_server.device.cuda.tensors.prepacked import PrepackedW, prepack
from deconvd_server.device.cuda.tensors.prepacking import PrepackedForms
from deconvd_server.device.cuda.tensors.tensor import CudaTensor

SPEC = TensorSpec((4, 3, 2, 2), np.dtype(np.float32))
FORM_BYTES = 1000


@dataclass
class Block:
    ptr: int


class Card:
    """The memory of a card that is nowhere, and a stream that notes what is enqueued on it."""

    pointer = 99

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self._next = 256
        self.memory = DeviceMemory(
            limit_bytes,
            self._allocate,
            allocate_resident=self._allocate,
            allocate_shared=self._allocate,
        )
        self.enqueued: list[tuple[int, int, int]] = []
        self.waits_count = 0

    def wait(self) -> None:
        self.waits_count += 1

    def tensor(self, *, may_grow: bool = True) -> Grown:
        """Return a tensor that counts what it grows by."""
        return Grown(CudaTensor(SPEC, "cuda:0", self.memory.lease_resident(SPEC.nbytes)), may_grow)

    def _allocate(self, size_bytes: int) -> Block:
        self._next += size_bytes + 256
        return Block(self._next)


class Grown:
    """A tensor and what it has grown by."""

    def __init__(self, tensor: CudaTensor, may_grow: bool) -> None:
        self.tensor = tensor
        self.grown_bytes = 0

        def grow(size_bytes: int) -> bool:
            self.grown_bytes += size_bytes if may_grow else 0
            return may_grow

        tensor.may_grow = grow


@dataclass
class PlainPlan:
    """A plan that takes W as it is."""

    name: str = "plain"
    deterministic: bool = True
    workspace_bytes: int = 0

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        raise AssertionError("nothing is executed here")


@dataclass
class PrepackingPlan(PlainPlan):
    """A plan that makes something of W first."""

    card: Card = field(default_factory=Card)
    inner: PlainPlan = field(default_factory=PlainPlan)
    error: Exception | None = None

    def prepacking(self) -> Prepacking | None:
        return Prepacking("form", FORM_BYTES, self._make, self.inner)

    def _make(self, W: int, form: int, stream: int) -> None:
        if self.error is not None:
            raise self.error
        self.card.enqueued.append((W, form, stream))


def ready(card: Card, W: CudaTensor, plan: Plan) -> PrepackedW:
    return prepack(W, "kind", lambda: plan, card.memory, card)


def test_what_comes_once_is_left_and_what_comes_again_is_made_once() -> None:
    card = Card()
    grown, plan = card.tensor(), PrepackingPlan(card=card)

    first = ready(card, grown.tensor, plan)
    assert first == PrepackedW(grown.tensor)
    assert grown.grown_bytes == 0
    later = [ready(card, grown.tensor, plan) for _ in range(3)]

    assert len(card.enqueued) == card.waits_count == 1
    assert grown.grown_bytes == FORM_BYTES
    ((W, form, stream),) = card.enqueued
    assert (W, stream) == (grown.tensor.pointer, card.pointer)
    for found in later:
        assert isinstance(found.W, CudaTensor)
        assert (found.W.pointer, found.plan, found.key) == (form, plan.inner, "form")


def test_forms_are_freed_with_their_tensor() -> None:
    card = Card()
    grown = card.tensor()
    for _ in range(2):
        ready(card, grown.tensor, PrepackingPlan(card=card))
    assert card.memory.stats.used_bytes == SPEC.nbytes + FORM_BYTES

    grown.tensor.free()

    assert card.memory.stats.used_bytes == 0


@pytest.mark.parametrize("limit_bytes", [1 << 20, SPEC.nbytes + 10])
def test_where_there_is_no_room_the_plan_makes_it_each_time(limit_bytes: int) -> None:
    card = Card(limit_bytes)
    grown = card.tensor(may_grow=limit_bytes < 1 << 20)

    for _ in range(5):
        assert ready(card, grown.tensor, PrepackingPlan(card=card)) == PrepackedW(grown.tensor)

    assert grown.grown_bytes == 0
    assert card.memory.stats.used_bytes == SPEC.nbytes


def test_a_making_that_fails_leaves_nothing_and_is_tried_again() -> None:
    card = Card()
    grown, plan = card.tensor(), PrepackingPlan(card=card, error=RuntimeError("no launch"))
    ready(card, grown.tensor, plan)
    with pytest.raises(RuntimeError, match="no launch"):
        ready(card, grown.tensor, plan)
    assert grown.grown_bytes == 0
    assert card.memory.stats.used_bytes == SPEC.nbytes

    plan.error = None
    assert [ready(card, grown.tensor, plan).key for _ in range(3)] == [None, "form", "form"]


def test_views_arrays_and_plans_that_take_W_as_it_is_have_no_forms() -> None:
    card = Card()
    tensor, array = card.tensor().tensor, np.zeros(SPEC.shape, SPEC.dtype)
    view = tensor.samples(0, 2)
    for _ in range(3):
        assert ready(card, tensor, PlainPlan()) == PrepackedW(tensor)
        assert ready(card, view, PrepackingPlan(card=card)) == PrepackedW(view)
        found = prepack(array, "kind", PrepackingPlan, card.memory, card)
        assert found.W is array
        assert found.plan is None


def test_no_plan_is_asked_for_a_tensor_that_never_grows() -> None:
    card = Card()
    tensor = CudaTensor(SPEC, "cuda:0", card.memory.lease_resident(SPEC.nbytes))

    def find_plan() -> Plan:
        raise AssertionError("nobody needs the plan yet")

    assert prepack(tensor, "kind", find_plan, card.memory, card) == PrepackedW(tensor)


def test_one_of_many_threads_makes_a_form() -> None:
    forms, barrier = PrepackedForms(), threading.Barrier(8)
    forms.claim_making("form")

    def ask() -> bool:
        barrier.wait(10)
        return forms.claim_making("form")

    with ThreadPoolExecutor(8) as pool:
        assert sum(future.result() for future in [pool.submit(ask) for _ in range(8)]) == 1
    assert forms.get("form") is None
