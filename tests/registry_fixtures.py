"""Registries of resident tensors on real devices with little memory, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceInfo
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine.engine import Engine, Engines
from deconvd_server.residents import (
    ResidentEntry,
    ResidentRegistry,
    Session,
    SessionLimits,
    Sessions,
)
from deconvd_server.residents.elements import read_array

__all__ = ["KIB", "Clock", "RegistryFixture", "make_registry_fixture"]

KIB = 1 << 10


class SmallDevice(CpuDevice):
    """A processor that has memory apart from the host's, for all that others can tell."""

    def __init__(self, name: str, *, has_own_memory: bool) -> None:
        super().__init__(1)
        self._name = name
        self._has_own_memory = has_own_memory

    @property
    def info(self) -> DeviceInfo:
        """As for a card."""
        return replace(super().info, id=self._name, has_own_memory=self._has_own_memory)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


class RegistryFixture:
    """A registry with its sessions and engines.

    Args:
        device_bytes: How many bytes of tensors each device may have; None for all that calls may take.
    """

    LEASE_S = 30.0

    def __init__(
        self, *, device_bytes: int | None, host_bytes: int, quota_bytes: int, devices_count: int
    ) -> None:
        devices = [
            SmallDevice(f"device:{number}", has_own_memory=host_bytes > 0)
            for number in range(devices_count)
        ]
        self.engines = Engines(devices, waiting_count=10)
        self.registry = ResidentRegistry(
            self.engines.all, lambda engine: device_bytes or engine.info.budget_bytes, host_bytes
        )
        self.clock = Clock()
        self.sessions = Sessions(
            SessionLimits(8, self.LEASE_S, quota_bytes), self.registry.end_session, self.clock
        )

    @property
    def engine(self) -> Engine:
        """The first engine."""
        return self.engines.all[0]

    def open(self, tenant_key: bytes = b"", identity: str = "") -> Session:
        """Return a new session."""
        return self.sessions.open(tenant_key, lambda: None, identity=identity)

    def put(
        self, session: Session, name: bytes, array: Array, engine: Engine | None = None
    ) -> ResidentEntry:
        """Keep an array under a name, and return it, not in use."""
        entry = self.make(session, array, engine)
        try:
            self.registry.bind_name(entry, session, name)
        finally:
            self.registry.release(entry)
        return entry

    def make(self, session: Session, array: Array, engine: Engine | None = None) -> ResidentEntry:
        """Keep an array without a name, in use."""
        engine = engine or self.engine
        entry = self.registry.make(
            session, TensorSpec(array.shape, array.dtype), engine, CallContext()
        )
        assert not isinstance(entry.operand, np.ndarray)
        engine.write(entry.operand, array, CallContext())
        return entry

    def get(self, session: Session, name: bytes) -> Array:
        """Return the elements of what has a name."""
        entry = self.registry.acquire_by_name(session, name, "x", CallContext())
        try:
            return read_array(entry, CallContext()).copy()
        finally:
            self.registry.release(entry)

    def tier_bytes(self, engine: Engine) -> list[int]:
        """Return what counts on an engine's device, and beneath it, whoever's it is."""
        tier = self.registry._placement._tiers[engine.info.id]
        return [each.used_bytes for each in (tier, tier.lower_tier) if each is not None]

    def held_bytes(self) -> int:
        """Return what tensors hold of the devices."""
        return sum(engine.load.reserved_bytes for engine in self.engines.all)


@contextmanager
def make_registry_fixture(
    *,
    device_bytes: int | None = 64 * KIB,
    host_bytes: int = 0,
    quota_bytes: int = 1 << 30,
    devices_count: int = 1,
) -> Iterator[RegistryFixture]:
    """Run a house for the block, and see that nothing is left once all its sessions have ended."""
    built = RegistryFixture(
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        quota_bytes=quota_bytes,
        devices_count=devices_count,
    )
    try:
        yield built
        built.clock.now_s += 2 * RegistryFixture.LEASE_S
        built.sessions.expire()
        assert built.sessions.count == 0
        assert built.held_bytes() == 0
        for engine in built.engines.all:
            assert built.tier_bytes(engine) in ([0], [0, 0])
    finally:
        built.engines.close()
