"""Files of arrays and images, as the command line reads them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import numpy as np
from PIL import Image

from deconvd.errors import InvalidArgumentError
from deconvd_client.cli.inputs import read_array
from tests.fuzz.case import Case, Seed
from tests.fuzz.target import Target

__all__ = ["ArrayFiles"]

_MOST_BYTES: Final = 64 << 20
"""More than the elements of any small file, also of a compressed one."""

_X = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)


def _npy(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz(*, is_compressed: bool) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if is_compressed else np.savez)(file, x=_X)
    return file.getvalue()


def _odd_npz() -> Iterator[bytes]:
    """Yield archives by other compressors, and with directories whose offsets are wrong."""
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x.npy", _npy(_X))
        yield file.getvalue()
    plain = _npz(is_compressed=False)
    begin = plain.rindex(b"PK\x05\x06")  # the end of the directory, with its size and its offset
    for number in (0, 1, 1 << 16, 0xFFFFFFFF):
        yield plain[: begin + 12] + number.to_bytes(4, "little") + plain[begin + 16 :]
        yield plain[: begin + 16] + number.to_bytes(4, "little") + plain[begin + 20 :]


def _png(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (5, 3), 7).save(file, "PNG")
    return file.getvalue()


def _safetensors() -> bytes:
    fields = {"x": {"dtype": "F32", "shape": [1, 2, 3, 4], "data_offsets": [0, _X.nbytes]}}
    text = json.dumps({"__metadata__": {"by": "nobody"}, **fields}).encode()
    return len(text).to_bytes(8, "little") + text + _X.tobytes()


def _headers() -> Iterator[bytes]:
    """Yield files of safetensors whose headers are valid JSON, and something else than they must be."""
    x = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in (
        [1, "x"],
        7,
        {"x": x | {"shape": [1e400]}},
        {"x": x | {"shape": [-1, -4]}},
        {"x": x | {"shape": [1 << 70, 0]}},
        {"x": x | {"shape": [1] * 70}},
        {"x": x | {"data_offsets": [1e400, 4]}},
        {"x": x | {"data_offsets": [0]}},
        {"x": x | {"dtype": ["F32"]}},
        {"x": [x]},
    ):
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + bytes(64)


def _seeds() -> Iterator[Seed]:
    arrays = (_X, np.asfortranarray(_X), _X.astype(np.float16), _X.view("V4").astype("V2"))
    files: list[tuple[str, bytes]] = [("npy", _npy(array)) for array in arrays]
    files += [("npz", _npz(is_compressed=flag)) for flag in (False, True)]
    files += [("png", _png(mode)) for mode in ("L", "RGB", "P")]
    files += [("npz", data) for data in _odd_npz()]
    files += [("safetensors", data) for data in (_safetensors(), _safetensors(), *_headers())]
    for kind, data in files:
        yield Seed(kind, [data], is_list=False)


class ArrayFiles(Target):
    """Files of all formats. Each is read, or refused by an InvalidArgumentError."""

    seeds = (*_seeds(),)
    bounded_count = 1500
    share = 4

    def feed(self, case: Case) -> None:
        path = self.directory / f"x.{case.kind}"
        path.write_bytes(case.parts[0])
        with suppress(InvalidArgumentError):
            array = read_array(str(path))
            assert array.nbytes <= _MOST_BYTES
            assert array.copy().shape == array.shape
