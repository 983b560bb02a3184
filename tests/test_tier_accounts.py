"""Who exceeds its share of a memory tier: identities have equal shares, however many tenants each has."""

from __future__ import annotations

from deconvd_server.residents.tenant import Tenant
from deconvd_server.residents.tier_accounts import TierAccounts


def tenant(key: bytes = b"", identity: str = "") -> Tenant:
    return Tenant(1 << 40, key, identity)


def exceeding(accounts: TierAccounts[object], asks: Tenant | None, *tenants: Tenant) -> list[bool]:
    return [accounts.exceeds_share(accounts[each], asks) for each in tenants]


def test_tenants_without_an_identity_have_equal_shares() -> None:
    accounts: TierAccounts[object] = TierAccounts(90)
    one, other, new = tenant(b"one"), tenant(b"other"), tenant()
    accounts.charge(one, 46)
    accounts.charge(other, 44)

    assert exceeding(accounts, None, one, other) == [True, False]
    assert exceeding(accounts, new, one, other) == [True, True]
    assert accounts.is_within_share(30, new)
    assert not accounts.is_within_share(31, new)
    assert accounts.is_within_share(1, other)
    assert not accounts.is_within_share(2, other)
    assert not accounts.is_within_share(0, None)


def test_an_identity_gets_no_more_by_using_several_keys() -> None:
    accounts: TierAccounts[object] = TierAccounts(90)
    many = [tenant(bytes([number]), "many") for number in range(5)]
    one = tenant(identity="one")
    for each in many:
        accounts.charge(each, 10)
    accounts.charge(one, 40)

    assert exceeding(accounts, one, *many) == [True] * 5  # 50 of 45
    assert exceeding(accounts, many[0], one) == [False]
    assert accounts.is_within_share(5, one)
    assert not accounts.is_within_share(6, one)


def test_what_the_tenants_of_one_identity_take_from_each_other_is_no_business_of_others() -> None:
    accounts: TierAccounts[object] = TierAccounts(100)
    large, small = tenant(b"large", "alice"), tenant(b"small", "alice")
    other = tenant(identity="bob")
    accounts.charge(large, 40)
    accounts.charge(small, 5)
    accounts.charge(other, 55)

    assert exceeding(accounts, other, large, small) == [False, False]  # alice has 45 of 50
    assert exceeding(accounts, small, large, other) == [True, True]
    assert exceeding(accounts, large, small, other) == [False, True]
    assert accounts.is_within_share(5, large)  # within her share, though not within its part
    assert not accounts.is_within_share(6, large)
    assert accounts.is_within_share(20, small)
    assert not accounts.is_within_share(21, small)


def test_a_new_tenant_of_an_identity_divides_its_share() -> None:
    accounts: TierAccounts[object] = TierAccounts(100)
    first, new = tenant(b"first", "alice"), tenant(b"new", "alice")
    accounts.charge(first, 51)

    assert exceeding(accounts, new, first) == [True]
    assert exceeding(accounts, first, first) == [False]
    accounts.charge(new, 49)
    assert not accounts.is_within_share(2, new)
    accounts.give_back(first, 51)
    assert accounts.get(first) is None
    assert exceeding(accounts, None, new) == [False]
    accounts.give_back(new, 49)
    assert not list(accounts)
    assert accounts.is_within_share(100, first)


def test_a_new_tenant_is_promised_its_part_though_its_identity_exceeds_its_share() -> None:
    accounts: TierAccounts[object] = TierAccounts(100)
    first, new, other = tenant(b"first", "alice"), tenant(b"new", "alice"), tenant(identity="bob")
    accounts.charge(first, 60)
    accounts.charge(other, 40)

    assert accounts.is_within_share(25, new)
    assert not accounts.is_within_share(26, new)


def test_shares_grow_again_when_accounts_are_closed() -> None:
    accounts: TierAccounts[object] = TierAccounts(120)
    first, second, other = tenant(b"1", "alice"), tenant(b"2", "alice"), tenant(identity="bob")
    for each in (first, second, other):
        accounts.charge(each, 30)
    account = accounts[first]

    assert account.owner.tenants_count == 2
    assert account.owner.size_bytes == 60
    assert account.size_bytes == 30
    accounts.charge(first, 10)
    assert exceeding(accounts, other, first) == [True]
    accounts.give_back(second, 30)
    assert account.owner.tenants_count == 1
    assert exceeding(accounts, other, first) == [False]
    accounts.give_back(other, 30)
    assert accounts.is_within_share(80, first)
    assert not accounts.is_within_share(81, first)
    accounts.give_back(first, 40)
    assert not accounts.exceeds_share(account, None)  # it is asked without a lock, and may be late
    assert not accounts.exceeds_share(account, other)


def test_a_new_account_is_empty() -> None:
    accounts: TierAccounts[object] = TierAccounts(100)
    accounts.charge(tenant(b"1", "alice"), 0)
    (account,) = accounts

    assert (account.size_bytes, account.count, account.owner.size_bytes) == (0, 0, 0)


def test_to_have_ones_share_is_not_to_exceed_it() -> None:
    accounts: TierAccounts[object] = TierAccounts(100)
    first, second = tenant(b"1", "alice"), tenant(b"2", "alice")
    other, third = tenant(b"1", "bob"), tenant(b"2", "bob")
    accounts.charge(first, 25)
    accounts.charge(second, 25)
    accounts.charge(other, 26)
    accounts.charge(third, 25)

    assert accounts.get(first) is accounts[first]
    assert accounts.get(None) is None
    # alice has just her share; bob's exceeds his, of which one tenant has just its part
    assert exceeding(accounts, other, first, second) == [False, False]
    assert exceeding(accounts, first, second, other, third) == [False, True, False]
    accounts.charge(first, 1)
    accounts.give_back(second, 1)
    assert exceeding(accounts, other, first) == [False]
    assert exceeding(accounts, second, first) == [True]
