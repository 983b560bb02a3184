"""What tensors that stay count for, and what is left of a tenant's quota."""

from __future__ import annotations

import numpy as np
import pytest

from deconvd.model.problem import TensorSpec
from deconvd_server.residents.quotas import Quotas, counted_bytes, names_limit
from deconvd_server.residents.tenant import Tenant


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
    quotas.take(small, 45)
    assert not quotas.exceeds_part(small, large)
    assert quotas.exceeds_part(small, new)  # a third
    quotas.give_back(large, 1)
    assert not quotas.exceeds_part(large, small)
    quotas.give_back(large, 45)
    assert not quotas.exceeds_part(small, small)
    assert not Quotas().exceeds_part(large, small)
