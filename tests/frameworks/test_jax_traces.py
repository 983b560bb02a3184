"""Spans of calls with jax's arrays, also of those in compiled functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from deconvd_client import Connection
from tests.span_recorder import SpanRecorder


def test_calls_of_a_compiled_function_have_the_parent_of_the_one_that_runs_it(
    F: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = SpanRecorder()
    recorder.install(monkeypatch)
    x, W = jnp.ones((1, 2, 4, 4)), jnp.ones((2, 2, 3, 3))

    def loss(x: Any, W: Any) -> Any:
        y: Any = F.deconvolution_2d(x, W)
        return y.sum()

    gradient = jax.jit(jax.grad(loss))
    for name in ("compiled here", "compiled already"):
        with recorder.tracer.start_as_current_span(name):
            gradient(x, W).block_until_ready()

    assert recorder.parents() == [
        ("DeconvolveGrad", "compiled here"),
        ("DeconvolveGrad", "compiled already"),
    ]
