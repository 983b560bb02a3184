"""The files that `deconvd run` reads and writes: their formats, and what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from deconvd_client import Connection, InvalidArgumentError
from deconvd_client.cli.inputs import read_array
from deconvd_client.cli.outputs import FileFormat, Output
from tests.client_command import COMMAND, deconvd, deconvd_bytes, environment_without
from tests.servers import ServerProcess

rng = np.random.default_rng(0)
X = rng.standard_normal((1, 3, 5, 6)).astype(np.float32)
W = rng.standard_normal((3, 3, 2, 2)).astype(np.float32)
BF16 = X.astype(ml_dtypes.bfloat16)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "W.npy", W)
    return tmp_path


def run(server: ServerProcess, files: Path, x: str, w: str, output: str, *more: str) -> None:
    """Run a call that must succeed."""
    outcome = deconvd("run", x, w, "-o", output, *more, "--target", server.target, cwd=files)
    assert outcome.returncode == 0, outcome.stderr


def save_safetensors(path: Path, **arrays: Any) -> None:
    """Write a file by the package ``safetensors``."""
    safetensors.numpy.save_file(arrays, path)


def npz_bytes(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    file = BytesIO()
    save(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["x.npz:x", "x.npz"])
def test_npz_files_are_read_by_the_name_of_an_array(
    tmp_path: Path, save: Callable[..., None], name: str
) -> None:
    others = {"other": W} if name == "x.npz:x" else {}
    save(tmp_path / "x.npz", x=X, **others)

    read = read_array(str(tmp_path / name))

    np.testing.assert_array_equal(read, X)
    assert not read.flags.writeable


@pytest.mark.parametrize("array", [X, X.astype(np.float16), X.astype(np.float64), X[:, :, :0]])
def test_safetensors_files_of_the_package_are_read(tmp_path: Path, array: Any) -> None:
    save_safetensors(tmp_path / "x.safetensors", first=W, x=array)

    read = read_array(f"{tmp_path}/x.safetensors:x")

    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


def test_arrays_of_other_layouts_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "fortran.npy", np.asfortranarray(X))
    np.save(tmp_path / "big.npy", X.astype(">f4"))

    for name in ("fortran.npy", "big.npy"):
        np.testing.assert_array_equal(read_array(str(tmp_path / name)), X)


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "x.npz:y").write_bytes(npz_bytes(x=X))

    np.testing.assert_array_equal(read_array(str(tmp_path / "x.npz:y")), X)


def test_the_formats_that_have_names_are_written_with_them(
    server: ServerProcess, F: Connection, files: Path
) -> None:
    expected = F.deconvolution_2d(X, W)

    run(server, files, "x.npy", "W.npy", "y.npz")
    run(server, files, "x.npy", "W.npy", "named.npz:result")
    run(server, files, "x.npy", "W.npy", "y.safetensors")

    np.testing.assert_array_equal(np.load(files / "y.npz")["y"], expected)
    np.testing.assert_array_equal(np.load(files / "named.npz")["result"], expected)
    read = safetensors.numpy.load_file(files / "y.safetensors")
    np.testing.assert_array_equal(read["y"], expected)


def test_bfloat16_is_kept_by_every_format_that_has_it(
    server: ServerProcess, F: Connection, files: Path
) -> None:
    expected = F.deconvolution_2d(BF16, W.astype(ml_dtypes.bfloat16))
    save_safetensors(files / "x.safetensors", x=BF16, W=W.astype(ml_dtypes.bfloat16))
    operands = ["x.safetensors:x", "x.safetensors:W"]

    for output in ("y.npy", "y.npz", "y.safetensors"):
        run(server, files, *operands, output)
        np.testing.assert_array_equal(read_array(str(files / output)), expected)
    assert safetensors.numpy.load_file(files / "y.safetensors")["y"].dtype == BF16.dtype


def test_gradients_are_written_as_safetensors(
    server: ServerProcess, F: Connection, files: Path
) -> None:
    gy = F.deconvolution_2d(X, W)
    np.save(files / "gy.npy", gy)

    run(server, files, "x.npy", "W.npy", "g.safetensors", "--grad", "gy.npy")

    written = safetensors.numpy.load_file(files / "g.safetensors")
    expected = F.deconvolution_2d_grad(X, W, None, gy)._asdict()
    assert set(written) == {"gx", "gW"}
    for name, array in written.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_an_image_is_scaled_in_and_clipped_out(
    server: ServerProcess, files: Path, mode: str, channels: int
) -> None:
    pixels = rng.integers(0, 256, (4, 5, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(files / "x.png")
    identity = np.eye(channels, dtype=np.float32)[:, :, np.newaxis, np.newaxis]
    np.save(files / "double.npy", identity * 2)

    run(server, files, "x.png", "double.npy", "y.npy")
    run(server, files, "x.png", "double.npy", "y.png")

    planes = pixels.transpose(2, 0, 1)[np.newaxis]
    np.testing.assert_allclose(np.load(files / "y.npy"), planes / 255 * 2, rtol=1e-6)
    with Image.open(files / "y.png") as image:
        assert image.mode == mode
        written = np.asarray(image).reshape(pixels.shape)
    np.testing.assert_array_equal(written, np.minimum(pixels.astype(int) * 2, 255))


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("RGBA", "an alpha channel"),
        ("LA", "an alpha channel"),
        ("P", "a palette"),
        ("1", "one bit a pixel"),
        ("I;16", "16 bits a channel"),
    ],
)
def test_an_image_of_another_kind_is_refused(tmp_path: Path, mode: str, reason: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.png")

    with pytest.raises(
        InvalidArgumentError, match=rf"8-bit gray or RGB image, and has {reason}\. Convert"
    ):
        read_array(str(tmp_path / "x.png"))


def test_an_image_with_a_transparent_color_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", transparency=(0, 0, 0))

    with pytest.raises(InvalidArgumentError, match="has a transparent color"):
        read_array(str(tmp_path / "x.png"))


def test_a_damaged_image_is_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InvalidArgumentError, match="is a damaged PNG image"):
        read_array(str(tmp_path / "x.png"))


def test_standard_streams_are_read_and_written(
    server: ServerProcess, F: Connection, files: Path
) -> None:
    expected = F.deconvolution_2d(X, W)
    command = ["run", "-", "W.npy", "-o", "-", "--target", server.target]

    plain = deconvd_bytes(*command, cwd=files, stdin=(files / "x.npy").read_bytes())
    archive = deconvd_bytes(
        *command, "--output-format", "npz", cwd=files, stdin=npz_bytes(np.savez_compressed, x=X)
    )

    assert plain.returncode == archive.returncode == 0
    np.testing.assert_array_equal(np.load(BytesIO(plain.stdout)), expected)
    np.testing.assert_array_equal(np.load(BytesIO(archive.stdout))["y"], expected)
    assert plain.stderr.endswith(b"; written to standard output\n")


def test_a_reader_that_goes_is_told_in_one_line(server: ServerProcess, files: Path) -> None:
    np.save(files / "large.npy", np.zeros((64, 3, 64, 64), np.float32))  # more than a pipe holds
    command = [*COMMAND, "run", "large.npy", "W.npy", "-o", "-", "--target", server.target]
    read_end, nobody_reads = os.pipe()
    os.close(read_end)

    outcome = subprocess.run(
        command, cwd=files, stdout=nobody_reads, stderr=subprocess.PIPE, text=True, check=False
    )

    os.close(nobody_reads)
    assert outcome.returncode == 1
    assert outcome.stderr == "Error: cannot write standard output: Broken pipe\n"


@pytest.mark.parametrize(
    "arguments", [["x.png", "W.npy", "-o", "y.npy"], ["x.npy", "W.npy", "-o", "y.png"]]
)
def test_without_pillow_images_are_refused_with_a_remedy(
    server: ServerProcess, files: Path, arguments: list[str]
) -> None:
    Image.new("RGB", (4, 4)).save(files / "x.png")
    environment = environment_without("PIL", files / "packages")

    outcome = deconvd(
        "run", *arguments, "--target", server.target, cwd=files, environment=environment
    )

    assert outcome.returncode == 1
    assert outcome.stderr == "Error: PNG files need Pillow: run pip install 'deconvd[cli]'\n"


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("y.txt", [], "y.txt must end in .npy, .npz, .safetensors, .png, or be -"),
        ("y", [], "y must end in .npy"),
        ("missing/y.npy", [], "there is no directory"),
        (".", [], ". is a directory"),
        ("x.npy", [], "x.npy is read as well: write to another file"),
        ("link.npy", [], "link.npy is read as well"),
        ("y.npy", ["--grad", "gy.npy"], "a .npy file holds one array, and --grad has several"),
        ("y.png", ["--grad", "gy.npy"], "a .png file holds one array, and --grad has several"),
        ("y.npz:z", ["--grad", "gy.npy"], "the gradients are called gx, gW and gb"),
        ("y.png", ["--stride", "9"], "y has the shape (2, 3, 38, 47)"),
        ("-", ["--json"], "--json prints to standard output, so -o must be a file"),
        ("-", ["--output-format", "gif"], "'gif' is not one of"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_call(
    files: Path, output: str, more: list[str], message: str
) -> None:
    (files / "link.npy").symlink_to("x.npy")
    np.save(files / "gy.npy", np.zeros((1, 3, 6, 7), np.float32))
    if "--stride" in more:
        np.save(files / "x.npy", np.concatenate([X, X]))
    before = {path: path.read_bytes() for path in files.iterdir()}

    outcome = deconvd(
        "run", "x.npy", "W.npy", "-o", output, *more, "--target", "unix:nobody", cwd=files
    )

    assert outcome.returncode == 2
    assert message in " ".join(outcome.stderr.split())
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_a_directory_that_is_not_writable_is_told(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere

    with pytest.raises(InvalidArgumentError, match="is not writable"):
        Output.parse(str(files / "y.npy"), FileFormat.NPY)


def test_operands_cannot_share_standard_input(files: Path) -> None:
    outcome = deconvd("run", "-", "-", "-o", "y.npy", cwd=files)

    assert outcome.returncode == 2
    assert "only one operand can come from standard input" in outcome.stderr


def header(**fields: Any) -> bytes:
    """Return a safetensors file without elements."""
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(dtype: str = "F32", shape: Any = (1,), data_offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(x=tensor(), y=tensor()), r"has 2 arrays\. Name one of them, as in .*:NAME: x, y"),
        (header(), r"has 0 arrays\. Name one of them, as in .*:NAME: none"),
        (header(x=tensor("I64")), "must be one of F16, BF16, F32, F64, got I64"),
        (header(x=tensor()), "damaged safetensors file: the elements of x are outside the file"),
        (header(x=tensor(data_offsets=(0, 0))), "promises 4 bytes of elements, and 0 follow"),
        (header(x=tensor(data_offsets=(-4, 0))), "the elements of x are outside the file"),
        (header(x=tensor(shape=(-1,), data_offsets=(0, 0))), "the elements of x are outside"),
        (header(x=tensor(shape="many")), "damaged safetensors file"),
        (header(x=3), "damaged safetensors file"),
        (header(x={}), "damaged safetensors file"),
        ((90).to_bytes(8, "little") + b"{", "damaged safetensors file"),
        (b"\x01" + bytes(7) + b"{", "damaged safetensors file"),
        (npz_bytes(x=X, y=X), r"has 2 arrays\. Name one of them"),
        (npz_bytes(x=X)[:200], r"is a damaged \.npz file: File is not a zip file"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)

    with pytest.raises(InvalidArgumentError, match=message):
        read_array(str(tmp_path / "file"))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_name_that_a_file_does_not_have_is_told_with_those_that_it_has(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(path, first=X, second=X)
    else:
        save_safetensors(path, first=X, second=X)

    with pytest.raises(
        InvalidArgumentError, match="has no array 'third', only these: first, second"
    ):
        read_array(f"{path}:third")


def test_a_compressed_member_that_is_damaged_is_refused(tmp_path: Path) -> None:
    content = bytearray(npz_bytes(np.savez_compressed, x=X))
    content[100:140] = bytes(40)
    (tmp_path / "x.npz").write_bytes(content)

    with pytest.raises(InvalidArgumentError, match=r"is a damaged \.npz file"):
        read_array(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_numpys_own_compression_is_read(tmp_path: Path, method: int) -> None:
    array = BytesIO()
    np.save(array, X)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("x.npy", array.getvalue())

    with pytest.raises(InvalidArgumentError, match="by another method than numpy's"):
        read_array(str(tmp_path / "x.npz"))


def test_a_single_array_has_no_names(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")

    with pytest.raises(
        InvalidArgumentError, match=r"has one array alone, so .*x\.npz:y names nothing"
    ):
        read_array(f"{tmp_path}/x.npz:y")
