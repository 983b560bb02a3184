"""What the CUDA kernels share with Python, compared without a card: declarations, macros, names and arguments."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.layers import LAYERS
from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.kernels.launch import Grid, Kernel
from deconvd_server.device.cuda.kernels.structs import (
    STRUCTS,
    Convolution,
    KernelGeometry,
    declaration,
)
from deconvd_server.device.cuda.plan import Plan, Product
from tests.kernel_launches import FILES, FOLDER, H100, L4, launched, launches_of, plans_of, problems


def code(text: str) -> str:
    """Return C++ without its comments and strings."""
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\])*"', '""', text)


def text_of(file: str) -> str:
    return code((FOLDER / "kernels" / file).read_text())


def defined_names(text: str) -> set[str]:
    """Return the types, constants and template parameters that C++ defines."""
    names = set(re.findall(r"\bstruct (?:alignas\(.+\) )?(\w+)", text))
    names |= set(re.findall(r"\busing (\w+) =", text))
    for statement in re.findall(r"\bconstexpr \w+ ([^;(]*);", text):
        names |= set(re.findall(r"(\w+) = ", f"{statement} "))
    for statement in re.findall(r"\bconstexpr int ([^;{]*);", text):
        names |= set(re.findall(r"(\w+) = ", statement))
    for parameters in re.findall(r"\btemplate <([^>]*)>", text):
        names |= {parameter.split()[-1] for parameter in parameters.split(",") if parameter}
    return names


def used_names(text: str) -> set[str]:
    """Return the names of types and constants in C++; functions and variables begin with a small letter, or are W."""
    return set(re.findall(r"\b[A-Z]\w+", text))


def parameters_of(kernel: Kernel) -> list[str]:
    """Return the types of a kernel's parameters, as its file has them."""
    head = re.search(
        rf"__launch_bounds__\([^)]*\)\s+{kernel.name}\(([^)]*)\)", text_of(kernel.file)
    )
    assert head is not None, f"{kernel.file} has no kernel {kernel.name}"
    return [" ".join(p.replace("*", "* ").split()[:-1]) for p in head[1].split(",")]


def can_take(parameter: str, argument: type) -> bool:
    """Return whether a parameter is what an argument's bytes are."""
    if "*" in parameter:
        return argument is ctypes.c_void_p
    if issubclass(argument, ctypes.Structure):
        return parameter == argument.__name__
    return argument in {
        "int": (ctypes.c_int,),
        "unsigned": (ctypes.c_int,),
        "Index": (ctypes.c_longlong,),
        "long long": (ctypes.c_longlong,),
    }.get(parameter, ())


def test_all_files_are_where_their_launcher_looks() -> None:
    assert {path.parent for path in FOLDER.rglob("*.cu*") if path.suffix != ".pyc"} == {
        FOLDER / "kernels"
    }
    assert sorted(launched()) == FILES


@pytest.mark.parametrize("file", FILES)
def test_no_file_uses_a_name_that_nobody_defines(file: str) -> None:
    for kernel, _ in launched()[file]:
        macros = {name for name, _ in kernel.macros} | {"THREADS"}
        text = code(kernel.source)
        assert used_names(text) - defined_names(text) - macros == set(), kernel


@pytest.mark.parametrize("file", FILES)
def test_constants_that_python_gives_are_used_and_not_written_again(file: str) -> None:
    text = text_of(file)
    for kernel, _ in launched()[file]:
        names = [name for name, _ in kernel.macros]
        assert len(names) == len(set(names))
        assert {*names, "THREADS"} <= used_names(text), kernel
        assert not {*names, "THREADS"} & defined_names(text)


@pytest.mark.parametrize("file", FILES)
def test_a_files_kernels_are_launched_and_take_what_they_are_given(file: str) -> None:
    heads = re.findall(r"__launch_bounds__\(THREADS[^)]*\)\s+(\w+)\(", text_of(file))
    assert set(heads) == {kernel.name for kernel, _ in launched()[file]}
    assert len(heads) == text_of(file).count("__global__")
    for kernel, arguments in launched()[file]:
        parameters = parameters_of(kernel)
        assert len(parameters) == len(arguments), kernel
        assert all(map(can_take, parameters, arguments)), (kernel.name, parameters, arguments)


def parsed_fields(text: str) -> list[tuple[str, str]]:
    """Return the types and names of a declaration's fields."""
    body = re.search(r"\{(.*?)\}", text, re.DOTALL)
    assert body is not None
    return [(kind, name) for kind, name in re.findall(r"(\w+) (\w+);", body[1])]


def layout(text: str, known: dict[str, tuple[int, int]]) -> tuple[dict[str, int], tuple[int, int]]:
    """Return where C++ puts the fields of a declaration, and the size and alignment of all of it."""
    offsets, end, most = {}, 0, 1
    for kind, name in parsed_fields(text):
        size, alignment = known[kind]
        offsets[name] = end = -(-end // alignment) * alignment
        end += size
        most = max(most, alignment)
    return offsets, (-(-end // most) * most, most)


def test_declarations_put_each_field_where_ctypes_puts_it() -> None:
    known = {"int": (4, 4)}
    for struct in STRUCTS:
        text = declaration(struct)
        offsets, known[struct.__name__] = layout(text, known)
        assert offsets == {name: getattr(struct, name).offset for name in offsets}
        assert list(offsets) == [field[0] for field in struct._fields_]
        assert known[struct.__name__][0] == ctypes.sizeof(struct)
        assert f"static_assert(sizeof({struct.__name__}) == {ctypes.sizeof(struct)}," in text


def test_declarations_have_the_names_and_types_of_the_fields() -> None:
    assert parsed_fields(declaration(KernelGeometry)) == [
        *(("int", name) for name in ("samples", "output_channels", "groups")),
        ("Axis", "h"),
        ("Axis", "w"),
    ]
    assert declaration(Convolution).startswith("struct Convolution {\n    int samples;\n")


def test_a_field_whose_type_is_not_known_is_refused() -> None:
    class Wide(ctypes.Structure):
        _fields_ = [("count", ctypes.c_double)]

    with pytest.raises(TypeError, match="c_double"):
        declaration(Wide)


@pytest.mark.parametrize("file", FILES)
def test_declarations_come_before_the_text_that_the_compiler_is_given(file: str) -> None:
    (source,) = {kernel.source for kernel, _ in launched()[file]}
    ends = [source.index(declaration(struct)) for struct in STRUCTS]
    assert ends == sorted(ends)
    assert ends[-1] < source.index((FOLDER / "kernels/element.cuh").read_text())
    assert source.endswith((FOLDER / "kernels" / file).read_text())


def read_fields(text: str, structs: Sequence[type[ctypes.Structure]]) -> dict[str, set[str]]:
    """Return what a file reads of each variable that is one of the structures."""
    names = "|".join(struct.__name__ for struct in structs)
    variables = set(re.findall(rf"\b(?:{names}) &?(\w+)\b(?=[,)])", text))
    return {v: set(re.findall(rf"\b{v}\.(\w+)", text)) for v in variables}


def test_files_read_the_fields_that_structures_have_and_all_of_them() -> None:
    all_read: set[str] = set()
    for path in sorted((FOLDER / "kernels").glob("*.cu*")):
        text = code(path.read_text())
        for variable, fields in read_fields(text, STRUCTS).items():
            own = [s for s in STRUCTS if re.search(rf"\b{s.__name__} &?{variable}\b", text)]
            assert own
            assert fields <= {field[0] for struct in own for field in struct._fields_}, path.name
            all_read |= fields
        all_read |= set(re.findall(r"\b[gw]\.[hw]\.(\w+)", text))
    for struct in STRUCTS:
        assert {field[0] for field in struct._fields_} <= all_read, struct.__name__


def test_the_number_of_one_cards_processors_is_written_nowhere() -> None:
    sources = [path for path in FOLDER.rglob("*") if path.suffix in (".py", ".cu", ".cuh")]
    assert len(sources) > 30
    found = [path.name for path in sources if re.search(rf"\b{H100}\b", path.read_text())]
    assert found == []


def grids(plan: Plan) -> list[Grid]:
    return [launch.grid for launch in launches_of(plan)]


def described(plan: Plan) -> list[object]:
    """Return what a plan launches, in a form that can be compared."""
    return [
        (launch.kernel, launch.grid, launch.buffers, *map(bytes, launch.constants))
        for launch in launches_of(plan)
    ]


@pytest.mark.parametrize(
    ("layer_name", "operation"),
    [
        ("depthwise 64 64 k4 s2", Product.GW),
        ("generator 128-64 32", Product.GW),
        ("generator 1024-512 4", Product.GX),
    ],
)
def test_sums_are_cut_into_more_parts_where_there_are_more_processors(
    layer_name: str, operation: Product
) -> None:
    (layer,) = (replace(layer, n=16) for layer in LAYERS if layer.name == layer_name)
    problem = layer.problem(np.dtype(np.float16))
    by_count = {}
    for count in (1, L4, H100):
        by_count[count], _ = plans_of(operation, problem, count)
    one, few, many = by_count.values()
    assert one.workspace_bytes < few.workspace_bytes < many.workspace_bytes
    assert grids(few) != grids(many)


@pytest.mark.parametrize("operation", Product)
def test_plans_for_one_card_are_always_the_same(operation: Product) -> None:
    for problem in problems():
        first, second = (plans_of(operation, problem, H100) for _ in range(2))
        assert list(map(described, first)) == list(map(described, second))


@pytest.mark.parametrize("operation", Product)
def test_the_fallbacks_memory_does_not_depend_on_the_card(operation: Product) -> None:
    for problem in problems():
        small, large = (
            kernels.fallback(operation, problem, Options(), count) for count in (L4, H100)
        )
        assert small.workspace_bytes == large.workspace_bytes


def test_elements_are_moved_by_as_many_blocks_as_a_card_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[Grid] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, grid, *_: noted.append(grid))
    large = TensorSpec((64, 64, 256, 256), np.dtype(np.float32))
    for count in (L4, H100):
        kernels.add_bias(0, 0, large, 0, count)
        kernels.cast(0, large.dtype, 0, np.dtype(np.float16), 2**28, 0, count)
    small, _, large_card, _ = noted
    assert small[0] * H100 == large_card[0] * L4
    assert noted[0] == noted[1]


def random_problem(seed: int) -> Problem | None:
    draw = random.Random(seed)
    stride = draw.choice(range(1, 9)), draw.choice([*range(1, 9), 16, 32, 64])
    kernel = draw.randint(1, 9), draw.choice([1, 2, 3, 5, 8, 16, 64])
    dtype = draw.choice(ELEMENT_TYPES[:2])
    channels = draw.choice([8, 24, 64, 130]), draw.choice([3, 8, 40])
    x = TensorSpec((2, channels[0], 9, 8), dtype)
    W = TensorSpec((*channels, *kernel), dtype)
    try:
        return Problem(x, W, Geometry(stride, (draw.randint(0, 2), draw.randint(0, 5))))
    except InvalidArgumentError:
        return None


def test_tiles_of_images_are_whole_vectors_and_their_grids_cover_all_channels() -> None:
    widths = set()
    for problem in filter(None, map(random_problem, range(300))):
        for operation in Product:
            for plan in kernels.candidates(operation, problem, Options(), L4):
                for launch in launches_of(plan):
                    if launch.kernel.name != "pack_image":
                        continue
                    macros = dict(launch.kernel.macros)
                    stride_w, rows = int(macros["STRIDE_W"]), int(macros["ROWS"])
                    layout, lanes = launch.constants
                    assert not isinstance(lanes, ctypes.Structure)
                    assert rows * stride_w % 8 == 0
                    per_block = rows * stride_w
                    if macros["IN_REGISTERS"] == "1":
                        per_block *= int(lanes.value or 0)
                    channels = getattr(layout, "packed_channels")  # noqa: B009 - layouts of other kinds lack it
                    blocks = launch.grid[1]
                    assert (blocks - 1) * per_block < channels <= blocks * per_block
                    widths.add(stride_w)
    assert {1, 2, 3, 4, 8, 16} <= widths
