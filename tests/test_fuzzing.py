"""Damaged inputs for every decoder, frame, RPC and socket, at both ends: `python -m tests.fuzz` runs a million."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from google.protobuf.message import Message

from tests.fuzz.array_files import ArrayFiles
from tests.fuzz.case import Case, Seed
from tests.fuzz.damage import damage_fields
from tests.fuzz.frames import Frames
from tests.fuzz.requests import REQUESTS, SERVICE
from tests.fuzz.run import FuzzFault, draw_case, fuzz, replay
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

SEED = 20
"""Another seed would draw other inputs: those that fail here fail everywhere."""


def test_every_rpc_is_fuzzed() -> None:
    assert set(REQUESTS) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("name", TARGETS)
def test_no_damaged_input_breaks_anything(name: str, socket_directory: Path) -> None:
    with TARGETS[name](socket_directory) as target:
        fuzz(target, name, range(target.bounded_count), seed=SEED)


@pytest.mark.parametrize("name", TARGETS)
def test_every_kind_of_input_is_drawn(name: str, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)

    cases = [draw_case(target, name, SEED, number) for number in range(target.bounded_count)]

    assert {case.kind for case in cases} == {seed.kind for seed in target.seeds}
    undamaged = {seed.to_case() for seed in target.seeds}
    assert sum(case not in undamaged for case in cases) > len(cases) / 2


def test_an_input_is_drawn_again_by_its_number(tmp_path: Path) -> None:
    first, second = Frames(tmp_path), Frames(tmp_path)

    for number in (7, 100, 3):
        assert draw_case(first, "frames", 1, number) == draw_case(second, "frames", 1, number)


class Fragile(Target):
    """Breaks at an input whose first part is long."""

    seeds = (Seed("only", [b"abc", b"def"]),)

    def feed(self, case: Case) -> None:
        if case.parts and len(case.parts[0]) > 5:
            raise KeyError("long")


def test_a_fault_names_the_input_that_shows_it(tmp_path: Path) -> None:
    faults: list[FuzzFault] = []
    fuzz(Fragile(tmp_path), "fragile", range(200), seed=1, note=faults.append)

    assert faults
    text = str(faults[0])
    assert "KeyError: 'long'" in text
    case = eval(text[text.index("Case(") : text.index("): KeyError")], {"Case": Case})
    with pytest.raises(KeyError):
        Fragile(tmp_path).feed(case)


def test_messages_have_damage_in_every_field() -> None:
    (request,) = REQUESTS["DeconvolveGrad"]
    random = Random(1)
    seen: set[str] = set()
    for _ in range(2000):
        seen |= differing_fields(request, damage_fields(request, random))

    assert seen == {field.name for field in request.DESCRIPTOR.fields}


def differing_fields(message: Message, other: Message) -> set[str]:
    fields: Any = message.DESCRIPTOR.fields
    return {
        field.name for field in fields if getattr(message, field.name) != getattr(other, field.name)
    }


INFO = b"2\x04a\0bc:\x02zzB\x04/a\0bR\x06\n\x04a\0.c"
"""A GetServerInfoResponse whose paths have null bytes, and whose id is no number."""


INFINITE_SHAPE = b'{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("decoders", Case("ledger", ("server_us=\xb2".encode("latin1"),))),
        ("decoders", Case("ledger", (b"server_us=" + b"9" * 5000,))),
        ("decoders", Case("server_info", (INFO,))),
        (
            "array_files",
            Case("safetensors", (len(INFINITE_SHAPE).to_bytes(8, "little") + INFINITE_SHAPE,)),
        ),
        *(("array_files", seed.to_case()) for seed in ArrayFiles.seeds if seed.kind == "npz"),
    ],
)
def test_what_fuzzing_has_found_stays_mended(name: str, case: Case, tmp_path: Path) -> None:
    replay(name, case, tmp_path)
