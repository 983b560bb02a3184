"""W3C Trace Context: which traceparents are valid, and how long a tracestate may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deconvd.wire.trace_context import is_traceparent, limit_tracestate, trace_id_of
from deconvd_server.call.context import CallContext

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"

NOT_VALID = [
    "",
    "00",
    PARENT.upper(),
    PARENT[:-1],
    f"{PARENT}0",
    f"{PARENT} ",
    f"{PARENT}\n",
    f"{PARENT}-later",  # version 00 has no more
    f"ff{PARENT[2:]}",  # no version
    f"0x{PARENT[2:]}",
    PARENT.replace("-", "_"),
    PARENT.replace(TRACE_ID, 32 * "0"),
    PARENT.replace("00f067aa0ba902b7", 16 * "0"),
    PARENT.replace("4", "\N{FULLWIDTH DIGIT FOUR}"),  # a digit of another script
    f"01{PARENT[2:]}-\n",
    f"01{PARENT[2:]}-" + 256 * "a",
]


@pytest.mark.parametrize("text", NOT_VALID)
def test_what_is_not_valid_is_known(text: str) -> None:
    assert not is_traceparent(text)


@pytest.mark.parametrize("text", [PARENT, f"01{PARENT[2:]}", f"cc{PARENT[2:]}-what-comes-later"])
def test_later_versions_are_valid_and_may_be_longer(text: str) -> None:
    assert is_traceparent(text)
    assert trace_id_of(text) == TRACE_ID


@given(st.text(st.sampled_from("0123456789abf-"), min_size=50, max_size=60) | st.just(PARENT))
def test_opentelemetry_takes_what_is_valid(text: str) -> None:
    extracted = TraceContextTextMapPropagator().extract({"traceparent": text})

    assert is_traceparent(text) == get_current_span(extracted).get_span_context().is_valid


def test_a_tracestate_of_512_characters_stays() -> None:
    state = ",".join(f"vendor{i}={'x' * 54}" for i in range(8))[:512]

    assert limit_tracestate(state) == state


def test_of_a_longer_one_large_members_go_first_and_then_the_last() -> None:
    large = "large=" + 200 * "x"
    members = [f"vendor{i}={'x' * 54}" for i in range(9)]  # of 62 characters

    kept = limit_tracestate(",".join([members[0], large, *members[1:]]))

    assert kept == ",".join(members[:8])
    assert len(kept) == 8 * 62 + 7


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]))))
def test_no_member_is_cut_and_the_order_stays(members: list[str]) -> None:
    kept = limit_tracestate(",".join(members))

    assert len(kept) <= 512
    left = iter(members)
    assert all(member in left for member in kept.split(",") if member)


@pytest.mark.parametrize("text", ["a=1\nb=2", "a=é", "a=\x00"])
def test_what_no_header_can_have_is_no_tracestate(text: str) -> None:
    assert not limit_tracestate(text)


def test_a_bad_traceparent_changes_nothing_of_a_call() -> None:
    call = CallContext()
    call.set_trace_context(PARENT, "a=1")

    call.set_trace_context("bad", "b=2")

    assert call.trace_headers == {"traceparent": PARENT, "tracestate": "a=1"}
    assert call.trace_id == TRACE_ID
