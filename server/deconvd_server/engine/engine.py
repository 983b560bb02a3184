"""The engines: each owns a device, and decides which calls run on it and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    Departing,
    Device,
    DeviceInfo,
    DeviceTensor,
    LentMemory,
    Operand,
    Place,
    Tensor,
    TimeSharedDevice,
)
from deconvd_server.device.arriving import ArrivalTimeoutError, Arriving, require_all, wait_for_all
from deconvd_server.device.departing import note_all_written, targets_of
from deconvd_server.device.no_products import bytes_without_products, run_without_products
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from deconvd_server.engine.paired_admission import PairedAdmission
from deconvd_server.engine.queue_limits import WaitLimit
from deconvd_server.engine.result_arrays import new_result

__all__ = ["Engine", "Engines", "ResultTarget"]

ResultTarget: TypeAlias = Place | TensorSpec
"""Where to put a result. A spec stands for a new array in host memory, allocated once the call is admitted."""

_DEADLINE_MARGIN: Final = 4
"""A call is refused if it would take at least this many times as long as it may.

The estimate assumes the best rate that the device can reach, and no problem comes near that rate. A
call that could just meet its deadline is tried.
"""


class Engine:
    """Runs calls on the device that it owns, at most as many at once as the device can use. Thread-safe.

    Calls and the tensors made by `empty` share the device's budget. A call waits for other calls, but not
    for tensors: if they leave it too little memory, `on_shortage` may free some.

    Args:
        waiting_count: How many calls may wait for their turn; the next one is refused.
        wait_limit: How long a call may wait for others; it is refused if it would wait for longer.
        messages: Admission to the host memory for requests and responses. It is used if the device has memory
            of its own; if not, the device's budget counts these bytes, too.

    Attributes:
        on_shortage: Called, in the thread of a call that does not fit next to the tensors, with the bytes
            that it lacks and the call. It may `free` some tensors. By default it does nothing, and the
            call is refused with UnavailableError.
    """

    def __init__(
        self,
        device: Device,
        *,
        waiting_count: int,
        wait_limit: WaitLimit | None = None,
        messages: Admission | None = None,
    ) -> None:
        self._device = device
        self.info: DeviceInfo = device.info
        self._messages = messages if self.info.has_own_memory else None
        self.on_shortage: Callable[[int, CallContext], None] = lambda *_: None
        self._admission = Admission(
            self.info.calls_count,
            self.info.budget_bytes,
            waiting_count,
            wait_limit=wait_limit or WaitLimit(),
            make_room=lambda size_bytes, call: self.on_shortage(size_bytes, call),  # noqa: PLW0108 - set later
        )
        self._arriving_lock = threading.Lock()
        self._arriving_count = 0
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
        """Compute the results of an operation that have places, into these; return those that are new arrays.

        Args:
            operands: By field: all that the results need, and perhaps others.
            places: By field: at least one. Their shapes and element types are the problem's. A departing one is told
                of all its bytes before this returns: of some earlier, if the device overlaps transfers.
            brought_bytes: How much host memory the call uses already: the elements in its request.
            sent_bytes: Size of the results that are sent in a message. They are copied once more, and counted
                until the call's end.

        Raises as `check_time`, `Admission.admit`, `new_result` and `Device.run` do.
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
            if not isinstance(place, (np.ndarray, TensorSpec, Departing)):
                present_bytes += place.spec.nbytes
        footprint_bytes = self._device.footprint_bytes(
            operation, problem, operands, places, present_bytes
        )
        # a sent result takes its bytes twice: as an array, and as a part of the message
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
            # some operands are still arriving
            with self._count_arriving() as arriving_count:
                # The device follows a call that is alone: others could use it while it waits for that.
                is_followed = arriving_count == 1 and self.info.overlaps_transfers
                if is_followed and problem.has_products:
                    with suppress(ArrivalTimeoutError), admitted:
                        return self._compute(operation, problem, operands, places, options, call)
                    # they took too long: the place was given back, and is taken again once all have arrived
                self._admission.check_fits(footprint_bytes)  # refuse early what can never run
                # without a place: other calls can run meanwhile
                tensors = wait_for_all(operands, call)
                with admitted:
                    return self._compute(operation, problem, tensors, places, options, call)
        with admitted:
            return self._compute(operation, problem, tensors, places, options, call)

    def check_time(self, problem: Problem, results: Collection[str], call: CallContext) -> None:
        """Raise DeadlineError if a call surely cannot end in time.

        Args:
            results: The fields of the results to compute.

        Raises:
            DeadlineError: Even alone on the device it would take several times as long as it may.
        """
        least_s = 0.0 if self._turns is None else self._turns.min_duration_s(problem, results)
        remaining_s = call.remaining_s() if least_s else None
        if remaining_s is not None and least_s > _DEADLINE_MARGIN * remaining_s:
            raise DeadlineError(
                f"the call would take more than {least_s:.3g} s for x {problem.x} and W {problem.W}, and its "
                f"deadline is in {remaining_s:.3g} s"
            )

    @contextmanager
    def _count_arriving(self) -> Iterator[int]:
        """Count a call whose operands were arriving when it came, for the block. Its value is how many there are."""
        with self._arriving_lock:
            self._arriving_count += 1
            count = self._arriving_count
        try:
            yield count
        finally:
            with self._arriving_lock:
                self._arriving_count -= 1

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
        targets: dict[str, Place] = {}
        for field, place in places.items():
            if isinstance(place, TensorSpec):
                targets[field] = new[field] = self._new_result(problem, place)
            else:
                targets[field] = place
        if not problem.has_products:  # all operands were waited for
            run_without_products(
                self._device, problem, require_all(operands), targets_of(targets), call
            )
        elif self.info.overlaps_transfers:
            self._device.run(operation, problem, operands, targets, options, call)
        else:
            self._device.run(operation, problem, operands, targets_of(targets), options, call)
        note_all_written(targets.values())
        return new

    def _new_result(self, problem: Problem, spec: TensorSpec) -> Array:
        """Return a new array for a result, where the device writes it without a copy within the host."""
        if self.info.has_own_memory:
            return self._device.allocate_host_array(spec)
        return new_result(problem, spec)

    def empty(self, spec: TensorSpec) -> DeviceTensor:
        """Return a new tensor in the device's memory, with undefined elements. End it by `free`.

        Raises:
            ExhaustedError: The budget has no room for it now: `free` others, or wait for calls.
        """
        self._admission.reserve(spec.nbytes)
        try:
            return self._device.empty(spec)
        except BaseException:
            self._admission.release(spec.nbytes)
            raise

    def free(self, tensor: DeviceTensor) -> None:
        """Free a tensor that `empty` made. To be called once: see `DeviceTensor`."""
        self._device.free(tensor)
        self._admission.release(tensor.spec.nbytes)

    def write(
        self, tensor: DeviceTensor, array: Array, call: CallContext, *, brought_bytes: int = 0
    ) -> None:
        """Copy an array into a tensor. Raises as `Admission.admit` and `Device.write` do.

        Args:
            brought_bytes: How much host memory the call uses while it waits.
        """
        with self._admission.admit(0, call, brought_bytes=brought_bytes):
            self._device.write(tensor, array, call)

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements, in `out` if given. Raises as `write` does."""
        with self._admission.admit(0, call):
            return self._device.read(tensor, call, out)

    def allocate_host_array(self, spec: TensorSpec, *, is_lasting: bool = False) -> Array:
        """Return a new array in the host memory that the device reads and writes fastest.

        The caller has admitted the memory: see `Device.allocate_host_array`.

        Raises:
            ExhaustedError: The host has no memory left for it.
        """
        return self._device.allocate_host_array(spec, is_lasting=is_lasting)

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory of the card that another process may open. End it by `take_back`.

        Raises:
            ExhaustedError: The budget has no room for it now.
            UnimplementedError: The device is not a card.
        """
        self._admission.reserve(size_bytes)
        try:
            return self._device.lend(size_bytes)
        except BaseException:
            self._admission.release(size_bytes)
            raise

    def take_back(self, lent: LentMemory) -> None:
        """Free memory that `lend` made. To be called once: see `LentMemory.free`."""
        lent.free()
        self._admission.release(lent.size_bytes)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare for calls with arrays in a part of host memory. See `Device.register`."""
        return self._device.register(address, size_bytes)

    @property
    def load(self) -> Load:
        """How many calls run and wait, and how many bytes calls and tensors use, now."""
        return self._admission.load

    @property
    def busy_us(self) -> int:
        """For how long at least one call has run, since the server started."""
        return self._admission.busy_us

    @property
    def taken_bytes(self) -> int:
        """What calls and tensors take of the device's budget now."""
        return self._admission.taken_bytes

    @property
    def waiting_since_s(self) -> float:
        """Since when a thread has waited for the device. See `Device.waiting_since_s`."""
        return self._device.waiting_since_s

    @property
    def caches(self) -> Sequence[CacheState]:
        """The states of the caches that its device keeps between calls."""
        return self._device.caches

    def close(self) -> None:
        """Close the device. No call may be running, and none may follow."""
        self._device.close()


class Engines:
    """The engines of a server, one for each of its devices. There is at least one.

    Args:
        waiting_count: How many calls may wait for their turn on each device.
        wait_limit, messages: See `Engine`.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        waiting_count: int,
        wait_limit: WaitLimit | None = None,
        messages: Admission | None = None,
    ) -> None:
        self.all = tuple(
            Engine(device, waiting_count=waiting_count, wait_limit=wait_limit, messages=messages)
            for device in devices
        )

    @property
    def have_wide_sums(self) -> bool:
        """Whether all of them can return sums in the type in which they are computed."""
        return all(engine.info.has_wide_sums for engine in self.all)

    def least_loaded(self) -> Engine:
        """Return the engine with the fewest calls; of several, the one with the most free memory."""
        return self.all[0] if len(self.all) == 1 else min(self.all, key=_load_key)

    def engine_of(self, *tensors: Operand | Place) -> Engine | None:
        """Return the engine on whose device operands and places are; None if all are arrays.

        Raises:
            InvalidArgumentError: They are on several devices.
        """
        on_devices = [t for t in tensors if not isinstance(t, (np.ndarray, Arriving, Departing))]
        if not on_devices:
            return None
        ids = {tensor.device_id for tensor in on_devices}
        if len(ids) > 1:
            raise InvalidArgumentError(
                f"all tensors that are on devices must be on one, got {', '.join(sorted(ids))}"
            )
        return next((engine for engine in self.all if engine.info.id in ids), None)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare every device for calls with arrays in a part of host memory. See `Device.register`."""
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
