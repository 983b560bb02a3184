"""The operators that torch.compile, torch.export, torch.func and dispatch modes see."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deconvd_client
from deconvd_client import Connection, DeadlineError, InvalidArgumentError
from deconvd_client.frameworks.torch_connections import find_connection, name_of
from deconvd_client.torch import ConvTranspose2d
from tests.servers import ServerProcess

ARGUMENTS: tuple[Any, ...] = ([2, 1], [1, 0], [9, 7], [1, 1], 2)
BATCHES = [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, None, 0)]


@pytest.fixture(autouse=True)
def _compiled_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands() -> list[torch.Tensor]:
    """Return x, W and b."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 4, 5), (4, 2, 4, 3), (4,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def ours(F: Connection) -> Callable[..., Any]:
    def call(x: Any, W: Any, b: Any = None) -> Any:
        return F.deconvolution_2d(x, W, b, (2, 1), (1, 0), (9, None), groups=2)

    return call


def torchs(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.conv_transpose2d(
        x, W, b, stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2
    )


def loss(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: call(*inputs).pow(3).sum()


def test_the_operators_pass_torchs_own_checks(F: Connection) -> None:
    x, W, b = operands()
    gy = torch.randn_like(torchs(x, W), requires_grad=True)
    y, gradients = torch.ops.deconvd.deconvolution_2d, torch.ops.deconvd.deconvolution_2d_grad
    name = name_of(F)
    torch.library.opcheck(y, (name, x, W, b, *ARGUMENTS))
    torch.library.opcheck(y, (name, x, W, None, [2, 1], [1, 0], None, [1, 1], 2))
    for wanted in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(gradients, (name, x, W, gy, *ARGUMENTS, wanted))


def test_the_operators_differentiate_to_the_second_order(F: Connection) -> None:
    name = name_of(F)
    x = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    W = torch.randn(2, 1, 2, 1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(*inputs: Any) -> Any:
        return torch.ops.deconvd.deconvolution_2d(name, *inputs, [2, 1], [0, 0], [5, 1], [1, 1], 2)

    assert torch.autograd.gradcheck(call, (x, W, b))
    assert torch.autograd.gradgradcheck(call, (x, W, b))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_connections_functions_compile_whole(F: Connection, backend: str) -> None:
    inputs = operands()
    compiled = torch.compile(ours(F), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), torchs(*inputs))
    found = torch.autograd.grad(loss(compiled)(*inputs), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(loss(torchs)(*inputs), inputs))

    def gradients(x: Any, W: Any, gy: Any) -> Any:
        return F.deconvolution_2d_grad(x, W, None, gy, 2, wanted=("gx", "gW"))

    x, W = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    expected: Any = gradients(x, W, torch.ones(1, 1, 4, 4))
    whole = torch.compile(gradients, backend=backend, fullgraph=True)
    torch.testing.assert_close(whole(x, W, torch.ones(1, 1, 4, 4))[:2], expected[:2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_whole(F: Connection, dynamic: bool) -> None:
    layer = ConvTranspose2d(4, 4, 3, 2, output_padding=1, connection=F, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (2, 3):
        x = torch.randn(n, 4, 3 + n, 5, dtype=torch.float64, requires_grad=True)
        inputs = [x, *layer.parameters()]
        torch.testing.assert_close(compiled(x), layer(x))
        found = torch.autograd.grad(compiled(x).pow(3).sum(), inputs)
        torch.testing.assert_close(found, torch.autograd.grad(layer(x).pow(3).sum(), inputs))


# torch's own modules use what torch itself has deprecated; and a C++ compiler takes half a minute
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_a_layer_with_what_surrounds_it(F: Connection) -> None:
    layer = ConvTranspose2d(4, 4, 3, 2, connection=F)
    net = torch.nn.Sequential(torch.nn.Tanh(), layer, torch.nn.ReLU())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))


def test_compiled_calls_keep_connections_apart(server: ServerProcess, F: Connection) -> None:
    x, W, _ = operands()

    def call(connection: Connection, x: Any, W: Any) -> Any:
        return connection.deconvolution_2d(x, W, groups=2)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(F, x, W)
    with deconvd_client.connect(server.target, timeout_s=1e-6) as hasty:
        with pytest.raises(DeadlineError):
            compiled(hasty, x, W)
    compiled(F, x, W)


def test_names_say_how_to_trust_and_where_the_token_is(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    tls = deconvd_client.Tls(server_name="inner.example")
    with (
        deconvd_client.connect("gpu-host:1", token=tmp_path / "token", tls=tls) as by_path,
        deconvd_client.connect("gpu-host:1", token="secret", tls=False) as given,
    ):
        names = [name_of(by_path), name_of(given)]
    assert "secret" not in "".join(names)
    del by_path, given
    gc.collect()
    again = find_connection(names[0])
    name = name_of(again)
    again.close()

    assert json.loads(name) == json.loads(names[0])
    assert json.loads(name)["tls"]["server_name"] == "inner.example"


def test_names_say_how_to_connect_and_never_what_is_secret(server: ServerProcess) -> None:
    target = server.target
    with (
        deconvd_client.connect(target, timeout_s=7, tenant_key="secret") as first,
        deconvd_client.connect(target, timeout_s=7) as second,
    ):
        names = [name_of(first), name_of(second)]
        assert names[0] != names[1]
        assert [find_connection(name) for name in names] == [first, second]
        assert "secret" not in names[0]
        assert json.loads(names[1])["timeout_s"] == 7
    reference, name = weakref.ref(second), names[1]
    del first, second
    gc.collect()
    assert reference() is None  # the names keep no connection
    with find_connection(name) as again:
        assert again is find_connection(name)
        assert "timeout 7 s" in repr(again)
    with pytest.raises(InvalidArgumentError, match="connection must be a name"):
        find_connection("F")


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_is_exported(F: Connection, strict: bool) -> None:
    layer = ConvTranspose2d(4, 4, 3, 2, output_padding=1, connection=F, dtype=torch.float64)
    sizes = {"input": {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", max=64)}}
    program = torch.export.export(layer, (operands()[0],), dynamic_shapes=sizes, strict=strict)
    x = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), layer(x))


_LOAD = """
import sys, torch, deconvd_client.torch
program = torch.export.load(sys.argv[1])
x = torch.ones(2, 4, 4, 5, dtype=torch.float64)
print(program.module()(x).sum().item())
"""


def test_a_saved_program_connects_in_another_process(F: Connection, tmp_path: Path) -> None:
    layer = ConvTranspose2d(4, 4, 3, connection=F, dtype=torch.float64)
    x = torch.ones(2, 4, 4, 5, dtype=torch.float64)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(layer, (x,)), path)

    output = subprocess.check_output([sys.executable, "-c", _LOAD, str(path)], text=True)

    assert float(output) == pytest.approx(layer(x).sum().item())


@pytest.mark.parametrize("dims", BATCHES)
def test_vmap_batches_any_operand(F: Connection, dims: tuple[int | None, ...]) -> None:
    inputs = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, tensor + 1], dim)
        for tensor, dim in zip(operands(), dims, strict=True)
    ]
    call = ours(F)
    torch.testing.assert_close(
        torch.func.vmap(call, dims)(*inputs), torch.func.vmap(torchs, dims)(*inputs)
    )
    found = torch.func.vmap(torch.func.grad(loss(call), (0, 1, 2)), dims)(*inputs)
    expected = torch.func.vmap(torch.func.grad(loss(torchs), (0, 1, 2)), dims)(*inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "wanted", [[True, False, True], [False, True, False], [True, False, False]]
)
def test_the_operators_are_batched_too(F: Connection, wanted: list[bool]) -> None:
    x, W, _ = operands()
    name, gy = name_of(F), torch.ones_like(torchs(x, W))

    def call(x: Any, gy: Any) -> Any:
        return torch.ops.deconvd.deconvolution_2d_grad(name, x, W, gy, *ARGUMENTS, wanted)

    with torch.no_grad():
        found = torch.compile(torch.func.vmap(call), backend="eager")(
            torch.stack([x, x]), torch.stack([gy, 2 * gy])
        )
        expected = [call(x, gy), call(x, 2 * gy)]
    for index in (index for index in range(3) if wanted[index]):
        torch.testing.assert_close(found[index], torch.stack([e[index] for e in expected]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_func_differentiates_in_any_order(F: Connection) -> None:
    x, W, b = operands()
    found = torch.func.grad(loss(ours(F)), (0, 1, 2))(x, W, b)
    torch.testing.assert_close(found, torch.func.grad(loss(torchs), (0, 1, 2))(x, W, b))

    def second(call: Callable[..., Any]) -> Any:
        return torch.func.jacrev(torch.func.grad(lambda b: loss(call)(x, W, b)))(b)

    torch.testing.assert_close(second(ours(F)), second(torchs))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: ours(F)(x, W), (x,), (x,))


def test_autocast_reaches_the_operator(F: Connection) -> None:
    x, W, b = (tensor.detach().float() for tensor in operands())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.ops.deconvd.deconvolution_2d(name_of(F), x, W, b, *ARGUMENTS)
        compiled = torch.compile(ours(F), backend="aot_eager", fullgraph=True)
        assert compiled(x, W, b).dtype is torch.bfloat16
    assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("dims", BATCHES)
def test_vmap_maps_an_empty_batch(F: Connection, dims: tuple[int | None, ...]) -> None:
    inputs = [
        tensor if dim is None else torch.stack([tensor], dim).narrow(dim, 0, 0)
        for tensor, dim in zip(operands(), dims, strict=True)
    ]
    y = torch.func.vmap(ours(F), dims)(*inputs)
    assert y.shape == (0, *torchs(*operands()).shape)  # torch's own operator fails, or is wrong
    gradients = torch.func.vmap(torch.func.grad(loss(ours(F)), (0, 1, 2)), dims)(*inputs)
    assert [g.shape for g in gradients] == [(0, *o.shape) for o in operands()]


# what follows once torch gives up compiling the call
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning")
def test_wrong_arguments_are_named_in_compiled_functions_too(F: Connection) -> None:
    x, W, _ = (operand.detach() for operand in operands())
    gy = torch.ones_like(torchs(x, W))

    def compiled(call: Callable[..., Any]) -> Any:
        torch._dynamo.reset()
        return torch.compile(call, backend="eager")(x)

    wrong: Any = (1, 2, 3)
    with pytest.raises(InvalidArgumentError, match=r"stride must be an int or a pair"):
        compiled(lambda x: F.deconvolution_2d(x, W, None, wrong))
    with pytest.raises(InvalidArgumentError, match="outsize must be"):
        compiled(lambda x: F.deconvolution_2d(x, W, None, outsize=wrong))
    for names in (("gz",), "gx"):
        with pytest.raises(InvalidArgumentError, match="wanted must be a collection of names"):
            compiled(lambda x, names=names: F.deconvolution_2d_grad(x, W, None, gy, wanted=names))
    with pytest.raises(InvalidArgumentError, match="x must have 4 dimensions"):
        compiled(lambda x: F.deconvolution_2d(x[0], W, None, outsize=(9, None)))


def test_a_numpy_filter_is_compiled(F: Connection) -> None:
    x, W, _ = operands()
    array = W.detach().numpy()
    whole = torch.compile(
        lambda x: F.deconvolution_2d(x, array, None, 2, groups=2),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(whole(x), F.deconvolution_2d(x, W, None, 2, groups=2))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_nested_tensors_are_refused_by_name(F: Connection) -> None:
    x, W, _ = operands()
    nested: Any = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    with pytest.raises(InvalidArgumentError, match="x must be a dense tensor, got a nested tensor"):
        F.deconvolution_2d(nested, W, groups=2)


def test_what_only_a_kernel_could_take_is_refused_by_name(F: Connection) -> None:
    x, W, _ = operands()

    def put(x: Any) -> Any:
        with F.put(x):
            return x

    with pytest.raises(InvalidArgumentError, match="array must have elements in memory"):
        torch.func.vmap(put)(torch.stack([x, x]))
    with F.put(W) as there:
        with pytest.raises(InvalidArgumentError, match="W must be a torch tensor or a numpy array"):
            torch.func.vmap(
                lambda x: torch.fx.experimental.proxy_tensor.make_fx(
                    lambda x: F.deconvolution_2d(x, there, groups=2)
                )(x)
            )(x[None])
