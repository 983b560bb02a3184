"""jax arrays, and the transformations of jax, against a real server and jax's own operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import deconvd_client
from deconvd_client import Connection, InvalidArgumentError

GEOMETRY: dict[str, Any] = {"stride": (2, 1), "pad": (1, 0), "dilate": (1, 2), "groups": 2}
TOLERANCES = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4, "float64": 1e-8}
"""Relative and absolute, for sums of some thirty products of numbers about one."""


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X, W, B = normal(0, 2, 4, 5, 6), normal(1, 4, 3, 3, 3), normal(2, 6)


def jax_deconvolution(x: Any, W: Any, b: Any) -> Any:
    """The same by jax's own convolution: of the dilated image by the flipped filter."""
    groups = GEOMETRY["groups"]
    c_I, c_O, *kernel = W.shape
    flipped = W[:, :, ::-1, ::-1].reshape(groups, c_I // groups, c_O, *kernel)
    flipped = jnp.swapaxes(flipped, 1, 2).reshape(groups * c_O, c_I // groups, *kernel)
    rims = [
        d * (k - 1) - p for k, p, d in zip(kernel, GEOMETRY["pad"], GEOMETRY["dilate"], strict=True)
    ]
    y = jax.lax.conv_general_dilated(
        x,
        flipped,
        window_strides=(1, 1),
        padding=[(rim, rim) for rim in rims],
        lhs_dilation=GEOMETRY["stride"],
        rhs_dilation=GEOMETRY["dilate"],
        feature_group_count=groups,
        precision="highest",
    )
    return y + b[:, None, None]


def assert_close(ours: Any, theirs: Any, dtype: Any = "float32") -> None:
    tolerance = TOLERANCES[np.dtype(dtype).name]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert isinstance(one, jax.Array)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        scale = 1 + np.abs(np.asarray(other, np.float64)).max(initial=0)
        np.testing.assert_allclose(
            np.asarray(one, np.float64),
            np.asarray(other, np.float64),
            rtol=0,
            atol=tolerance * scale,
        )


@pytest.fixture
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def f(F: Connection) -> Callable[..., Any]:
    return lambda x, W, b: F.deconvolution_2d(x, W, b, **GEOMETRY)


def has_tracer(*operands: Any) -> bool:
    return any(isinstance(operand, jax.core.Tracer) for operand in operands)


class CountingConnection(deconvd_client.Connection):
    """A connection that notes the gradients of each call for numpy arrays, and "y" for a deconvolution."""

    calls: list[Any]

    def deconvolution_2d(self, x: Any, *arguments: Any, **keywords: Any) -> Any:
        if not has_tracer(x, *arguments):
            self.calls.append("y")
        return super().deconvolution_2d(x, *arguments, **keywords)

    def deconvolution_2d_grad(self, x: Any, *arguments: Any, **keywords: Any) -> Any:
        if not has_tracer(x, *arguments):
            self.calls.append(keywords["wanted"])
        return super().deconvolution_2d_grad(x, *arguments, **keywords)


@pytest.fixture
def counting(F: Connection) -> CountingConnection:
    F.__class__ = CountingConnection
    assert isinstance(F, CountingConnection)
    F.calls = []
    return F


def all_of(f: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    """Return a function for y and all gradients of a loss that has second derivatives."""
    return lambda *operands: (
        f(*operands),
        jax.grad(lambda *given: (weight * f(*given) ** 2).sum(), argnums=(0, 1, 2))(*operands),
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_are_those_of_jax(
    f: Callable[..., Any], dtype: str, compiled: bool, request: pytest.FixtureRequest
) -> None:
    if dtype == "float64":
        request.getfixturevalue("x64")
    x, w, b = (jnp.asarray(np.asarray(a), dtype) for a in (X, W, B))
    change = jax.jit if compiled else lambda function: function
    weight = jnp.ones((), dtype)

    ours = change(all_of(f, weight))(x, w, b)

    assert_close(ours, all_of(jax_deconvolution, weight)(x, w, b), dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
def test_derivatives_of_the_second_order_pass(
    f: Callable[..., Any], x64: None, compiled: bool
) -> None:
    operands = [jnp.asarray(np.asarray(a), jnp.float64) for a in (X[:1], W, B)]
    check_grads(jax.jit(f) if compiled else f, operands, 2, modes=["rev", "fwd"])


def test_a_hessian_is_that_of_jax(f: Callable[..., Any]) -> None:
    def loss(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, W, b: jnp.tanh(function(x, W, b)).sum()

    operands = (X[:1, :, :2, :2], W[..., :2, :2], B)
    both = (0, 1)
    ours = jax.hessian(loss(f), both)(*operands)
    reverse = jax.jacrev(jax.grad(loss(f), both), both)(*operands)
    theirs = jax.hessian(loss(jax_deconvolution), both)(*operands)

    assert_close(ours, theirs)
    assert_close(reverse, theirs)


MAPPED = [
    (0, None, None),
    (None, 1, None),
    (2, 0, None),
    (0, None, 0),
    (None, 0, 1),
    (1, 1, 1),
    (None, None, 0),
]


@pytest.mark.parametrize("axes", MAPPED)
def test_a_batch_is_one_call(counting: CountingConnection, axes: tuple[int | None, ...]) -> None:
    def f(x: Any, W: Any, b: Any) -> Any:
        return counting.deconvolution_2d(x, W, b, **GEOMETRY)

    operands = [
        jnp.stack([(i + 1) * operand for i in range(3)], axis) if axis is not None else operand
        for operand, axis in zip((X, W, B), axes, strict=True)
    ]
    ours = jax.vmap(f, axes)(*operands)
    assert counting.calls == ["y"]
    assert_close(ours, jax.vmap(jax_deconvolution, axes)(*operands))

    weight = jnp.float32(1)
    mapped = jax.vmap(all_of(f, weight), axes)(*operands)
    assert_close(mapped, jax.vmap(all_of(jax_deconvolution, weight), axes)(*operands))
    nested = jax.vmap(jax.vmap(f, axes), (None, 0, None))(
        operands[0], jnp.stack([operands[1]] * 2), operands[2]
    )
    assert_close(nested, jnp.stack([ours] * 2))


@pytest.mark.parametrize("axis", [0, None])
def test_a_jacobian_is_that_of_jax(f: Callable[..., Any], axis: int | None) -> None:
    """The backward pass of each output, mapped: W or x is the same for all."""
    operands = (X[:1, :, :2, :2], W[..., :2, :2], B)
    change = jax.jacrev if axis is None else jax.jacfwd

    assert_close(
        change(f, argnums=(0, 1, 2))(*operands),
        change(jax_deconvolution, argnums=(0, 1, 2))(*operands),
    )


def test_an_empty_batch_is_mapped(f: Callable[..., Any]) -> None:
    operands = (jnp.zeros((0, *X.shape)), jnp.zeros((0, *W.shape)), B)
    weight = jnp.float32(1)
    assert_close(
        jax.vmap(all_of(f, weight), (0, 0, None))(*operands),
        jax.vmap(all_of(jax_deconvolution, weight), (0, 0, None))(*operands),
    )


@pytest.mark.parametrize(
    ("argnums", "wanted"),
    [((0,), [("gx",)]), ((1,), [("gW",)]), ((0, 1, 2), [("gx", "gW")]), ((2,), [])],
)
def test_gradients_that_nobody_needs_are_not_computed(
    counting: CountingConnection, argnums: tuple[int, ...], wanted: list[Any]
) -> None:
    def loss(x: Any, W: Any, b: Any) -> Any:
        return counting.deconvolution_2d(x, W, b, **GEOMETRY).sum()

    jax.block_until_ready(jax.jit(jax.grad(loss, argnums))(X, W, B))
    assert [call for call in counting.calls if call != "y"] == wanted
    counting.calls.clear()
    jax.grad(loss, argnums)(X, W, B)
    assert counting.calls == ["y", *wanted]


def test_explicit_gradients_can_be_traced(F: Connection) -> None:
    gy = F.deconvolution_2d(X, W, B, **GEOMETRY)
    plain = F.deconvolution_2d_grad(X, W, B, gy, **GEOMETRY)

    def compute(gy: Any) -> Any:
        return F.deconvolution_2d_grad(X, W, B, gy, **GEOMETRY)

    assert_close(jax.jit(compute)(gy), plain)
    alone = jax.jit(lambda gy: F.deconvolution_2d_grad(X, W, B, gy, **GEOMETRY, wanted=["gb"]))(gy)
    assert (alone.gx, alone.gW) == (None, None)
    assert_close(alone.gb, plain.gb)


def test_scan_and_remat_and_numpy_operands_work(f: Callable[..., Any]) -> None:
    numpy_W = np.asarray(W)
    _, ys = jax.lax.scan(lambda carry, x: (carry, f(x, numpy_W, B)), 0, jnp.stack([X, 2 * X]))
    assert_close(ys, jnp.stack([f(X, W, B), f(2 * X, W, B)]))
    gradient = jax.grad(lambda x: jax.checkpoint(f)(x, W, B).sum())
    assert_close(gradient(X), jax.grad(lambda x: jax_deconvolution(x, W, B).sum())(X))


def test_shards_make_calls_of_their_own(f: Callable[..., Any]) -> None:
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        lambda x: f(x, W, B), mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False
    )
    assert_close(jax.jit(mapped)(X), f(X, W, B))


def test_elements_are_not_copied_on_the_way_in(F: Connection) -> None:
    from deconvd_client.frameworks.jax import JaxFramework

    array = JaxFramework().to_array(X)
    assert array.ctypes.data == X.unsafe_buffer_pointer()
    assert F.put(X).numpy().tolist() == X.tolist()


@pytest.mark.parametrize("compiled", [False, True], ids=["grad", "jit"])
def test_wrong_arguments_are_named_at_once(
    f: Callable[..., Any], F: Connection, compiled: bool
) -> None:
    change = jax.jit if compiled else lambda g: jax.grad(lambda *a: g(*a).sum())
    with pytest.raises(InvalidArgumentError, match="W must have as many input channels"):
        change(f)(X, W[:2], B)
    with pytest.raises(InvalidArgumentError, match="b must have c_O elements"):
        change(f)(X, W, B[:1])
    with pytest.raises(
        InvalidArgumentError, match=r"W must be a jax or numpy array .* builtins\.list"
    ):
        change(lambda x: f(x, W.tolist(), B))(X)
    with pytest.raises(InvalidArgumentError, match="array must not be a tracer"):
        change(lambda x: F.put(x))(X)


def test_arrays_without_elements_are_refused(f: Callable[..., Any]) -> None:
    deleted = jnp.array(X)
    deleted.delete()
    with pytest.raises(InvalidArgumentError, match="x was deleted, or donated"):
        f(deleted, W, B)
    with pytest.raises(InvalidArgumentError, match="x must not be an array of random keys"):
        f(jax.random.key(0), W, B)
    with pytest.raises(InvalidArgumentError, match="random keys"):
        jax.jit(f)(jax.random.key(0), W, B)
    with pytest.raises(InvalidArgumentError, match="x must have one of the element types"):
        jax.jit(f)(X.astype(int), W, B)


def test_failures_keep_their_text() -> None:
    with deconvd_client.connect("unix:nobody-listens-here", fail_fast=True) as F:
        with pytest.raises(deconvd_client.UnavailableError):
            jax.grad(lambda x: F.deconvolution_2d(x, W).sum())(X)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"UnavailableError.*nobody-listens-here"
        ):
            jax.block_until_ready(jax.jit(lambda x: F.deconvolution_2d(x, W))(X))


def test_options_are_those_of_the_trace(F: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    call = deconvd_client.Connection.deconvolution_2d

    def note(self: Connection, *arguments: Any, **keywords: Any) -> Any:
        used.append(self.options.cudnn_deterministic)
        return call(self, *arguments, **keywords)

    monkeypatch.setattr(deconvd_client.Connection, "deconvolution_2d", note)

    def deterministic(x: Any) -> Any:
        with F.using_config("cudnn_deterministic", True):
            return F.deconvolution_2d(x, W)

    compiled = jax.jit(deterministic)
    jax.block_until_ready(compiled(X))
    jax.block_until_ready(compiled(X))
    assert used == [True, True, True]  # the trace, and two calls
    jax.grad(lambda x: deterministic(x).sum())(X)
    assert all(used)


def test_large_arrays_pass_through_callbacks(f: Callable[..., Any]) -> None:
    """Callbacks wait for their operands, which must not need the thread that waits."""
    x = jnp.ones((2, 4, 300, 300))
    assert_close(jax.jit(f)(x, W, B), jax_deconvolution(x, W, B))


def test_the_line_of_the_readme_works(F: Connection) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = (line.strip() for line in readme.splitlines() if line.startswith("    gW = jax.jit("))
    names: dict[str, Any] = {"F": F, "jax": jax, "x": np.asarray(X), "W": np.asarray(W)}
    exec(line, names)

    gy = np.ones_like(F.deconvolution_2d(np.asarray(X), np.asarray(W), stride=2, pad=1))
    assert_close(
        names["gW"], jnp.asarray(F.deconvolution_2d_grad(X, W, None, gy, stride=2, pad=1).gW)
    )
