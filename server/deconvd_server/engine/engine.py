"""The engines: each owns a device and decides which calls run on it, and when."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import numpy as np

from deconvd.errors import DeadlineError, InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device import (
    CacheState,
    Device,
    DeviceInfo,
    DeviceTensor,
    LentMemory,
    Operand,
    Tensor,
    TimeSharedDevice,
)
from deconvd_server.device.arriving import ArrivalTimeoutError, Arriving, require_all, wait_for_all
from deconvd_server.device.no_products import bytes_without_products, run_without_products
from deconvd_server.engine.admission import Admission, Load, PairedAdmission
from deconvd_server.engine.result_arrays import new_result

__all__ = ["Engine", "Engines", "ResultTarget"]

ResultTarget: TypeAlias = Tensor | TensorSpec
"""Where a result is put: a spec stands for a new array in the host's memory, made once its call is admitted."""

_DEADLINE_MARGIN: Final = 4
"""How many times as long as a call may take it must take at least, for it to be refused.

That is at the best rate that the device reaches, which no problem comes near. What could just about end in time is
tried.
"""


class Engine:
    """Runs calls on a device it owns, no more at once than the device can use.

    Calls and the tensors that it makes share the device's budget. A call waits for other calls, but
    not for tensors: what of their memory a call lacks, `on_shortage` may free.

    Args:
        waiting_count: How many calls may wait for their turn; the next is refused.
        messages: What calls hold of the host's memory for what is sent and received, where the device's memory is
            apart. Where it is not, the device's budget counts that too.

    Attributes:
        on_shortage: Called, in the thread of a call that does not fit beside the tensors there are,
            with the bytes that it lacks and the call: may `free` some. By default it does nothing, and the call
            is refused with UnavailableError.
    """

    def __init__(
        self, device: Device, *, waiting_count: int, messages: Admission | None = None
    ) -> None:
        self._device = device
        self.info: DeviceInfo = device.info
        self._messages = messages if self.info.has_own_memory else None
        self.on_shortage: Callable[[int, CallContext], None] = lambda *_: None
        self._admission = Admission(
            self.info.calls_count,
            self.info.budget_bytes,
            waiting_count,
            reserved_count=waiting_count // 4,
            make_room=lambda size_bytes, call: self.on_shortage(size_bytes, call),  # noqa: PLW0108 - set later
        )
        self._turns = device if isinstance(device, TimeSharedDevice) else None
        if self._turns is not None:
            self._turns.yield_turn = self._admission.yield_turn

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, ResultTarget],
        options: Options,
        call: CallContext,
        *,
        brought_bytes: int = 0,
        sent_bytes: int = 0,
    ) -> dict[str, Array]:
        """Compute those results of an operation that have places, into them; return those that are new arrays.

        Args:
            operands: By the names of their fields: those that the results need, and perhaps others.
            places: By the names of their fields: at least one. Their shapes and element types are the problem's.
            brought_bytes: What the call holds of the host's memory already: its request's elements.
            sent_bytes: What those results have that are sent in a message: they are copied once more, and counted
                until the call's end.

        Raises as `check_time`, `Admission.admitted`, `new_result` and `Device.run` do.
        """
        if self._turns is not None and problem.has_products:
            self.check_time(problem, places, call)
        tensors: dict[str, Tensor] = {}
        present_bytes = 0  # what operands and places that are in a device's memory take there
        for field, operand in operands.items():
            if not isinstance(operand, Arriving):
                tensors[field] = operand
                if not isinstance(operand, np.ndarray):
                    present_bytes += operand.spec.nbytes
        for place in places.values():
            if not isinstance(place, (np.ndarray, TensorSpec)):
                present_bytes += place.spec.nbytes
        footprint_bytes = self._device.footprint_bytes(
            operation, problem, operands, places, present_bytes
        )
        lasting_bytes = brought_bytes + 2 * sent_bytes
        if self._messages is None:
            footprint_bytes += brought_bytes + sent_bytes
            admitted = self._admission.admit(
                footprint_bytes, call, lasting_bytes=lasting_bytes, brought_bytes=brought_bytes
            )
        else:
            admitted = self._admission.admit(footprint_bytes, call)
            host_bytes = lasting_bytes
            if not problem.has_products:
                host_bytes += bytes_without_products(problem, operands, places)
            if host_bytes:
                admitted = PairedAdmission(
                    self._messages.admit(
                        host_bytes, call, lasting_bytes=lasting_bytes, brought_bytes=brought_bytes
                    ),
                    admitted,
                )
        if len(tensors) < len(operands):
            if self.info.takes_arriving and problem.has_products:
                with suppress(ArrivalTimeoutError), admitted:
                    return self._compute(operation, problem, operands, places, options, call)
            self._admission.check_fits(footprint_bytes)  # before all operands have arrived
            tensors = wait_for_all(operands, call)  # without a turn that others could have
        with admitted:
            return self._compute(operation, problem, tensors, places, options, call)

    def check_time(self, problem: Problem, results: Collection[str], call: CallContext) -> None:
        """Return if a call may end in time, as far as is known.

        Args:
            results: The names of those that are to be computed.

        Raises:
            DeadlineError: It would take several times as long as it has, if it were alone.
        """
        least_s = 0.0 if self._turns is None else self._turns.min_duration_s(problem, results)
        remaining_s = call.remaining_s() if least_s else None
        if remaining_s is not None and least_s > _DEADLINE_MARGIN * remaining_s:
            raise DeadlineError(
                f"the call would take more than {least_s:.3g} s, as x {problem.x} and W {problem.W} are, and its "
                f"deadline is in {remaining_s:.3g} s"
            )

    def _compute(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, ResultTarget],
        options: Options,
        call: CallContext,
    ) -> dict[str, Array]:
        new: dict[str, Array] = {}
        targets: dict[str, Tensor] = {}
        for field, place in places.items():
            if isinstance(place, TensorSpec):
                targets[field] = new[field] = new_result(problem, place)
            else:
                targets[field] = place
        if problem.has_products:
            self._device.run(operation, problem, operands, targets, options, call)
        else:  # all operands were waited for
            run_without_products(self._device, problem, require_all(operands), targets, call)
        return new

    def empty(self, spec: TensorSpec) -> DeviceTensor:
        """Return a new tensor in the device's memory, with any elements; end it by `free`.

        Raises:
            ExhaustedError: The budget has no room for it now: `free` others, or wait for calls.
        """
        self.reserve(spec.nbytes)
        try:
            return self._device.empty(spec)
        except BaseException:
            self.release(spec.nbytes)
            raise

    def free(self, tensor: DeviceTensor) -> None:
        """Free a tensor that `empty` made, once: see `DeviceTensor`."""
        self._device.free(tensor)
        self.release(tensor.spec.nbytes)

    def reserve(self, size_bytes: int) -> None:
        """Count memory that the device keeps with a tensor, until it is released. Raises as `empty`."""
        self._admission.reserve(size_bytes)

    def release(self, size_bytes: int) -> None:
        """Count memory that was held as free."""
        self._admission.release(size_bytes)

    def write(
        self, tensor: DeviceTensor, array: Array, call: CallContext, *, brought_bytes: int = 0
    ) -> None:
        """Copy an array into a tensor. Raises as `Admission.admitted` and `Device.write` do.

        Args:
            brought_bytes: What the call holds of the host's memory while it waits.
        """
        with self._admission.admit(0, call, brought_bytes=brought_bytes):
            self._device.write(tensor, array, call)

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements, in `out` if given. Raises as `write` does."""
        with self._admission.admit(0, call):
            return self._device.read(tensor, call, out)

    def allocate_host_array(self, spec: TensorSpec) -> Array:
        """Return a new array in memory of the host's that the device reads and writes fastest.

        Raises:
            ExhaustedError: The host has not the memory.
        """
        return self._device.allocate_host_array(spec)

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory of the card that another process may open; end it by `take_back`.

        Raises:
            ExhaustedError: The budget has no room for it now.
            UnimplementedError: The device is no card.
        """
        self._admission.reserve(size_bytes)
        try:
            return self._device.lend(size_bytes)
        except BaseException:
            self._admission.release(size_bytes)
            raise

    def take_back(self, lent: LentMemory) -> None:
        """Free memory that `lend` made, once: see `LentMemory.free`."""
        lent.free()
        self._admission.release(lent.size_bytes)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare for calls with arrays in some host memory. See `Device.register`."""
        return self._device.register(address, size_bytes)

    @property
    def load(self) -> Load:
        """What runs, what waits and what tensors hold now."""
        return self._admission.load

    @property
    def taken_bytes(self) -> int:
        """What calls and tensors take of the device's budget now."""
        return self._admission.taken_bytes

    @property
    def caches(self) -> Sequence[CacheState]:
        """What its device keeps between calls, now."""
        return self._device.caches

    def close(self) -> None:
        """Close the device. No call may be running, and none may follow."""
        self._device.close()


class Engines:
    """The engines of a server, one for each of its devices: at least one.

    Args:
        waiting_count: How many calls may wait for their turn on each device.
        messages: See `Engine`.
    """

    def __init__(
        self, devices: Sequence[Device], *, waiting_count: int, messages: Admission | None = None
    ) -> None:
        self.all = tuple(
            Engine(device, waiting_count=waiting_count, messages=messages) for device in devices
        )

    def least_loaded(self) -> Engine:
        """Return the engine with the fewest calls, and of several the one with the most free memory."""
        return self.all[0] if len(self.all) == 1 else min(self.all, key=_load_key)

    def engine_of(self, *operands: Operand) -> Engine | None:
        """Return the engine on whose device operands are; None if all are arrays.

        Raises:
            InvalidArgumentError: They lie on several devices.
        """
        on_devices = [o for o in operands if not isinstance(o, (np.ndarray, Arriving))]
        if not on_devices:
            return None
        ids = {tensor.device_id for tensor in on_devices}
        if len(ids) > 1:
            raise InvalidArgumentError(
                f"tensors that are on devices must be on one, got {', '.join(sorted(ids))}"
            )
        return next((engine for engine in self.all if engine.info.id in ids), None)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare every device for calls with arrays in some host memory. See `Device.register`."""
        undo = [engine.register(address, size_bytes) for engine in self.all]

        def undo_all() -> None:
            for one in undo:
                one()

        return undo_all

    def close(self) -> None:
        """Close every device. No call may be running, and none may follow."""
        for engine in self.all:
            engine.close()


def _load_key(engine: Engine) -> tuple[int, float]:
    load = engine.load
    used_bytes = load.used_bytes + load.reserved_bytes
    return load.running_count + load.waiting_count, used_bytes / engine.info.budget_bytes
