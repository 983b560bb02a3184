"""What one identity has on a server is unknown to every other identity: sessions, handles, contents, memory, shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from deconvd.errors import (
    DeconvdError,
    ExhaustedError,
    LostSessionError,
    LostTensorError,
    StaleRegionError,
)
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope
from deconvd_client.shared_memory import Borrower
from deconvd_server.backend import Backend
from deconvd_server.call.context import CallContext
from deconvd_server.call.counts import CallCounts
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.residents import ResidentLimits, Session
from deconvd_server.resources.capabilities import CapabilityTable
from deconvd_server.service.method import UnaryMethod
from deconvd_server.settings import Settings
from deconvd_server.shared_memory import Lender
from tests.deadlines import short_deadline
from tests.registry_fixtures import KIB, RegistryFixture, make_registry_fixture

SIZE_BYTES = 16 * KIB


def array(value: float, size_bytes: int = SIZE_BYTES) -> Array:
    return np.full((size_bytes // 4,), value, np.float32)


def remember(built: RegistryFixture, session: Session, content: str, value: float) -> None:
    entry = built.make(session, array(value))
    built.registry.register_content(entry, session, content)
    built.registry.release(entry)


def has_content(built: RegistryFixture, session: Session, content: str) -> bool:
    entry = built.registry.acquire_by_content(session, content, CallContext())
    if entry is not None:
        built.registry.release(entry)
    return entry is not None


def error_text(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(DeconvdError) as raised:
        call(*args)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_name_of_one_owner_is_unknown_to_another() -> None:
    table: CapabilityTable[int] = CapabilityTable()
    table.put(b"name", 1, "alice")
    table.put(b"name", 2, "bob")

    assert table.get(b"name", "alice") == 1
    assert table.get(b"name", "bob") == 2
    assert table.get(b"name", "carol") is None
    assert table.get(b"name") is None
    with pytest.raises(KeyError):
        table.pop(b"name")
    assert table.pop(b"name", "alice") == 1
    assert table.values() == [2]


def test_another_identitys_session_is_answered_as_an_unknown_one() -> None:
    with make_registry_fixture() as built:
        sessions = built.sessions
        session = built.open(b"key", "alice")

        for identity in ("bob", ""):
            unknown = error_text(sessions.get, bytes(16), identity)
            assert error_text(sessions.get, session.name, identity) == unknown
            assert sessions.tenant(session.name, identity) is None
            assert unknown == error_text(sessions.resume, session.name, b"key", print, identity)
        assert sessions.get(session.name, "alice") is session
        assert sessions.resume(session.name, b"key", lambda: None, "alice") is session


def test_an_unknown_session_and_a_wrong_key_cost_the_same_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[bytes] = []
    module = "deconvd_server.residents.sessions.is_same_secret"
    monkeypatch.setattr(module, lambda key, _: compared.append(key))
    with make_registry_fixture() as built:
        session = built.open(b"key", "alice")
        for name, identity in ((session.name, "alice"), (session.name, "bob"), (bytes(16), "bob")):
            with pytest.raises(LostSessionError):
                built.sessions.resume(name, b"wrong", print, identity)
        assert compared == [b"key", b"", b""]


def test_sessions_of_one_identity_are_one_tenant_which_its_keys_divide() -> None:
    with make_registry_fixture() as built:
        one, same = built.open(identity="alice"), built.open(identity="alice")
        keyed, same_keyed = built.open(b"key", "alice"), built.open(b"key", "alice")
        others = [built.open(b"key", "bob"), built.open(b"key"), built.open(), built.open()]

        assert one.tenant is same.tenant
        assert keyed.tenant is same_keyed.tenant
        tenants = {one.tenant, keyed.tenant, *(other.tenant for other in others)}
        assert len(tenants) == 6
        assert one.tenant.owner == keyed.tenant.owner == "alice"
        assert others[-1].tenant.owner is others[-1].tenant


def test_handles_and_contents_are_found_by_their_own_identity_alone() -> None:
    with make_registry_fixture(device_bytes=256 * KIB) as built:
        mine = built.open(b"key", "alice")
        built.put(mine, b"handle", array(1))
        remember(built, mine, "content", 2)
        sibling, stranger, nobody = (
            built.open(b"other key", "alice"),
            built.open(b"key", "bob"),
            built.open(b"key"),
        )

        for other in (sibling, stranger, nobody):
            unknown = error_text(built.get, other, b"nothing")
            assert error_text(built.get, other, b"handle") == unknown
            assert unknown.startswith(LostTensorError.__name__)
            built.registry.drop(other, [b"handle"])
            assert not has_content(built, other, "content")
            remember(built, other, "content", 3)  # as if nobody had sent it
        again = built.open(b"key", "alice")
        np.testing.assert_array_equal(built.get(again, b"handle"), array(1))
        assert has_content(built, again, "content")


def test_the_quota_is_the_identitys_whatever_keys_it_uses() -> None:
    with make_registry_fixture(quota_bytes=2 * SIZE_BYTES) as built:
        one, other, stranger = (
            built.open(b"one", "alice"),
            built.open(b"other", "alice"),
            built.open(b"one", "bob"),
        )
        built.put(one, b"a", array(1))
        built.put(other, b"b", array(2))

        with pytest.raises(ExhaustedError, match="over its quota"):
            built.put(other, b"c", array(3))

        built.put(stranger, b"c", array(3))
        built.put(stranger, b"d", array(4))
        np.testing.assert_array_equal(built.get(one, b"a"), array(1))


def test_contents_beyond_their_tenants_part_make_room_in_the_identitys_quota() -> None:
    with make_registry_fixture(device_bytes=256 * KIB, quota_bytes=4 * SIZE_BYTES) as built:
        large, small = built.open(b"large", "alice"), built.open(b"small", "alice")
        stranger = built.open(b"large", "bob")
        for value, content in enumerate("abcd"):
            remember(built, large, content, value)
            remember(built, stranger, content, value)

        for value, content in enumerate("xyz"):
            remember(built, small, content, value)

        # two each: the third of the small one's made room in its own part
        assert [has_content(built, large, content) for content in "abcd"] == [False] * 2 + [
            True
        ] * 2
        assert [has_content(built, small, content) for content in "xyz"] == [False, True, True]
        assert all(has_content(built, stranger, content) for content in "abcd")


def test_an_identity_is_displaced_by_no_number_of_another_ones_keys() -> None:
    with make_registry_fixture(device_bytes=8 * SIZE_BYTES) as built:
        modest = built.open(identity="modest")
        for name in (b"1", b"2", b"3", b"4"):
            built.put(modest, name, array(1))
        for number in range(7):
            greedy = built.open(bytes([number]), "greedy")
            for name in (b"a", b"b"):
                built.put(greedy, bytes([number]) + name, array(2))

        for name in (b"1", b"2", b"3", b"4"):
            np.testing.assert_array_equal(built.get(modest, name), array(1))


def test_borrowed_memory_is_used_by_the_identity_of_its_first_call_alone(
    lender: Lender, borrower: Borrower
) -> None:
    lies_at = borrower.locate(borrower.empty((SIZE_BYTES,), np.float32, short_deadline()))
    assert lies_at is not None
    region = lies_at.region
    lender.use("x", region, "alice").end()

    unknown = error_text(lender.use, "x", bytes(16), "bob")
    assert unknown.startswith(StaleRegionError.__name__)
    for identity in ("bob", ""):
        assert error_text(lender.use, "x", region, identity) == unknown
    lender.use("x", region, "alice").end()


def test_server_info_shows_an_identity_nothing_of_another_ones() -> None:
    settings = Settings([], 4 << 20, 10, residents=ResidentLimits(), takes_direct_calls=False)
    backend = Backend(settings, [CpuDevice(1)], [], [], CallCounts())
    try:
        residents = backend.residents
        session = residents.sessions.open(b"", lambda: None, identity="alice")
        engine = residents.engines.least_loaded()
        spec = TensorSpec((4,), np.dtype(np.float32))
        entry = residents.registry.make(session, spec, engine, CallContext(identity="alice"))
        residents.registry.bind_name(entry, session, b"handle")
        residents.registry.release(entry)

        def resident_counts(identity: str, name: bytes) -> list[int]:
            request = Envelope(pb.GetServerInfoRequest(session=name), {})
            method = backend.methods["GetServerInfo"]
            assert isinstance(method, UnaryMethod)
            info = method.serve(request, CallContext(identity=identity)).message
            caches = [cache for device in info.devices for cache in device.caches]
            return [cache.count for cache in caches if cache.name == "resident tensors"]

        assert resident_counts("alice", session.name) == [1]
        assert resident_counts("bob", session.name) == resident_counts("bob", bytes(16)) == [0]
        assert resident_counts("", session.name) == [0]
    finally:
        backend.withdraw()
        backend.close()
