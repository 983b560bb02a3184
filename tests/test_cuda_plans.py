"""What tells plans apart, and the store that remembers which were chosen. No card is needed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product
from deconvd_server.device.cuda.plans import store as store_module
from deconvd_server.device.cuda.plans.choice import Choice, Provider
from deconvd_server.device.cuda.plans.key import PlanKey, digest_of
from deconvd_server.device.cuda.plans.store import PlanStore

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
GEOMETRY = Geometry(stride=(2, 2), pad=(1, 1), outsize=(None, None), dilate=(1, 1), groups=1)
PROBLEM = Problem(TensorSpec((1, 4, 8, 8), FLOAT32), TensorSpec((4, 2, 4, 4), FLOAT32), GEOMETRY)
KEY = PlanKey.of(Product.Y, PROBLEM, Options(), 1 << 20)
ORIGIN: dict[str, str | int] = {"deconvd": 1, "cudnn": 91900, "card": "NVIDIA H200"}
CHOICE = Choice(Provider.CUDNN_NHWC, "cudnn nhwc engine 73", False, '{"engine": 73}', 0.05)


def with_geometry(**changes: Any) -> PlanKey:
    geometry = replace(GEOMETRY, **changes)
    return PlanKey.of(Product.Y, Problem(PROBLEM.x, PROBLEM.W, geometry), Options(), 1 << 20)


def with_options(**changes: Any) -> PlanKey:
    return PlanKey.of(Product.Y, PROBLEM, Options(**changes), 1 << 20)


def with_specs(x: TensorSpec, W: TensorSpec, options: Options | None = None) -> PlanKey:
    return PlanKey.of(Product.Y, Problem(x, W, GEOMETRY), options or Options(), 1 << 20)


OTHERS = {
    "operation": PlanKey.of(Product.GX, PROBLEM, Options(), 1 << 20),
    "workspace": PlanKey.of(Product.Y, PROBLEM, Options(), 1 << 21),
    "batch": with_specs(TensorSpec((2, 4, 8, 8), FLOAT32), PROBLEM.W),
    "x type": with_specs(TensorSpec((1, 4, 8, 8), FLOAT16), PROBLEM.W),
    "W type": with_specs(PROBLEM.x, TensorSpec((4, 2, 4, 4), FLOAT16)),
    "kernel": with_specs(PROBLEM.x, TensorSpec((4, 2, 4, 3), FLOAT32)),
    "stride": with_geometry(stride=(2, 1)),
    "pad": with_geometry(pad=(0, 1)),
    "outsize": with_geometry(outsize=(17, None)),
    "dilate": with_geometry(dilate=(2, 1)),
    "groups": with_geometry(groups=2),
    "deterministic": with_options(cudnn_deterministic=True),
    "autotune": with_options(autotune=True),
    "use_cudnn": with_options(use_cudnn=UseCudnn.NEVER),
    "tf32": with_options(allow_tf32=True),
    "tensor cores": with_options(use_cudnn_tensor_core=UseCudnnTensorCore.NEVER),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_requests_that_differ_have_different_keys_and_files(tmp_path: Path, other: PlanKey) -> None:
    store = PlanStore(tmp_path, ORIGIN)
    store.save(KEY, CHOICE)
    assert other != KEY
    assert store.load(other) is None


def test_an_outsize_that_is_the_natural_one_makes_no_difference() -> None:
    assert {with_geometry(outsize=PROBLEM.output), KEY} == {KEY}


def test_tf32_makes_no_difference_where_nothing_is_float32() -> None:
    specs = (TensorSpec((1, 4, 8, 8), FLOAT16), TensorSpec((4, 2, 4, 4), FLOAT16))
    assert with_specs(*specs, Options(allow_tf32=True)) == with_specs(*specs)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_makes_no_difference_where_no_tensor_core_may_be_used(tf32: bool) -> None:
    never = UseCudnnTensorCore.NEVER
    key = with_options(use_cudnn_tensor_core=never, allow_tf32=tf32)
    assert key == OTHERS["tensor cores"]
    assert not key.options.allow_tf32


def test_tensor_cores_always_is_the_same_as_when_they_are_the_fastest() -> None:
    assert with_options(use_cudnn_tensor_core=UseCudnnTensorCore.ALWAYS) == KEY


def test_a_store_that_is_older_than_the_option_for_tensor_cores_is_still_read() -> None:
    assert digest_of(KEY.fields()) == (
        "ab0da99dc7907bef0bc50fb1da8832352b318088829826932e7fc03a352b26a9"
    )


def test_the_order_of_fields_makes_no_difference_to_their_name() -> None:
    fields = KEY.fields()

    assert digest_of(dict(reversed(fields.items()))) == digest_of(fields)
    assert digest_of({**fields, "groups": 2}) != digest_of(fields)


def test_a_choice_is_found_by_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    PlanStore(folder, ORIGIN).save(KEY, CHOICE)
    assert PlanStore(folder, ORIGIN).load(KEY) == CHOICE
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".json"]


@pytest.mark.parametrize("name", ORIGIN)
def test_another_card_or_version_knows_nothing_of_it(tmp_path: Path, name: str) -> None:
    PlanStore(tmp_path, ORIGIN).save(KEY, CHOICE)
    assert PlanStore(tmp_path, {**ORIGIN, name: "another"}).load(KEY) is None


def damaged(text: str) -> dict[str, str]:
    content = json.loads(text)
    return {
        "empty": "",
        "cut off": text[: len(text) // 2],
        "no JSON": "not JSON at all",
        "no object": "[]",
        "no choice": json.dumps({**content, "choice": 3}),
        "another blob": text.replace("73}", "74}"),
        "another key": text.replace('"groups": 1', '"groups": 2'),
        "another provider": text.replace("cudnn nhwc", "cudnn abcd"),
        "no checksum": text.replace("checksum", "chequesum"),
    }


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut off", "no JSON", "no object", "no choice", "another blob", "another key",
     "another provider", "no checksum"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = PlanStore(tmp_path, ORIGIN)
    store.save(KEY, CHOICE)
    (path,) = tmp_path.rglob("*.json")
    text = damaged(path.read_text())[damage]
    assert text != path.read_text()
    path.write_text(text)

    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None

    assert str(path) in caplog.text
    store.save(KEY, CHOICE)
    assert store.load(KEY) == CHOICE


def test_a_store_that_cannot_be_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PlanStore(tmp_path / "store", ORIGIN)
    (tmp_path / "store").rmdir()

    store.save(KEY, CHOICE)

    assert "could not store" in caplog.text
    assert store.load(KEY) is None


def test_a_full_store_keeps_what_it_has_and_says_once_that_it_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "_SHARD_PLANS_COUNT", 2)
    keys = [with_specs(TensorSpec((n, 4, 8, 8), FLOAT32), PROBLEM.W) for n in range(1, 1500)]
    store = PlanStore(tmp_path, ORIGIN)
    for key in keys[:750]:
        store.save(key, CHOICE)
    kept = [key for key in keys[:750] if store.load(key) is not None]

    store = PlanStore(tmp_path, ORIGIN)  # which finds out by itself what is full
    for key in keys:
        store.save(key, CHOICE)

    assert len(kept) > 256
    assert all(store.load(key) == CHOICE for key in kept)
    assert 450 < len(list(tmp_path.rglob("*.json"))) <= 512
    assert caplog.text.count("which is the limit") == 2


def test_servers_that_share_a_store_stay_within_its_bound_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_SHARD_PLANS_COUNT", 2)
    stores = [PlanStore(tmp_path, ORIGIN) for _ in range(3)]

    for n in range(1, 2000):
        stores[n % 3].save(with_specs(TensorSpec((n, 4, 8, 8), FLOAT32), PROBLEM.W), CHOICE)

    assert 500 < len(list(tmp_path.rglob("*.json"))) <= 512


def test_a_plan_that_is_stored_again_takes_no_further_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_SHARD_PLANS_COUNT", 2)
    store = PlanStore(tmp_path, ORIGIN)
    for _ in range(3):
        store.save(KEY, CHOICE)
    (path,) = tmp_path.rglob("*.json")

    path.write_text("damaged")
    store.save(KEY, CHOICE)

    assert store.load(KEY) == CHOICE


OPENING = """
import sys
from pathlib import Path
from deconvd_server.device.cuda.plans.store import PlanStore

def note(event, arguments):
    # coverage lists other folders
    if event in ("os.listdir", "os.scandir") and str(arguments[0]).startswith(sys.argv[1]):
        print(event, *arguments)

sys.addaudithook(note)
PlanStore(Path(sys.argv[1]), {"deconvd": "1"})
print("opened")
"""


def test_a_store_of_any_size_is_opened_without_a_look_at_its_plans(tmp_path: Path) -> None:
    PlanStore(tmp_path, ORIGIN).save(KEY, CHOICE)

    command = [sys.executable, "-c", OPENING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout == "opened\n"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"provider": "own"},
        {"provider": "own", "name": 3, "deterministic": True},
        {"provider": "own", "name": "depthwise", "deterministic": True, "other": 1},
        {"provider": "nobody", "name": "depthwise", "deterministic": True},
    ],
)
def test_what_describes_no_choice_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a"):
        Choice.from_fields(fields)
