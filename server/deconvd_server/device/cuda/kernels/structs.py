"""The structures that kernels take by value. Each is written once, in ctypes; its C++ declaration is made from that.

The declarations precede the text of every .cu file when it is compiled (launch.py). Needs no CUDA.
"""

from __future__ import annotations

import ctypes

__all__ = [
    "STRUCTS",
    "Axis",
    "Columns",
    "Convolution",
    "Correlation",
    "KernelGeometry",
    "PackedFilter",
    "PackedImage",
    "declaration",
]


def _integers(*names: str) -> list[tuple[str, type[ctypes.c_int]]]:
    return [(name, ctypes.c_int) for name in names]


class Axis(ctypes.Structure):
    """One axis of a problem.

    Attributes:
        image, kernel, output: Extents of x, W and y along the axis.
        tap_step, image_step: stride and dilate, divided by their greatest common divisor. Of the taps that reach an
            output pixel from an input pixel, each is `tap_step` after the one before, and its input pixel is
            `image_step` before that one's.
    """

    _fields_ = _integers(
        *("image", "kernel", "output", "stride", "pad", "dilate", "tap_step", "image_step")
    )


class KernelGeometry(ctypes.Structure):
    """The extents of a problem, as in `deconvd.problem`. Output channels are those of all groups together."""

    _fields_ = [
        *_integers("samples", "output_channels", "groups"),
        ("h", Axis),
        ("w", Axis),
    ]


class Columns(ctypes.Structure):
    """The columns of a chunk: some channels of each group, and some pixels of each of some samples.

    Attributes:
        begins, ends: Whether this is the first chunk that is summed to its output pixels, and whether it is the last.
    """

    _fields_ = _integers(
        *("first_sample", "samples", "first_channel", "channels", "first_pixel", "pixels"),
        *("begins", "ends"),
    )


class PackedImage(ctypes.Structure):
    """An image, and its packed form.

    Attributes:
        channels: Channels of a group.
        cut_h: Image row = packed row * stride + phase - cut_h. Along w, the cut is the macro CUT_W.
        packed_channels: Packed channels of a group: a multiple of 8.
    """

    _fields_ = _integers(
        *("samples", "groups", "channels"),
        *("image_h", "image_w", "cut_h"),
        *("packed_h", "packed_w", "packed_channels"),
    )


class PackedFilter(ctypes.Structure):
    """A filter, and its packed form.

    Attributes:
        inputs, outputs: Channels of a group.
        taps_h, taps_w: Taps of the convolution: kernel / stride, rounded up.
        packed_channels: Inputs, or outputs and phases, padded to a multiple of 8.
    """

    _fields_ = _integers(
        *("groups", "inputs", "outputs", "kernel_h", "kernel_w"),
        *("taps_h", "taps_w", "packed_channels"),
    )


class Convolution(ctypes.Structure):
    """A convolution of stride 1 of a packed source. Its domain has one pixel for each row of the product.

    Attributes:
        channels: Channels of a group of the source, padded to a multiple of 8.
        taps_h, step_h, offset_h: Source pixel = domain pixel + offset + tap * step; likewise along w.
        columns: Columns of a group: channels of the result times stride_h times stride_w.
        output_h, cut_h: Output pixel = domain pixel * stride + phase - cut; likewise along w.
        parts: Blocks that share the depth of a tile. add_parts adds their sums up.
    """

    _fields_ = _integers(
        *("samples", "groups", "source_h", "source_w", "channels", "domain_h", "domain_w"),
        *("taps_h", "taps_w", "step_h", "step_w", "offset_h", "offset_w", "columns"),
        *("output_h", "output_w", "cut_h", "cut_w", "parts"),
    )


class Correlation(ctypes.Structure):
    """A correlation of packed x and packed gy.

    Attributes:
        image_h, image_w: Size of x.
        rows: Packed channels of a group of x.
        inputs: Channels of a group of x, without padding.
        gy_h, gy_w, channels: Size of packed gy, and its channels of a group.
        taps_h, step_h, offset_h: Pixel of gy = pixel of x + offset + tap * step; likewise along w.
        steps: Stages of DEPTH pixels in a part.
    """

    _fields_ = _integers(
        *("samples", "groups", "image_h", "image_w", "rows", "inputs"),
        *("gy_h", "gy_w", "channels"),
        *("taps_h", "taps_w", "step_h", "step_w", "offset_h", "offset_w", "steps"),
    )


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    Axis,
    KernelGeometry,
    Columns,
    PackedImage,
    PackedFilter,
    Convolution,
    Correlation,
)
"""All structures. A structure comes after those that it consists of."""

_TYPES: dict[type, str] = {ctypes.c_int: "int"}


def declaration(struct: type[ctypes.Structure]) -> str:
    """Return the C++ declaration of a structure, and an assertion that it has the same size as in ctypes.

    Raises:
        TypeError: A field is neither an int nor a structure.
    """
    fields = "\n".join(f"    {_type_name(field[1])} {field[0]};" for field in struct._fields_)
    name, size = struct.__name__, ctypes.sizeof(struct)
    return (
        f"struct {name} {{\n{fields}\n}};\n"
        f'static_assert(sizeof({name}) == {size}, "{name} is as large as in Python");\n'
    )


def _type_name(field_type: type) -> str:
    if issubclass(field_type, ctypes.Structure):
        return field_type.__name__
    if field_type not in _TYPES:
        raise TypeError(f"no C++ type is known for {field_type.__name__}")
    return _TYPES[field_type]
