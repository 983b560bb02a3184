"""What tensors that stay count for, and what is left of a tenant's quota."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from deconvd.model.problem import TensorSpec
from deconvd_server.residents.quotas import Quotas, counted_bytes, names_limit
from deconvd_server.residents.tenant import Tenant
from deconvd_server.resources.shared_quotas import SharedQuotas, create_shared_quotas


def spec(size_bytes: int) -> TensorSpec:
    return TensorSpec((size_bytes,), np.dtype(np.int8))


@pytest.mark.parametrize(
    ("size_bytes", "count_bytes"),
    [
        (0, 2560),
        (1, 2561),
        (10_000, 12_560),
        (16_384 - 2560, 16_384),
        (16_383, 16_384),
        (16_384, 16_384),
        (16_385, 16_385),
        (1 << 40, 1 << 40),
    ],
)
def test_a_small_tensor_counts_for_its_objects_too_and_a_larger_one_for_its_elements(
    size_bytes: int, count_bytes: int
) -> None:
    assert counted_bytes(spec(size_bytes)) == count_bytes


@pytest.mark.parametrize(
    ("size_bytes", "count"), [(0, 8), (319, 8), (320, 9), (319_999, 999), (320_000, 1000)]
)
def test_names_take_no_more_than_their_tensor_counts_for(size_bytes: int, count: int) -> None:
    assert names_limit(spec(size_bytes)) == count


def test_a_tenant_may_keep_its_quota_to_the_last_byte() -> None:
    quotas, tenant = Quotas(), Tenant(100)

    assert quotas.have_room(tenant, 100)
    assert not quotas.have_room(tenant, 101)
    quotas.take(tenant, 60)
    quotas.take(tenant, 10)
    assert quotas.used_bytes(tenant) == 70
    assert quotas.have_room(tenant, 30)
    assert not quotas.have_room(tenant, 31)


def test_what_is_given_back_may_be_taken_again_and_the_rest_still_counts() -> None:
    quotas, tenant = Quotas(), Tenant(100)
    quotas.take(tenant, 60)

    quotas.give_back(tenant, 20)
    assert quotas.used_bytes(tenant) == 40
    quotas.give_back(tenant, 40)

    assert quotas.used_bytes(tenant) == 0
    assert quotas.have_room(tenant, 100)


def test_no_tenant_has_of_anothers_quota() -> None:
    quotas, one, other = Quotas(), Tenant(100), Tenant(100)

    quotas.take(one, 100)

    assert quotas.used_bytes(other) == 0
    assert quotas.have_room(other, 100)
    assert not quotas.have_room(one, 1)


def test_the_tenants_of_one_identity_have_one_quota() -> None:
    quotas = Quotas()
    one, other = Tenant(100, b"one", "alice"), Tenant(100, b"other", "alice")

    quotas.take(one, 60)
    quotas.take(other, 30)
    assert quotas.used_bytes(one) == quotas.used_bytes(other) == 90
    assert not quotas.have_room(other, 11)
    assert quotas.have_room(Tenant(100, b"one", "bob"), 100)

    quotas.give_back(one, 60)
    assert quotas.used_bytes(one) == 30
    assert quotas.have_room(one, 70)
    quotas.give_back(other, 30)
    assert quotas.used_bytes(other) == 0


def test_of_one_identitys_quota_its_tenants_have_equal_parts() -> None:
    quotas = Quotas()
    large, small, new = (Tenant(90, key, "alice") for key in (b"large", b"small", b"new"))
    quotas.take(large, 46)

    assert quotas.exceeds_part(large, small)  # a half, as soon as another one asks
    assert quotas.is_within_part(small, 45)
    assert not quotas.is_within_part(small, 46)
    assert quotas.is_within_part(large, 44)
    assert not quotas.is_within_part(large, 45)
    assert not quotas.exceeds_part(large, large)
    quotas.take(small, 44)
    assert not quotas.exceeds_part(small, large)
    assert quotas.exceeds_part(small, new)  # a third
    quotas.give_back(large, 1)
    assert not quotas.exceeds_part(large, small)
    quotas.give_back(large, 45)
    assert not quotas.exceeds_part(small, small)
    assert not Quotas().exceeds_part(large, small)


@pytest.fixture
def rows() -> Iterator[list[SharedQuotas]]:
    """What each of three processes sees of the others."""
    descriptor = create_shared_quotas(3)
    yield [SharedQuotas(descriptor, number) for number in range(3)]
    os.close(descriptor)


def test_what_an_owner_uses_in_other_processes_counts(rows: list[SharedQuotas]) -> None:
    here, there = Quotas(rows[0]), Quotas(rows[2])
    tenant, same, other = (Tenant(100, key) for key in (b"a", b"a", b"b"))

    assert here.take(tenant, 60)
    assert there.used_bytes(same) == 60
    assert not there.have_room(same, 41)
    assert not there.take(same, 41)
    assert there.take(other, 41)
    assert there.take(same, 40)
    assert here.used_bytes(tenant) == there.used_bytes(same) == 100
    assert not here.have_room(tenant, 1)

    here.give_back(tenant, 60)
    assert there.used_bytes(same) == 40
    there.give_back(same, 40)
    assert here.take(tenant, 100)
    rows[1].clear(0)  # as the supervisor does once that process has ended
    assert there.take(same, 100)
    assert there.used_bytes(other) == 41


def test_an_identity_is_one_owner_in_all_processes_and_nobody_else_is(
    rows: list[SharedQuotas],
) -> None:
    here, there = Quotas(rows[0]), Quotas(rows[1])

    assert here.take(Tenant(100, b"one", "alice"), 70)
    assert there.used_bytes(Tenant(100, b"", "alice")) == 70
    assert there.used_bytes(Tenant(100, b"alice")) == there.used_bytes(Tenant(100)) == 0
    session = Tenant(100)  # which no other process can know
    assert here.take(session, 100)
    assert here.used_bytes(session) == 100
    assert not here.take(session, 1)
    here.give_back(session, 100)
    assert there.take(Tenant(100), 100)


def test_of_two_that_take_at_the_same_time_one_gives_way(rows: list[SharedQuotas]) -> None:
    here, tenant = Quotas(rows[0]), Tenant(100, b"a")
    publish = rows[0].publish
    seen = []

    def publish_as_another_does(owner: bytes, used_bytes: int) -> bool:
        if used_bytes:  # the other one has looked before, as this one
            rows[1].publish(owner, 50)
        seen.append(used_bytes)
        return publish(owner, used_bytes)

    rows[0].publish = publish_as_another_does  # type: ignore[method-assign]
    assert not here.take(tenant, 51)
    assert seen == [51, 0]
    assert here.used_bytes(tenant) == 50
    assert here.take(tenant, 50)


def test_owners_that_find_no_place_take_nothing(rows: list[SharedQuotas]) -> None:
    quotas = Quotas(rows[0])
    tenants = [Tenant(100, b"%d" % number) for number in range(1024)]

    assert all(quotas.take(tenant, 1) for tenant in tenants)
    late = Tenant(100, b"late")
    assert not quotas.take(late, 1)
    assert quotas.used_bytes(late) == 0
    quotas.give_back(tenants[7], 1)
    assert quotas.take(late, 1)
    assert Quotas(rows[1]).used_bytes(late) == 1
    assert not quotas.take(tenants[7], 1)


def test_owners_whose_keys_are_alike_are_not_the_same(rows: list[SharedQuotas]) -> None:
    keys = [bytes(8) + b"1" * 8, b"1" * 8 + bytes(8), b"1" * 16]
    for used_bytes, key in enumerate(keys, start=1):
        assert rows[0].publish(key, used_bytes)

    assert [rows[1].used_by_others(key) for key in keys] == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]


def test_a_request_is_open_until_it_is_closed_or_its_process_ends(rows: list[SharedQuotas]) -> None:
    assert all(rows[0].open_request(number) for number in range(1, 257))
    assert not rows[0].open_request(257)
    rows[0].close_request(7)

    assert [rows[2].is_open(0, number) for number in (6, 7, 8)] == [True, False, True]
    assert not rows[2].is_open(1, 6)
    assert rows[0].open_request(257)
    rows[1].clear(0)
    assert not rows[2].is_open(0, 257)


def test_answers_are_for_those_who_have_asked(rows: list[SharedQuotas]) -> None:
    rows[2].answer(0, 5)

    assert rows[0].has_answered(2, 5)
    assert not rows[0].has_answered(2, 6)
    assert not rows[0].has_answered(1, 5)
    assert not rows[1].has_answered(2, 5)
