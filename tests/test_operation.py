"""The table of operations agrees with the schema."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from deconvd.model.geometry import Geometry
from deconvd.model.operation import (
    ARGUMENTS,
    DECONVOLVE,
    DECONVOLVE_GRAD,
    OPERATIONS,
    Operation,
    spec_of_field,
)
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import messages_for

_FLOAT32 = np.dtype(np.float32)
_PROBLEM = Problem(
    TensorSpec((2, 3, 4, 5), _FLOAT32), TensorSpec((3, 6, 2, 2), np.dtype(np.float64)), Geometry()
)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_operation_has_its_rpcs_and_its_fields_in_the_schema(operation: Operation) -> None:
    messages = messages_for(operation)
    methods = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].methods_by_name

    assert messages.request.DESCRIPTOR is methods[operation.name].input_type
    assert messages.response.DESCRIPTOR is methods[operation.name].output_type
    assert messages.stream_request.DESCRIPTOR is methods[operation.stream_name].input_type
    assert messages.stream_response.DESCRIPTOR is methods[operation.stream_name].output_type
    assert messages.stream_header.DESCRIPTOR is (
        messages.stream_request.DESCRIPTOR.fields_by_name["header"].message_type
    )
    assert set(operation.operands) <= set(messages.request.DESCRIPTOR.fields_by_name)
    assert set(operation.all_results) <= set(messages.response.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operand_of_an_operation_is_needed_or_optional(operation: Operation) -> None:
    needed = operation.operands_for(operation.all_results, operation.optional)

    assert needed == operation.operands
    assert sorted(operation.write_order) == sorted(operation.operands)
    assert set(operation.needs) == set(operation.all_results)


def test_gradients_need_only_what_they_are_computed_from() -> None:
    assert DECONVOLVE_GRAD.operands_for({"gx"}) == ("w", "gy")
    assert DECONVOLVE_GRAD.operands_for({"gw", "gb"}) == ("x", "gy")
    assert DECONVOLVE_GRAD.operands_for({"gb"}) == ("gy",)
    assert DECONVOLVE.operands_for({"y"}) == ("w", "x")
    assert DECONVOLVE.operands_for({"y"}, {"b"}) == ("w", "b", "x")


def test_fields_of_a_problem_have_the_specs_of_its_tensors() -> None:
    specs = {field: spec_of_field(_PROBLEM, field) for field in ("x", "gx", "w", "gw", "b", "gb")}

    assert specs["x"] == specs["gx"] == _PROBLEM.x
    assert specs["w"] == specs["gw"] == _PROBLEM.W
    assert specs["b"] == specs["gb"] == TensorSpec((6,), _FLOAT32)
    assert spec_of_field(_PROBLEM, "y") == spec_of_field(_PROBLEM, "gy") == _PROBLEM.y
    with pytest.raises(ValueError, match="no tensor 'z'"):
        spec_of_field(_PROBLEM, "z")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_the_table_is_fixed(operation: Operation) -> None:
    with pytest.raises(FrozenInstanceError):
        operation.results = ()  # type: ignore[misc]  # that it is an error is tested


def test_fields_have_the_names_of_the_arguments_that_they_are_for() -> None:
    assert [ARGUMENTS[field] for field in DECONVOLVE.operands] == ["W", "b", "x"]
    assert [ARGUMENTS[field] for field in DECONVOLVE_GRAD.all_results] == ["gx", "gW", "gb"]
