"""What requests ask for: the same however often it is parsed, and whether or not it can be remembered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.tensor import message_from_spec
from deconvd_server.service.parsed_request import ParsedRequest, parse_request
from tests.strategies import problems

F32 = np.dtype(np.float32)
PROBLEM = Problem(TensorSpec((2, 3, 4, 5), F32), TensorSpec((3, 2, 3, 3), F32), Geometry())
UNKNOWN_FIELD = b"\xfa\x7f\x80\x40" + bytes(8 << 10)  # number 2047, of 8 KiB


def request(problem: Problem, *, with_b: bool = False) -> pb.DeconvolveRequest:
    return pb.DeconvolveRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        b=message_from_spec(problem.b) if with_b else None,
        geometry=message_from_geometry(problem.geometry),
    )


def grad_request(problem: Problem, **wanted: bool) -> pb.DeconvolveGradRequest:
    plain = request(problem)
    return pb.DeconvolveGradRequest(
        x=plain.x,
        w=plain.w,
        gy=message_from_spec(problem.y),
        geometry=plain.geometry,
        wanted=pb.GradientMask(**wanted),
    )


@given(problems(), st.booleans())
def test_a_request_asks_for_the_same_every_time(problem: Problem, with_b: bool) -> None:
    parsed = ParsedRequest(
        operation=DECONVOLVE,
        problem=problem,
        options=Options(),
        wanted=("y",),
        optional=("b",) if with_b else (),
    )

    for _ in range(2):
        assert parse_request(DECONVOLVE, request(problem, with_b=with_b)) == parsed


@given(problems(), st.sampled_from([("gx",), ("gw", "gb")]))
def test_a_request_for_gradients_does_too(problem: Problem, wanted: tuple[str, ...]) -> None:
    parsed = ParsedRequest(
        operation=DECONVOLVE_GRAD, problem=problem, options=Options(), wanted=wanted
    )

    for _ in range(2):
        message = grad_request(problem, **dict.fromkeys(wanted, True))
        assert parse_request(DECONVOLVE_GRAD, message) == parsed


def test_a_long_message_is_read_as_a_short_one_is_and_not_kept() -> None:
    short = request(PROBLEM)
    long = pb.DeconvolveRequest.FromString(short.SerializeToString() + UNKNOWN_FIELD)

    parsed = parse_request(DECONVOLVE, short)

    assert parse_request(DECONVOLVE, request(PROBLEM)) is parsed
    assert parse_request(DECONVOLVE, long) == parsed
    assert parse_request(DECONVOLVE, long) is not parse_request(DECONVOLVE, long)


@given(problems(), st.sets(st.sampled_from(["x", "w", "gy", "gx", "gw", "gb"])), st.booleans())
def test_places_in_shared_memory_are_the_requests_own(
    problem: Problem, placed: set[str], with_gb: bool
) -> None:
    first, second = (grad_request(problem, gx=True, gw=True, gb=with_gb) for _ in range(2))
    for offset_bytes, message in enumerate((first, second)):
        for number, name in enumerate(sorted(placed)):
            is_operand = name in DECONVOLVE_GRAD.operands
            place = (
                getattr(message, name).shared if is_operand else getattr(message, f"{name}_place")
            )
            SharedSlice(b"region", 64 * number + offset_bytes).write_to(place)
    data = first.SerializeToString()

    parsed = [parse_request(DECONVOLVE_GRAD, message) for message in (first, second, first)]

    # what is too long to be remembered is parsed in one piece
    longs = [message.SerializeToString() + UNKNOWN_FIELD for message in (first, second, first)]
    plain = [
        parse_request(DECONVOLVE_GRAD, pb.DeconvolveGradRequest.FromString(long)) for long in longs
    ]
    assert parsed == plain
    assert [one.response for one in parsed] == [one.response for one in plain]
    assert [*parsed[0].shared_slices.items()] == [*plain[0].shared_slices.items()]
    assert parsed[0].wanted is parsed[1].wanted  # made once, for both
    assert parsed[0] is parsed[2]
    assert (parsed[0] is parsed[1]) == (not placed)
    assert first.SerializeToString() == data


def test_a_place_for_what_is_kept_is_refused_wherever_it_is() -> None:
    message = request(PROBLEM)
    message.keep_y = True

    for offset_bytes in (0, 64):
        SharedSlice(b"region", offset_bytes).write_to(message.y_place)
        with pytest.raises(InvalidArgumentError, match="y_place must be left out if y is kept"):
            parse_request(DECONVOLVE, message)


def test_what_cannot_be_is_refused_every_time() -> None:
    wrong = request(PROBLEM)
    wrong.geometry.stride.h = 0

    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="stride must be"):
            parse_request(DECONVOLVE, wrong)


def test_what_is_asked_for_is_in_the_order_of_streams() -> None:
    parsed = parse_request(DECONVOLVE, request(PROBLEM, with_b=True))
    assert list(parsed.operands.items()) == [("w", PROBLEM.W), ("b", PROBLEM.b), ("x", PROBLEM.x)]
    assert parsed.results == {"y": PROBLEM.y}

    gradients = parse_request(DECONVOLVE_GRAD, grad_request(PROBLEM, gw=True, gb=True))
    assert list(gradients.operands.items()) == [("x", PROBLEM.x), ("gy", PROBLEM.y)]
    assert list(gradients.results.items()) == [("gw", PROBLEM.W), ("gb", PROBLEM.b)]


def test_gradients_must_be_wanted() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one of gx, gW and gb, got none"):
        parse_request(DECONVOLVE_GRAD, grad_request(PROBLEM))


def test_only_what_is_there_and_not_yet_kept_is_to_be_kept() -> None:
    message = request(PROBLEM)
    message.w.resident.handle = bytes(16)
    message.keep.CopyFrom(pb.OperandsToKeep(x=True, w=True, b=True))

    parsed = parse_request(DECONVOLVE, message)

    assert parsed.keep == {"x"}
    assert parsed.named == {"w"}
    assert list(parsed.sent_results) == ["y"]


def test_gradients_that_are_not_wanted_are_not_kept() -> None:
    message = grad_request(PROBLEM, gx=True)
    message.keep.CopyFrom(pb.GradientMask(gx=True, gw=True))

    assert parse_request(DECONVOLVE_GRAD, message).keep == {"gx"}


def test_a_session_is_needed_where_something_is_named_or_kept() -> None:
    kept, named = request(PROBLEM), request(PROBLEM)
    kept.keep_y = True
    named.w.digest.blake3 = bytes(32)

    needs = [parse_request(DECONVOLVE, m).needs_session for m in (request(PROBLEM), kept, named)]

    assert needs == [False, True, True]


def test_what_a_request_says_about_its_call_makes_no_difference() -> None:
    plain, named = request(PROBLEM), request(PROBLEM)
    named.telemetry.request_id = "of one call"

    parsed = parse_request(DECONVOLVE, plain)

    assert parse_request(DECONVOLVE, named) is parsed
    assert parse_request(DECONVOLVE, named, named.SerializeToString()) is parsed
    assert named.telemetry.request_id == "of one call"
