"""Operands of the wrong kind: named, with the remedy, before anything is sent; and those that are right after all."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import deconvd
import deconvd_client
from deconvd_client import Connection, InvalidArgumentError
from deconvd_client.cli.inputs import read_array
from tests.servers import ServerProcess

X = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8)
W = np.ones((4, 1, 3, 3), np.float32)
B = np.ones(1, np.float32)
GY = np.ones((1, 1, 10, 10), np.float32)

WAYS: dict[str, Callable[[Connection, dict[str, Any]], object]] = {
    "deconvolution_2d": lambda F, a: F.deconvolution_2d(a["x"], a["W"], a["b"]),
    "deconvolution_2d_grad": lambda F, a: F.deconvolution_2d_grad(**a),
    "remote": lambda F, a: F.remote.deconvolution_2d(a["x"], a["W"], a["b"]),
    "remote_grad": lambda F, a: F.remote.deconvolution_2d_grad(**a),
    "vjp": lambda F, a: F.vjp(a["x"], a["W"], a["b"])[1](a["gy"]),
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (way, name)
        for way in WAYS
        for name in ("x", "W", "b", "gy")
        if name != "gy" or way not in ("deconvolution_2d", "remote")
    ],
)
def test_masked_arrays_are_refused(F: Connection, way: str, name: str) -> None:
    operands: dict[str, Any] = {"x": X, "W": W, "b": B, "gy": GY}
    operands[name] = np.ma.masked_equal(operands[name], 1)

    with pytest.raises(InvalidArgumentError, match=f"{name} must not be a masked array") as raised:
        WAYS[way](F, operands)

    assert f"{name}.filled(value)" in str(raised.value)
    assert raised.value.argument == name


def test_a_masked_array_is_not_put(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="array must not be a masked array"):
        F.put(np.ma.masked_equal(X, 1))


def test_other_subclasses_of_arrays_are_taken_as_they_are(F: Connection, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    np.testing.assert_array_equal(F.deconvolution_2d(mapped, W), F.deconvolution_2d(X, W))


class Strict(np.ndarray[Any, np.dtype[Any]]):
    """A subclass with methods of its own, as those for physical units have."""

    def reshape(self, *_: object, **__: object) -> Any:
        raise TypeError("reshape is not allowed")


@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_has_no_say_in_what_is_done_with_its_elements(F: Connection, way: str) -> None:
    operands = {"x": X, "W": W, "b": B, "gy": GY}

    WAYS[way](F, {name: array.view(Strict) for name, array in operands.items()})

    np.testing.assert_array_equal(F.put(X.view(Strict)).numpy(), X)


# of any length, where numpy has such a type
@pytest.mark.parametrize("kind", ["U", "T"] if hasattr(np.dtypes, "StringDType") else ["U"])
def test_text_is_refused_as_other_types_are(F: Connection, kind: str) -> None:
    text: Any = np.array(["a"], dtype=kind)

    for refused in (
        lambda: F.deconvolution_2d(text, W),
        lambda: F.put(text),
        lambda: F.empty(3, kind),
    ):
        with pytest.raises(InvalidArgumentError, match="must have one of the element types"):
            refused()


def test_an_array_of_too_many_dimensions_is_refused_here(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="array must have at most 8 dimensions, got 9"):
        F.put(np.ones((1,) * 9, np.float32))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1,) * 9, "shape must have at most 8 dimensions, got 9"),
        ((1,) * 100, r"shape must be an int or a sequence of ints, got \(1, 1"),
        (itertools.count(), "shape must be an int or a sequence of ints, got count"),
        ({2, 3}, "shape must be an int or a sequence of ints, got {2, 3}"),
        (b"ab", "shape must be an int or a sequence of ints, got b'ab'"),
        (-1, "shape: each dimension must be from 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["127.0.0.1:1", "dns:///nowhere.invalid:50051"])
def test_empty_refuses_what_is_no_shape(target: str, shape: Any, message: str) -> None:
    with (
        deconvd_client.connect(target, transport="grpc") as F,
        pytest.raises(InvalidArgumentError, match=message),
    ):
        F.empty(shape, np.float32)


def test_empty_refuses_types_also_while_no_server_is_known() -> None:
    with (
        deconvd_client.connect("dns:///nowhere.invalid:50051") as F,
        pytest.raises(InvalidArgumentError, match="dtype must have one of the element types"),
    ):
        F.empty(3, np.int64)


def test_a_pil_image_is_called_one_and_told_what_to_do(F: Connection) -> None:
    image: Any = Image.new("RGB", (8, 8))

    with pytest.raises(InvalidArgumentError) as raised:
        F.deconvolution_2d(image, W)

    assert "or a RemoteTensor, got a PIL image (Image): convert it" in str(raised.value)
    assert "numpy.asarray(x, numpy.float32)" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("x.npy"), r"got pathlib.PosixPath$"),
        ("x.npy", r"got str$"),
        (None, r"got NoneType$"),
        (b"1.5", r"got bytes$"),
        ({1.0, 2.0}, r"got set$"),
        (np.ndarray, r"got type$"),
    ],
    ids=str,
)
def test_what_is_no_array_is_named_with_the_remedy(F: Connection, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        F.deconvolution_2d(value, W)

    assert raised.value.argument == "x"
    assert (
        "x must be an array of numpy, cupy, PyTorch, JAX or Chainer, an object with __array__"
        in (str(raised.value))
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("padding", "pad"),
        ("Padding", "pad"),
        ("output_padding", "outsize"),
        ("out_size", "outsize"),
        ("dilation", "dilate"),
        ("strides", "stride"),
        ("group", "groups"),
        ("bias", "b"),
        ("weight", "W"),
        ("oustize", "outsize"),
    ],
)
def test_a_keyword_of_another_library_suggests_ours(F: Connection, given: str, meant: str) -> None:
    for function in (F.deconvolution_2d, F.remote.deconvolution_2d, F.vjp):
        call: Any = function
        with pytest.raises(TypeError) as raised:
            call(X, W, **{given: 1})

        assert str(raised.value) == (
            f"{call.__name__}() got unexpected keyword argument(s) '{given}'; "
            f"did you mean '{meant}' for '{given}'?"
        )


def test_several_keywords_are_sorted_and_those_without_a_likeness_left_alone(F: Connection) -> None:
    deconvolution_2d: Any = F.deconvolution_2d
    with pytest.raises(TypeError) as raised:
        deconvolution_2d(X, W, padding=1, zzz=1, dilation=2)

    assert str(raised.value) == (
        "deconvolution_2d() got unexpected keyword argument(s) 'dilation', 'padding', 'zzz'; "
        "did you mean 'dilate' for 'dilation', 'pad' for 'padding'?"
    )


@pytest.mark.parametrize("dtype", [np.float32, ">f8"])
def test_put_takes_a_matrix_as_the_array_that_it_is(F: Connection, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)

    there = F.put(array.view(np.matrix))
    elements = there.numpy()

    assert there.shape == (2, 3)
    assert type(elements) is np.ndarray
    np.testing.assert_array_equal(elements, array)


def test_put_of_a_remote_tensor_is_one_that_outlives_it(F: Connection) -> None:
    first = F.put(X)
    second = F.put(first)
    first.close()

    np.testing.assert_array_equal(second.numpy(), X)
    np.testing.assert_array_equal(F.deconvolution_2d(second, W), F.deconvolution_2d(X, W))
    with pytest.raises(InvalidArgumentError, match="closed"):
        F.put(first)


def test_put_of_a_result_that_exists_on_the_server_alone_outlives_it(F: Connection) -> None:
    with F.remote.deconvolution_2d(X, W) as y:
        again = F.put(y)

    np.testing.assert_array_equal(again.numpy(), F.deconvolution_2d(X, W))


def test_put_of_another_connections_tensor_fetches_it(F: Connection, server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as other:
        here = F.put(other.put(X))

    np.testing.assert_array_equal(here.numpy(), X)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_numpy_fetches_a_remote_tensor(F: Connection, dtype: Any) -> None:
    there = F.put(X.astype(dtype))

    for fetched in (np.asarray(there), np.array(there), np.ascontiguousarray(there)):
        assert fetched.dtype == dtype
        np.testing.assert_array_equal(fetched, X.astype(dtype))
    np.testing.assert_array_equal(np.add(there, 1), X.astype(dtype) + 1)


def test_numpy_makes_of_a_remote_tensor_the_type_that_is_asked_for(F: Connection) -> None:
    there = F.put(X)

    assert np.asarray(there, np.float64).dtype == np.float64
    assert np.asarray(there, dtype=int).dtype == int
    np.testing.assert_array_equal(np.asarray(there, np.float64), X)
    assert np.array(there, ndmin=5).shape == (1, *X.shape)


def test_an_array_without_a_copy_cannot_be_had(F: Connection) -> None:
    there = F.put(X)

    with pytest.raises(ValueError, match="without a copy"):
        there.__array__(copy=False)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="without a copy"):
            np.asarray(there, copy=False)


def test_a_closed_tensor_makes_no_array(F: Connection) -> None:
    there = F.put(X)
    there.close()

    with pytest.raises(InvalidArgumentError, match="closed"):
        np.asarray(there)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_is_one_connections_own_says_why_it_cannot_be_copied(
    F: Connection, duplicate: Callable[[object], object]
) -> None:
    there = F.put(X)
    _, pullback = F.vjp(X, W)

    for thing, kind in ((there, "RemoteTensor"), (pullback, "Pullback"), (F.remote, "Remote")):
        with pytest.raises(
            TypeError, match=f"a {kind} cannot be pickled or copied: it belongs to one connection"
        ):
            duplicate(thing)


@pytest.mark.parametrize("module", [deconvd, deconvd_client])
@pytest.mark.parametrize("name", ["deconvolution_2d", "deconvolution_2d_grad", "put"])
def test_a_function_looked_for_in_a_module_leads_to_the_connection(module: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'.*connect") as raised:
        getattr(module, name)

    assert "deconvd_client" in str(raised.value)


def test_connect_of_the_wrong_module_names_the_right_one() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", "import deconvd; deconvd.connect('unix:s')"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("AttributeError: module 'deconvd' has no attribute 'connect'")
    assert "deconvd_client" in last


def test_other_attributes_are_missed_as_ever() -> None:
    with pytest.raises(AttributeError, match="'deconvd_client' has no attribute 'nonsense'"):
        deconvd_client.nonsense  # type: ignore[attr-defined]  # noqa: B018 - looking is the test
    assert not hasattr(deconvd, "nonsense")


@pytest.mark.parametrize("form", ["JPEG", "GIF", "BMP", "TIFF", "WebP"])
def test_an_image_given_for_an_array_is_called_what_it_is(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x.npy"
    Image.new("RGB", (8, 8)).save(path, format=form)

    with pytest.raises(InvalidArgumentError) as raised:
        read_array(str(path))

    assert f"is not an .npy, .npz, .safetensors or PNG file: it is a {form} image" in str(
        raised.value
    )
    assert "pickle" not in str(raised.value)


def test_a_pickle_is_called_one_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(pickle.dumps(X))

    with pytest.raises(InvalidArgumentError, match=r"it is a pickle\. Write the array"):
        read_array(str(tmp_path / "x.npy"))


def whole_file(tmp_path: Path, array: Any = X) -> bytes:
    np.save(tmp_path / "whole.npy", array)
    return (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: b"hello", "its format is unknown. Write the array"),
        (lambda data: data[:20], "EOF: reading array header"),
        (lambda data: data[:-5], "numbers: .*"),
        (lambda data: data.replace(b"'<f4'", b"'<f9'"), "'<f9'"),
        (lambda data: data.replace(b"}", b"("), "numbers: .*"),
        (
            lambda data: data[:6] + b"\2\0" + b"\x20\x4e\0\0" + b" " * 20000,
            "its header is too long",
        ),
    ],
)
def test_a_damaged_file_is_refused_without_advice_to_trust_it(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(damage(whole_file(tmp_path)))

    with pytest.raises(InvalidArgumentError, match=message) as raised:
        read_array(str(path))

    assert "is not an .npy" in str(raised.value)
    assert "pickle" not in str(raised.value)


def test_an_array_of_objects_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)

    with pytest.raises(InvalidArgumentError, match="numbers: it has Python objects") as raised:
        read_array(str(tmp_path / "x.npy"))

    assert "pickle" not in str(raised.value)


def test_the_command_calls_an_image_an_image(server: ServerProcess, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.gif")
    command = [sys.executable, "-m", "deconvd_client.cli", "run", "x.gif", "x.gif", "-o", "y.npy"]

    outcome = subprocess.run(
        [*command, "--target", server.target],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert outcome.returncode in (1, 2)
    assert (
        "x.gif is not an .npy, .npz, .safetensors or PNG file: it is a GIF image" in outcome.stderr
    )
    assert "pickle" not in outcome.stderr
