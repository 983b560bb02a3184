"""Geometry and options as messages: what is said arrives, and what is left unsaid has its default."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import (
    geometry_from_message,
    message_from_geometry,
    message_from_options,
    options_from_message,
)
from tests.strategies import problems


@given(problems())
def test_a_geometry_crosses_the_wire_whole(problem: Problem) -> None:
    sent = message_from_geometry(problem.geometry).SerializeToString()

    assert geometry_from_message(pb.Geometry.FromString(sent)) == problem.geometry


def test_an_empty_message_is_the_default_geometry() -> None:
    assert geometry_from_message(pb.Geometry()) == Geometry()


@pytest.mark.parametrize("message", [pb.Geometry(stride=pb.Pair()), pb.Geometry(dilate=pb.Pair())])
def test_a_pair_that_is_given_is_taken_as_given_though_empty(message: pb.Geometry) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\(0, 0\)"):
        geometry_from_message(message)


def test_groups_given_as_0_are_refused_and_not_taken_for_left_out() -> None:
    with pytest.raises(InvalidArgumentError, match="groups must be from 1"):
        geometry_from_message(pb.Geometry(groups=0))


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        (pb.Geometry(stride=pb.Pair(h=1, w=-(2**63))), "stride"),
        (pb.Geometry(pad=pb.Pair(h=-1, w=0)), "pad"),
        (pb.Geometry(dilate=pb.Pair(h=1, w=2**63 - 1)), "dilate"),
        (pb.Geometry(outsize=pb.OutputSize(h=0)), "outsize"),
    ],
    ids=["stride", "pad", "dilate", "outsize"],
)
def test_a_value_out_of_range_is_refused(message: pb.Geometry, argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        geometry_from_message(message)

    assert raised.value.argument == argument


@pytest.mark.parametrize("use", UseCudnn)
@pytest.mark.parametrize("tensor_core", UseCudnnTensorCore)
@pytest.mark.parametrize("switches", [*itertools.product([False, True], repeat=3)], ids=str)
def test_options_cross_the_wire_whole(
    use: UseCudnn, tensor_core: UseCudnnTensorCore, switches: tuple[bool, bool, bool]
) -> None:
    deterministic, autotune, tf32 = switches
    options = Options(deterministic, autotune, use, tf32, tensor_core)

    sent = message_from_options(options).SerializeToString()

    assert options_from_message(pb.Options.FromString(sent)) == options


def test_an_empty_message_is_the_default_options() -> None:
    assert options_from_message(pb.Options()) == Options()


def test_tensor_cores_may_be_left_to_the_server_by_name_too() -> None:
    message = pb.Options(use_cudnn_tensor_core=pb.USE_CUDNN_TENSOR_CORE_AUTO)
    assert options_from_message(message) == Options()


@pytest.mark.parametrize("name", ["use_cudnn", "use_cudnn_tensor_core"])
@pytest.mark.parametrize("number", [4, -1, 2**31 - 1])
def test_a_use_that_the_schema_has_not_is_refused(name: str, number: int) -> None:
    # from the wire, since the message's own constructor knows the schema
    field = pb.Options.DESCRIPTOR.fields_by_name[name].number
    message = pb.Options.FromString(bytes([field << 3]) + _varint(number))

    with pytest.raises(InvalidArgumentError) as raised:
        options_from_message(message)

    words = ("UNSPECIFIED", "AUTO", "ALWAYS", "NEVER")
    names = ", ".join(f"{name.upper()}_{word}" for word in words)
    assert str(raised.value) == f"{name} must be one of {names}, got number {number}"
    assert raised.value.argument == name


def _varint(number: int) -> bytes:
    rest = number % 2**64
    digits = bytearray()
    while rest > 127:
        digits.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*digits, rest])
