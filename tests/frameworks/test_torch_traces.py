"""Spans of calls with torch's tensors: backward has threads of its own, and its calls still have a parent."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch

from deconvd_client import Connection
from tests.span_recorder import SpanRecorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SpanRecorder:
    recorder = SpanRecorder()
    recorder.install(monkeypatch)
    return recorder


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    x, W = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3)
    return x.requires_grad_(), W.requires_grad_()


def test_backward_has_the_parent_of_its_own_thread(F: Connection, recorder: SpanRecorder) -> None:
    x, W = operands()
    with recorder.tracer.start_as_current_span("forward"):
        y: Any = F.deconvolution_2d(x, W)
    with recorder.tracer.start_as_current_span("backward"):
        y.sum().backward()

    assert recorder.parents() == [("Deconvolve", "forward"), ("DeconvolveGrad", "backward")]


def test_backward_in_a_thread_without_a_span_has_the_parent_of_forward(
    F: Connection, recorder: SpanRecorder
) -> None:
    x, W = operands()
    with recorder.tracer.start_as_current_span("forward"):
        y: Any = F.deconvolution_2d(x, W)
        (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    # as autograd's threads for each card
    thread = Thread(target=gx.square().sum().backward)
    thread.start()
    thread.join()

    parents = recorder.parents()
    assert len(parents) > 3
    assert {parent for _, parent in parents} == {"forward"}


def test_without_a_span_around_it_each_call_is_a_trace_of_its_own(
    F: Connection, recorder: SpanRecorder
) -> None:
    x, W = operands()
    y: Any = F.deconvolution_2d(x, W)
    y.sum().backward()

    assert recorder.parents() == [("Deconvolve", ""), ("DeconvolveGrad", "")]
