"""The registry against a model, for any order of putting, using, dropping, evicting and expiring."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import count
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from deconvd.errors import ExhaustedError, LostSessionError, LostTensorError, UnavailableError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.residents import ResidentEntry, Session, placement
from deconvd_server.residents.elements import read_array, read_samples
from deconvd_server.residents.quotas import counted_bytes
from deconvd_server.residents.tenant import SessionState, Tenant
from tests.registry_fixtures import KIB, RegistryFixture, make_registry_fixture

QUOTA_BYTES = 96 * KIB
DEVICE_BYTES = 64 * KIB


@dataclass(eq=False)
class Thing:
    """What the model knows of a tensor: what it is, and who may name it."""

    value: int
    elements_bytes: int
    session: Session
    name: bytes
    is_dropped: bool = False
    may_be_evicted: bool = False

    @property
    def array(self) -> Array:
        return np.full(self.elements_bytes // 4, self.value, np.float32)

    @property
    def size_bytes(self) -> int:
        """What it counts for."""
        return counted_bytes(spec_of(self.array))

    @property
    def is_gone(self) -> bool:
        """Whether it must not be found any more."""
        return self.is_dropped or self.session.state is SessionState.ENDED


@dataclass(eq=False)
class Use:
    """A call that uses a tensor."""

    thing: Thing
    entry: ResidentEntry
    resting: AbstractContextManager[None] | None = None


class RegistryMachine(RuleBasedStateMachine):
    """What was put is found with its elements, unless it was dropped, expired, or something made it give way."""

    sessions = Bundle("sessions")
    things = Bundle("things")
    uses = Bundle("uses")

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._numbers = count(1)
        self._all: list[Thing] = []
        self._uses: list[Use] = []

    @initialize(host_kib=st.sampled_from([0, 32, 64]), devices_count=st.integers(1, 2))
    def begin(self, host_kib: int, devices_count: int) -> None:
        patched = mock.patch.object(placement, "_SHARE_WAIT_S", 0.01)  # no call ends meanwhile
        self._stack.enter_context(patched)
        self.house: RegistryFixture = self._stack.enter_context(
            make_registry_fixture(
                device_bytes=DEVICE_BYTES,
                host_bytes=host_kib * KIB,
                quota_bytes=QUOTA_BYTES,
                devices_count=devices_count,
            )
        )

    def teardown(self) -> None:
        for use in self._uses:
            self._go_on(use)
            self.house.registry.release(use.entry)
        self._stack.close()  # sees that nothing is left

    @rule(target=sessions, key=st.sampled_from([b"", b"one", b"two"]))
    def open(self, key: bytes) -> object:
        try:
            return self.house.open(key)
        except UnavailableError:
            assert self.house.sessions.count == 8
            return multiple()

    @rule(
        target=things,
        session=sessions,
        kib=st.sampled_from([1, 8, 16, 30, 60, 70]),
        device=st.integers(0, 1),
    )
    def put(self, session: Session, kib: int, device: int) -> object:
        number = next(self._numbers)
        thing = Thing(number, kib * KIB, session, b"%d" % number)
        engine = self.house.engines.all[device % len(self.house.engines.all)]
        safe = self._safe_from(session.tenant)
        try:
            self.house.put(session, thing.name, thing.array, engine)
        except LostSessionError:
            assert session.state is SessionState.ENDED
            return multiple()
        except ExhaustedError:
            return multiple()
        except UnavailableError:  # it is promised, and others' calls use it
            assert any(use.resting is None for use in self._uses)
            return multiple()
        finally:
            # a tenant that is within its share of every tier has lost nothing
            for other in safe:
                assert other.name in self.house.registry.names_of(other.session)
            for other in self._all:
                other.may_be_evicted |= other not in safe
        self._all.append(thing)
        return thing

    def _safe_from(self, tenant: Tenant) -> list[Thing]:
        """Return what another tenant's put must not displace, and what no room is needed of."""
        tenants = {thing.session.tenant for thing in self._all if self._is_there(thing)} | {tenant}
        share_bytes = DEVICE_BYTES // len(tenants)
        host_bytes = self.house.registry.cache_states(self.house.engine, None)[-1].limit_bytes
        modest = [
            other
            for other in tenants - {tenant}
            if self.house.registry.used_bytes(other)
            <= min(share_bytes, max(host_bytes // len(tenants), share_bytes))
        ]
        return [
            thing for thing in self._all if self._is_there(thing) and thing.session.tenant in modest
        ]

    def _is_there(self, thing: Thing) -> bool:
        return thing.name in self.house.registry.names_of(thing.session)

    @rule(thing=things, session=sessions)
    def read(self, thing: Thing, session: Session) -> None:
        self._settle()
        try:
            found = self.house.get(session, thing.name)
        except LostTensorError:
            is_others = session.tenant is not thing.session.tenant
            assert is_others or thing.is_gone or thing.may_be_evicted
            return
        assert session.tenant is thing.session.tenant
        assert not thing.is_gone
        np.testing.assert_array_equal(found, thing.array)

    @rule(target=uses, thing=things)
    def use(self, thing: Thing) -> object:
        try:
            entry = self.house.registry.acquire_by_name(
                thing.session, thing.name, "x", CallContext()
            )
        except LostTensorError:
            return multiple()
        use = Use(thing, entry)
        self._uses.append(use)
        return use

    @rule(use=uses, device=st.integers(0, 1))
    def compute(self, use: Use, device: int) -> None:
        if use not in self._uses or use.resting is not None or use.entry.is_freed:
            return
        engine = self.house.engines.all[device % len(self.house.engines.all)]
        operand = self.house.registry.operand(use.entry, engine, CallContext())
        for other in self._all:  # what comes back from the host makes room for itself
            other.may_be_evicted = True
        found = operand if isinstance(operand, np.ndarray) else engine.read(operand, CallContext())
        np.testing.assert_array_equal(found, use.thing.array)

    @rule(use=consumes(uses))
    def end_use(self, use: Use) -> None:
        self._go_on(use)
        self._uses.remove(use)
        self.house.registry.release(use.entry)

    @rule(use=uses)
    def rest(self, use: Use) -> None:
        if use in self._uses and use.resting is None and not use.entry.is_freed:
            use.resting = self.house.registry.rest(use.entry, CallContext())
            use.resting.__enter__()

    @rule(use=uses)
    def go_on(self, use: Use) -> None:
        self._go_on(use)

    def _go_on(self, use: Use) -> None:
        """Let a use that rests go on; what had to make room meanwhile is used no more."""
        if use.resting is None:
            return
        resting, use.resting = use.resting, None
        resting.__exit__(None, None, None)
        if use.entry.is_freed:
            assert use.thing.may_be_evicted
            with pytest.raises(UnavailableError, match="the tensor was evicted while"):
                read_samples(use.entry, None, CallContext())

    @rule(thing=things)
    def drop(self, thing: Thing) -> None:
        self.house.registry.drop(thing.session, [thing.name])
        thing.is_dropped = True

    @rule(kib=st.sampled_from([1, 20, 200]))
    def calls_need_memory(self, kib: int) -> None:
        self.house.engine.on_shortage(kib * KIB, CallContext())
        for thing in self._all:
            thing.may_be_evicted = True

    @rule(session=consumes(sessions))
    def close(self, session: Session) -> None:
        self.house.sessions.end(session, session.close_stream)

    @rule(session=sessions)
    def lose(self, session: Session) -> None:
        self.house.sessions.mark_broken(session, session.close_stream)

    @rule(session=sessions)
    def resume(self, session: Session) -> None:
        try:
            self.house.sessions.resume(session.name, session.tenant.key, lambda: None)
        except LostSessionError:
            assert session.state is SessionState.ENDED

    @rule(seconds=st.sampled_from([1, 6, 20, 31]), lively=sessions)
    def time_passes(self, seconds: int, lively: Session) -> None:
        self.house.sessions.heartbeat(lively)
        self.house.clock.now_s += seconds
        self.house.sessions.expire()
        if lively.state is SessionState.ENDED:
            with pytest.raises(LostSessionError):
                self.house.sessions.get(lively.name)

    def _settle(self) -> None:
        self.house.sessions.expire()

    @invariant()
    def what_is_used_is_as_it_was(self) -> None:
        for use in self._uses:
            if use.resting is not None or use.entry.is_freed:
                continue
            np.testing.assert_array_equal(read_array(use.entry, CallContext()), use.thing.array)

    @invariant()
    def the_limits_hold(self) -> None:
        if not hasattr(self, "house"):
            return
        for engine in self.house.engines.all:
            limits = [state.limit_bytes for state in self.house.registry.cache_states(engine, None)]
            for size_bytes, limit_bytes in zip(self.house.tier_bytes(engine), limits, strict=True):
                assert 0 <= size_bytes <= limit_bytes
            assert engine.load.reserved_bytes <= DEVICE_BYTES
        for tenant in {thing.session.tenant for thing in self._all}:
            assert 0 <= self.house.registry.used_bytes(tenant) <= QUOTA_BYTES

    @invariant()
    def what_has_a_name_counts(self) -> None:
        there = [thing for thing in self._all if self._is_there(thing)]
        used = [use.thing for use in self._uses if not use.entry.is_freed]
        for tenant in {thing.session.tenant for thing in self._all}:
            known = {thing for thing in [*there, *used] if thing.session.tenant is tenant}
            counted = sum(thing.size_bytes for thing in known)
            assert self.house.registry.used_bytes(tenant) == counted
            assert counted == sum(
                state.size_bytes
                for place, engine in enumerate(self.house.engines.all)
                for state in self.house.registry.cache_states(engine, tenant)[
                    : 2 if place == 0 else 1
                ]
            )  # the memory beneath is the same for all engines


RegistryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
TestRegistry = RegistryMachine.TestCase
