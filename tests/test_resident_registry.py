"""The registry of resident tensors: what it has for whom, what is evicted, and that nothing in use is ever freed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pytest

from deconvd.errors import (
    ExhaustedError,
    InvalidArgumentError,
    LostSessionError,
    LostTensorError,
    UnavailableError,
)
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.call.context import CallContext, ClientWaitState
from deconvd_server.device import DeviceTensor
from deconvd_server.residents import CallResidents, Session
from deconvd_server.residents.elements import read_array, read_samples
from tests.devices import deconvolve
from tests.registry_fixtures import KIB, RegistryFixture, make_registry_fixture


def array(value: int, size_bytes: int = 16 * KIB) -> Array:
    return np.full(size_bytes // 4, value, np.float32)


def has(built: RegistryFixture, session: Session, name: bytes) -> bool:
    try:
        built.get(session, name)
    except LostTensorError:
        return False
    return True


def nothing() -> None:
    pass


def kept_names(built: RegistryFixture, session: Session, names: bytes) -> bytes:
    """Return those of one-letter names that stand for something, without the look's counting as use."""
    return bytes(letter for letter in names if bytes([letter]) in built.registry.names_of(session))


def test_what_was_put_is_there_until_it_is_dropped() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        built.put(session, b"a", array(1))
        built.put(session, b"b", array(2))

        np.testing.assert_array_equal(built.get(session, b"a"), array(1))
        built.registry.drop(session, [b"a", b"unknown"])

        assert not has(built, session, b"a")
        np.testing.assert_array_equal(built.get(session, b"b"), array(2))
        assert built.held_bytes() == 16 * KIB


def test_the_least_recently_used_makes_room() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        for number, name in enumerate([b"a", b"b", b"c", b"d"]):
            built.put(session, name, array(number))
        built.get(session, b"a")

        built.put(session, b"e", array(5))

        assert kept_names(built, session, b"abcde") == b"acde"


def test_what_a_call_uses_makes_no_room() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        for number, name in enumerate([b"a", b"b", b"c", b"d"]):
            built.put(session, name, array(number))
        used = [
            built.registry.acquire_by_name(session, name, "x", CallContext())
            for name in [b"a", b"b"]
        ]

        built.put(session, b"e", array(5, 32 * KIB))
        with pytest.raises(
            ExhaustedError, match=r"65536 bytes for resident tensors, and no room for 49152 more"
        ):
            built.put(session, b"f", array(6, 48 * KIB))

        for number, entry in enumerate(used):
            np.testing.assert_array_equal(read_array(entry, CallContext()), array(number))
            built.registry.release(entry)


def test_what_is_dropped_while_in_use_is_freed_after_its_last_user() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        built.put(session, b"a", array(1))
        users = [
            built.registry.acquire_by_name(session, b"a", "x", CallContext()) for _ in range(2)
        ]

        built.registry.drop(session, [b"a"])

        assert not has(built, session, b"a")
        for entry in users:
            np.testing.assert_array_equal(read_array(entry, CallContext()), array(1))
            assert built.held_bytes() == 16 * KIB
            built.registry.release(entry)
        assert built.held_bytes() == 0


def test_what_is_made_and_not_named_goes_with_its_maker() -> None:
    with make_registry_fixture() as built:
        entry = built.make(built.open(), array(1))
        assert built.held_bytes() == 16 * KIB
        built.registry.release(entry)
        assert built.held_bytes() == 0


def test_a_tensor_larger_than_all_there_is_displaces_nothing() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        built.put(session, b"a", array(1))
        with pytest.raises(ExhaustedError, match="device:0 has 65536 bytes"):
            built.put(session, b"b", array(2, 65 * KIB))
        assert has(built, session, b"a")


def test_a_tenant_within_its_share_is_not_displaced_by_another() -> None:
    with make_registry_fixture() as built:
        modest, greedy = built.open(), built.open()
        built.put(modest, b"a", array(1))
        built.put(modest, b"b", array(2))  # half of what there is
        for number in range(20):
            built.put(greedy, bytes([number]), array(number))

        assert kept_names(built, modest, b"ab") == b"ab"
        assert built.held_bytes() == 64 * KIB


def test_a_tenant_beyond_its_share_makes_room_for_another() -> None:
    with make_registry_fixture() as built:
        first, second = built.open(), built.open()
        for name in [b"a", b"b", b"c", b"d"]:
            built.put(first, name, array(1))
        for name in [b"e", b"f"]:
            built.put(second, name, array(2))

        assert kept_names(built, first, b"abcd") == b"cd"
        with pytest.raises(ExhaustedError, match="other tenants within their share use the rest"):
            built.put(second, b"g", array(3, 48 * KIB))
        assert kept_names(built, first, b"abcd") == b"cd"


def test_what_rests_makes_room_for_what_another_tenant_is_promised() -> None:
    with make_registry_fixture() as built:
        greedy, modest = built.open(), built.open()
        used = [built.make(greedy, array(number)) for number in range(4)]
        for entry, name in zip(used, [b"a", b"b", b"c", b"d"], strict=True):
            built.registry.bind_name(entry, greedy, name)
        resting = [built.registry.rest(entry, CallContext()) for entry in used]
        for each in resting:
            each.__enter__()

        built.put(modest, b"e", array(5))
        built.put(modest, b"f", array(6))
        with pytest.raises(ExhaustedError):  # beyond its share it displaces nothing in use
            built.put(modest, b"g", array(7, 33 * KIB))

        assert kept_names(built, modest, b"ef") == b"ef"
        for each in resting:
            each.__exit__(None, None, None)
        for entry, value in zip(used[2:], [2, 3], strict=True):
            np.testing.assert_array_equal(read_samples(entry, None, CallContext()), array(value))
        for entry in used[:2]:
            with pytest.raises(UnavailableError, match="the tensor was evicted while") as raised:
                read_samples(entry, None, CallContext())
            assert raised.value.retry_after_s
        for entry in used:
            built.registry.release(entry)
        assert kept_names(built, greedy, b"abcd") == b"cd"


def test_what_rests_moves_to_the_host_if_there_is_room() -> None:
    with make_registry_fixture(host_bytes=32 * KIB) as built:
        greedy, modest = built.open(), built.open()
        used = [built.make(greedy, array(number)) for number in range(4)]
        resting = [built.registry.rest(entry, CallContext()) for entry in used]
        for each in resting:
            each.__enter__()

        built.put(modest, b"a", array(5, 32 * KIB))

        for each, entry, value in zip(resting, used, range(4), strict=True):
            each.__exit__(None, None, None)
            np.testing.assert_array_equal(read_samples(entry, None, CallContext()), array(value))
            built.registry.release(entry)


def test_a_call_that_waits_for_its_client_is_stopped_for_what_is_promised() -> None:
    with make_registry_fixture() as built:
        greedy, modest = built.open(), built.open()
        built.put(greedy, b"a", array(1, 60 * KIB))
        call = CallContext()
        call.client_wait = wait = ClientWaitState()
        residents = CallResidents(built.registry, greedy, call)
        tensor = pb.Tensor(resident=pb.Resident(handle=b"a"))
        residents.find("x", spec_of(array(1, 60 * KIB)), tensor)
        call.close_stream = residents.release  # as its thread does

        with pytest.raises(UnavailableError, match="within the tenant's share") as raised:
            built.put(modest, b"b", array(2))  # the call works
        assert raised.value.retry_after_s
        assert not call.is_cancelled

        wait.blocked_since_s = time.monotonic()
        built.put(modest, b"b", array(2))

        assert isinstance(call.stop_error, UnavailableError)
        assert call.stop_error.retry_after_s
        assert not has(built, greedy, b"a")


def test_a_quota_is_named_when_it_is_met() -> None:
    with make_registry_fixture(quota_bytes=40 * KIB) as built:
        session = built.open(b"key")
        built.put(session, b"a", array(1))
        built.put(built.open(b"key"), b"b", array(2))
        with pytest.raises(
            ExhaustedError, match=r"may keep 40960 bytes .* keeps 32768: 16384 more"
        ):
            built.put(session, b"c", array(3))
        built.put(built.open(b"other"), b"d", array(3))

        built.registry.drop(session, [b"a"])
        built.put(session, b"c", array(3))


def test_content_makes_room_in_the_quota_for_what_is_named() -> None:
    with make_registry_fixture(quota_bytes=48 * KIB) as built:
        session = built.open()
        for key in ["one", "two", "three"]:
            entry = built.make(session, array(1))
            built.registry.register_content(entry, session, key)
            built.registry.release(entry)
        used = built.registry.acquire_by_content(session, "one", CallContext())
        assert used is not None

        built.put(session, b"a", array(1))
        built.put(session, b"b", array(2))
        with pytest.raises(ExhaustedError, match="over its quota"):
            built.put(session, b"c", array(3))

        built.registry.release(used)
        assert built.registry.acquire_by_content(session, "two", CallContext()) is None
        assert built.registry.acquire_by_content(session, "three", CallContext()) is None


def test_content_is_there_until_its_tenants_last_session_ends() -> None:
    with make_registry_fixture() as built:
        first, second = built.open(b"key"), built.open(b"key")
        entry = built.make(first, array(7))
        built.registry.register_content(entry, first, "content")
        built.registry.release(entry)

        built.sessions.end(first, first.close_stream)
        found = built.registry.acquire_by_content(second, "content", CallContext())
        assert found is not None
        np.testing.assert_array_equal(read_array(found, CallContext()), array(7))
        built.registry.release(found)

        built.sessions.end(second, second.close_stream)
        assert built.held_bytes() == 0
        assert (
            built.registry.acquire_by_content(built.open(b"key"), "content", CallContext()) is None
        )


def test_a_name_for_content_outlives_the_content() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        entry = built.make(session, array(7))
        built.registry.register_content(entry, session, "content")
        built.registry.bind_name(entry, session, b"a")
        built.registry.release(entry)
        assert built.held_bytes() == 16 * KIB

        built.registry.drop(session, [b"a"])
        found = built.registry.acquire_by_content(session, "content", CallContext())
        assert found is not None
        built.registry.release(found)


def test_tenants_have_nothing_of_each_other() -> None:
    with make_registry_fixture() as built:
        alice, bob, second = built.open(b"alice"), built.open(b"bob"), built.open(b"alice")
        entry = built.make(alice, array(1))
        built.registry.register_content(entry, alice, "content")
        built.registry.bind_name(entry, alice, b"a")
        built.registry.release(entry)

        with pytest.raises(LostTensorError) as known:
            built.get(bob, b"a")
        with pytest.raises(LostTensorError) as unknown:
            built.get(bob, b"no such name")
        assert str(known.value) == str(unknown.value)
        assert built.registry.acquire_by_content(bob, "content", CallContext()) is None
        built.registry.drop(bob, [b"a"])

        np.testing.assert_array_equal(built.get(second, b"a"), array(1))
        built.registry.drop(second, [b"a"])  # another session's: passed over
        assert has(built, alice, b"a")


def test_an_ended_session_keeps_nothing() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        entry = built.make(session, array(1))
        built.sessions.end(session, session.close_stream)

        with pytest.raises(LostSessionError):
            built.registry.bind_name(entry, session, b"a")
        built.registry.register_content(entry, session, "content")
        with pytest.raises(LostSessionError):
            built.make(session, array(2))

        built.registry.release(entry)
        assert built.held_bytes() == 0


def test_what_has_no_room_moves_to_the_host_and_comes_back_when_used() -> None:
    with make_registry_fixture(host_bytes=32 * KIB) as built:
        session = built.open()
        names = [b"a", b"b", b"c", b"d", b"e", b"f"]
        for number, name in enumerate(names):
            built.put(session, name, array(number))
        assert built.held_bytes() == 64 * KIB
        device, host = built.registry.cache_states(built.engine, session.tenant)
        assert (device.size_bytes, host.size_bytes) == (64 * KIB, 32 * KIB)

        for number, name in enumerate(names):
            entry = built.registry.acquire_by_name(session, name, "x", CallContext())
            operand = built.registry.operand(entry, built.engine, CallContext())
            assert not isinstance(operand, np.ndarray)
            np.testing.assert_array_equal(built.engine.read(operand, CallContext()), array(number))
            built.registry.release(entry)

        built.put(session, b"g", array(6))
        assert len(built.registry.names_of(session)) == 6


def test_all_tenants_together_have_the_sum_and_what_was_counted_stays_when_they_end() -> None:
    with make_registry_fixture(host_bytes=32 * KIB) as built:
        sessions = [built.open(), built.open()]
        for number, session in enumerate(sessions):
            for name in (b"a", b"b", b"c"):
                built.put(session, name, array(number))
        entry = built.registry.acquire_by_name(sessions[1], b"c", "x", CallContext())
        built.registry.operand(entry, built.engine, CallContext())
        built.registry.release(entry)
        full = built.registry.whole_states()
        own = [built.registry.cache_states(built.engine, each.tenant) for each in sessions]
        for session in sessions:
            built.sessions.end(session, session.close_stream)
        ended = built.registry.whole_states()

    assert full.keys() == {built.engine.info.id, "host"}
    for state, parts in zip(full.values(), zip(*own, strict=True), strict=True):
        assert (state.name, state.limit_bytes) == (parts[0].name, parts[0].limit_bytes)
        for field in ("count", "size_bytes", "hits_count", "misses_count", "evictions_count"):
            assert getattr(state, field) == sum(getattr(each, field) for each in parts)
    device, host = full.values()
    assert (device.count, host.count) == (4, 2)
    assert (device.hits_count, device.evictions_count) == (1, 2)
    for state, before in zip(ended.values(), full.values(), strict=True):
        assert (state.count, state.size_bytes) == (0, 0)
        assert (state.hits_count, state.evictions_count) == (
            before.hits_count,
            before.evictions_count,
        )


def test_what_cannot_come_back_is_used_from_the_host() -> None:
    with make_registry_fixture(host_bytes=16 * KIB, device_bytes=16 * KIB) as built:
        session = built.open()
        built.put(session, b"a", array(1))
        built.put(session, b"b", array(2))  # a moves to the host
        b = built.registry.acquire_by_name(session, b"b", "W", CallContext())
        a = built.registry.acquire_by_name(session, b"a", "x", CallContext())

        operand = built.registry.operand(a, built.engine, CallContext())

        assert isinstance(operand, np.ndarray)
        np.testing.assert_array_equal(operand, array(1))
        for entry in (a, b):
            built.registry.release(entry)


def test_what_is_used_on_another_device_is_copied_through_the_host() -> None:
    with make_registry_fixture(devices_count=2) as built:
        session, (first, second) = built.open(), built.engines.all
        entry = built.make(session, array(1), first)

        operand = built.registry.operand(entry, second, CallContext())

        assert isinstance(operand, np.ndarray)
        np.testing.assert_array_equal(operand, array(1))
        built.registry.release(entry)


def test_calls_move_tensors_aside_but_drop_none_within_a_share() -> None:
    with make_registry_fixture(host_bytes=16 * KIB) as built:
        session = built.open()
        built.put(session, b"a", array(1))
        built.put(session, b"b", array(2))

        built.engine.on_shortage(1, CallContext())
        assert built.held_bytes() == 16 * KIB
        built.engine.on_shortage(1 << 40, CallContext())

        assert built.held_bytes() == 16 * KIB
        assert kept_names(built, session, b"ab") == b"ab"


def test_a_call_gets_the_memory_of_its_own_tenants_idle_tensors() -> None:
    x = np.ones((1, 1, 64, 64), np.float32)
    one = np.ones((1, 1, 1, 1), np.float32)
    problem = Problem(spec_of(x), spec_of(one), Geometry())
    with make_registry_fixture(device_bytes=None, quota_bytes=1 << 40) as built:
        session, call = built.open(), CallContext()
        budget_bytes = built.engine.info.budget_bytes
        large = TensorSpec((budget_bytes // 2 - 16 * KIB,), np.dtype(np.uint8))  # never touched
        made = [built.registry.make(session, large, built.engine, CallContext()) for _ in range(2)]
        for name, entry in zip([b"a", b"b"], made, strict=True):
            built.registry.bind_name(entry, session, name)
        arguments = (problem, x, one, None, Options())
        call.tenant = session.tenant
        with pytest.raises(UnavailableError, match="resident tensors have"):
            deconvolve(built.engine, *arguments, call)

        built.registry.release(made[0])
        with pytest.raises(UnavailableError, match="resident tensors have"):
            deconvolve(
                built.engine, *arguments, CallContext()
            )  # a stranger's, and the tenant is alone
        y = deconvolve(built.engine, *arguments, call)

        np.testing.assert_array_equal(y, x)
        assert kept_names(built, session, b"ab") == b"b"
        built.registry.release(made[1])


def test_room_that_is_being_made_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_registry_fixture(host_bytes=64 * KIB) as built, ThreadPoolExecutor(2) as pool:
        session = built.open()
        for number, name in enumerate([b"a", b"b", b"c", b"d"]):
            built.put(session, name, array(number))
        reading, go_on = threading.Event(), threading.Event()
        read = built.engine.read

        def slow_read(*args: Any) -> Array:
            reading.set()
            assert go_on.wait(30)
            return read(*args)

        monkeypatch.setattr(built.engine, "read", slow_read)
        first = pool.submit(built.put, session, b"e", array(5, 5 * KIB))
        assert reading.wait(30)
        second = pool.submit(built.put, session, b"f", array(6, 5 * KIB))
        threading.Event().wait(0.2)  # by now it waits, or has displaced another in vain
        go_on.set()
        for put in (first, second):
            put.result(30)

        device, host = built.registry.cache_states(built.engine, session.tenant)
        assert (device.count, host.count) == (5, 1)


def test_calls_that_take_the_memory_cost_no_more_tensors_than_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make_registry_fixture(device_bytes=None) as built:
        session = built.open()
        for number, name in enumerate([b"a", b"b", b"c", b"d"]):
            built.put(session, name, array(number))
        free_bytes = built.engine.info.budget_bytes - built.held_bytes()
        taken = built.engine.empty(TensorSpec((free_bytes,), np.dtype(np.uint8)))  # as calls might

        built.put(session, b"e", array(5))  # one made room for it
        assert kept_names(built, session, b"abcde") == b"bcde"

        def nothing_left(_: TensorSpec) -> DeviceTensor:
            raise ExhaustedError("the card has not the memory")

        monkeypatch.setattr(built.engine, "empty", nothing_left)
        with pytest.raises(UnavailableError, match="the card has not") as raised:
            built.put(session, b"f", array(6))

        assert raised.value.retry_after_s
        assert kept_names(built, session, b"bcdef") == b"cde"
        built.engine.free(taken)


def test_what_cannot_be_moved_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_registry_fixture(host_bytes=64 * KIB) as built:
        session = built.open()
        for number, name in enumerate([b"a", b"b", b"c", b"d"]):
            built.put(session, name, array(number))

        def failing(_: TensorSpec, *, is_lasting: bool) -> Array:
            raise ExhaustedError("no pinned memory")

        monkeypatch.setattr(built.engine, "allocate_host_array", failing)
        built.put(session, b"e", array(5))

        assert kept_names(built, session, b"abcde") == b"bcde"
        device, host = built.registry.cache_states(built.engine, session.tenant)
        assert (device.count, host.count, host.size_bytes) == (4, 0, 0)


def test_ten_thousand_puts_and_drops_leave_nothing() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        for number in range(10_000):
            built.put(session, b"%d" % number, array(number, 512))
            if number >= 10:
                built.registry.drop(session, [b"%d" % (number - 10)])
        assert built.held_bytes() == 10 * 512
        assert len(built.registry.names_of(session)) == 10


def test_many_threads_read_what_was_put_whatever_moves() -> None:
    with make_registry_fixture(
        host_bytes=48 * KIB, device_bytes=48 * KIB, devices_count=2
    ) as built:
        sessions = [built.open() for _ in range(3)]
        lost = threading.Event()

        def work(seed: int) -> None:
            random, session = Random(seed), sessions[seed % 3]
            for step in range(150):
                value = seed * 1000 + step
                name = b"%d" % value
                engine = random.choice(built.engines.all)
                try:
                    built.put(session, name, array(value, 8 * KIB), engine)
                except (ExhaustedError, UnavailableError):
                    continue
                older = random.randrange(max(step - 6, 0), step + 1)
                use(session, seed * 1000 + older)
                if random.random() < 0.3:
                    built.registry.drop(session, [name])

        def use(session: Session, value: int) -> None:
            try:
                entry = built.registry.acquire_by_name(session, b"%d" % value, "x", CallContext())
            except LostTensorError:
                lost.set()
                return
            try:
                operand = built.registry.operand(entry, built.engine, CallContext())
                found = (
                    operand
                    if isinstance(operand, np.ndarray)
                    else built.engine.read(operand, CallContext())
                )
                np.testing.assert_array_equal(found, array(value, 8 * KIB))
            finally:
                built.registry.release(entry)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert lost.is_set()  # so there was pressure


def test_a_session_is_resumed_in_time_or_not_at_all() -> None:
    with make_registry_fixture() as built:
        session = built.open()
        built.put(session, b"a", array(1))
        built.sessions.mark_broken(session, session.close_stream)
        built.clock.now_s += 4
        built.sessions.expire()

        assert built.sessions.resume(session.name, b"", lambda: None) is session
        built.clock.now_s += 20
        built.sessions.expire()
        assert has(built, built.sessions.get(session.name), b"a")

        built.sessions.mark_broken(session, session.close_stream)
        built.clock.now_s += 6
        built.sessions.expire()
        with pytest.raises(LostSessionError):
            built.sessions.resume(session.name, b"", lambda: None)
        assert built.held_bytes() == 0


def test_a_stream_that_was_superseded_has_no_say() -> None:
    with make_registry_fixture() as built:
        hung_up: list[str] = []
        old, new = (lambda: hung_up.append("old")), (lambda: hung_up.append("new"))
        session = built.sessions.open(b"", old)

        built.sessions.resume(session.name, b"", new)
        assert hung_up == ["old"]
        built.sessions.mark_broken(session, old)
        built.sessions.end(session, old)

        assert built.sessions.get(session.name) is session
        built.sessions.end(session, new)
        with pytest.raises(LostSessionError):
            built.sessions.get(session.name)


def test_a_sign_of_life_keeps_a_session_and_silence_ends_it() -> None:
    with make_registry_fixture() as built:
        hung_up = threading.Event()
        session = built.sessions.open(b"", hung_up.set)
        for _ in range(5):
            built.clock.now_s += 20
            built.sessions.heartbeat(session)
            built.sessions.expire()
        assert built.sessions.count == 1
        assert not hung_up.is_set()

        built.clock.now_s += 31
        built.sessions.expire()
        assert built.sessions.count == 0
        assert hung_up.is_set()


def test_there_are_no_more_sessions_than_may_be() -> None:
    with make_registry_fixture() as built:
        sessions = [built.open() for _ in range(8)]
        for number, session in enumerate(sessions):
            built.put(session, b"%d" % number, array(number, 1 * KIB))
        with pytest.raises(UnavailableError, match="no place for more sessions: 8 of 8") as raised:
            built.open()
        assert raised.value.retry_after_s

        built.sessions.end(sessions[0], sessions[0].close_stream)
        built.open()


def test_a_drain_hangs_up_and_takes_no_sessions() -> None:
    with make_registry_fixture() as built:
        hung_up = threading.Event()
        session = built.sessions.open(b"", hung_up.set)
        built.put(session, b"a", array(1))

        built.sessions.drain()

        assert hung_up.is_set()
        assert has(built, built.sessions.get(session.name), b"a")  # calls under way may need it
        with pytest.raises(UnavailableError, match="draining"):
            built.open()
        with pytest.raises(UnavailableError, match="draining"):
            built.sessions.resume(session.name, b"", nothing)


@pytest.mark.parametrize("name", [b"", b"short", bytes(17)])
def test_what_is_no_session_name_is_refused(name: bytes) -> None:
    with (
        make_registry_fixture() as built,
        pytest.raises(InvalidArgumentError, match="16 bytes") as raised,
    ):
        built.sessions.get(name)
    assert raised.value.argument == "session"


def test_a_tenant_key_that_is_too_long_is_refused() -> None:
    with (
        make_registry_fixture() as built,
        pytest.raises(InvalidArgumentError, match="at most 64 bytes, got 65"),
    ):
        built.open(bytes(65))
