"""The format safetensors: the size of a header, the header as JSON, then the elements of all tensors.

The package ``safetensors`` is not used: it copies each tensor into memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, Array
from deconvd.model.problem import TensorSpec
from deconvd_client.cli.mapped_file import MappedFile
from deconvd_client.cli.npy import map_elements
from deconvd_client.cli.npz import choose_member

__all__ = ["looks_like_safetensors", "read_safetensors", "safetensors_header"]

_DTYPES: Final[Mapping[str, np.dtype]] = {
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES_BY_DTYPE: Final = {dtype: name for name, dtype in _DTYPES.items()}

_SIZE_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""

_ALIGNMENT_BYTES: Final = 8
_METADATA: Final = "__metadata__"


def looks_like_safetensors(head: bytes) -> bool:
    """Return whether a file with these first bytes can be one."""
    size_bytes = int.from_bytes(head[:_SIZE_BYTES], "little")
    return head[_SIZE_BYTES : _SIZE_BYTES + 1] == b"{" and size_bytes <= _MAX_HEADER_BYTES


def read_safetensors(source: MappedFile, member: str | None) -> Array:
    """Return one tensor of a file.

    Raises:
        InvalidArgumentError: There is no such tensor, it has another element type, or the file is damaged.
    """
    path, _, mapping = source
    begin = _SIZE_BYTES + int.from_bytes(mapping[:_SIZE_BYTES], "little")
    try:
        header: Any = json.loads(mapping[_SIZE_BYTES:begin])
        names = [name for name in header if name != _METADATA]
    except (ValueError, RecursionError) as error:
        raise _damage_error(path, error) from None
    name = choose_member(path, member, names)
    try:
        dtype_name, shape = str(header[name]["dtype"]), tuple(map(int, header[name]["shape"]))
        first, last = map(int, header[name]["data_offsets"])
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise _damage_error(path, error) from None
    if dtype_name not in _DTYPES:
        raise InvalidArgumentError(
            f"the element type of {path}:{name} must be one of {', '.join(_DTYPES)}, got {dtype_name}"
        )
    try:
        if min((first, *shape)) < 0 or begin + last > len(mapping):
            raise ValueError(f"the elements of {name} are outside the file")
        return map_elements(
            mapping, begin + first, begin + last, TensorSpec(shape, _DTYPES[dtype_name])
        )
    except ValueError as error:
        raise _damage_error(path, error) from None


def safetensors_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return what comes before the elements of the tensors, which follow one another in this order."""
    fields: dict[str, object] = {}
    begin = 0
    for name, spec in specs.items():
        fields[name] = {
            "dtype": _NAMES_BY_DTYPE[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
        begin += spec.nbytes
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(_SIZE_BYTES, "little") + text


def _damage_error(path: str, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} is a damaged safetensors file: {error}")
