"""The protocol of devices: how the engine calls them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd.wire.cache_state import CacheState
from deconvd_server.call.context import CallContext
from deconvd_server.device.arriving import Operand
from deconvd_server.device.departing import Place
from deconvd_server.device.tensor import DeviceTensor, LentMemory

__all__ = [
    "TURN_S",
    "CacheState",
    "Device",
    "DeviceInfo",
    "TimeSharedDevice",
]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device's name, memory and abilities.

    Attributes:
        id: Its name in the server's ``--device``: ``cpu``, ``cuda:0``.
        name: The maker's name for it.
        memory_bytes: All of its memory.
        threads_count: Threads that compute on it; 0 for a card.
        budget_bytes: Bound on the memory that the calls under way and the residents take, all together.
        calls_count: How many calls it computes at once. More calls would only wait inside it.
        has_own_memory: Whether it has memory other than the host's.
        overlaps_transfers: Whether it takes operands that are still arriving, and results that leave while it computes.
        has_wide_sums: Whether the places of gW and gb may have the compute type of a problem instead of their own.
        card: A card's `card_id`, by which all processes of its host know it. Empty for a device that is no card, which
            has no memory to lend.
    """

    id: str
    name: str
    memory_bytes: int
    threads_count: int
    budget_bytes: int
    calls_count: int
    has_own_memory: bool = False
    overlaps_transfers: bool = False
    has_wide_sums: bool = False
    card: bytes = b""


class Device(Protocol):
    """Computes the operations of `deconvd.model.operation`. Thread-safe.

    A place is where a result is written. Operands and places have the shapes and element types of the problem. Each may
    be an array of any strides, or a tensor in the device's memory. An operand may also be an array that is still
    arriving, and a place an array that departs meanwhile. Operands are in native byte order, may be read-only, and are
    never modified. Places overlap neither each other nor an operand. While a call is under way, and after it
    has failed, their elements are arbitrary, but for what was noted as written in a departing one.

    Every method that takes a call raises CallCancelledError or DeadlineError soon after the call has ended. Methods
    raise ExhaustedError if memory runs out. The device stays usable. No method touches an operand or a place once it
    has returned or raised.
    """

    @property
    def info(self) -> DeviceInfo:
        """The device's name, memory and abilities."""

    @property
    def caches(self) -> Sequence[CacheState]:
        """The state of its caches, one for each kind of object that it keeps between calls."""

    @property
    def waiting_since_s(self) -> float:
        """Since when a thread has waited for the device in a call that nothing can interrupt, on the monotonic clock.

        Of several waits it is the longest. Infinity if no thread waits so, as always with the processor.
        """

    def wait_until_warm(self) -> None:
        """Wait until the first calls would be as fast as later ones, but no longer than a second or so."""

    def footprint_bytes(
        self,
        operation: Operation,
        problem: Problem,
        operands: Collection[str],
        results: Collection[str],
        resident_bytes: int = 0,
    ) -> int:
        """Return a bound on the device memory that a call takes, in addition to its tensors that are there already.

        Args:
            operands, results: The names of the operands that the call has, and of the results that it computes.
            resident_bytes: Size of the operands and places that are tensors of the device.
        """

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> None:
        """Compute the results of an operation that have places.

        Args:
            problem: It has products. Problems without products are not for devices, see `no_products`.
            operands: By field: those that the results need, and perhaps others. None is arriving, unless the device
                `overlaps_transfers`.
            places: By field: at least one. None is a `Departing`, unless the device `overlaps_transfers`. It then notes
                what it has written of them. It need not note the rest once it returns.

        Raises:
            ArrivalTimeoutError: An operand did not arrive in time. Call again once all are there.
        """

    def empty(self, spec: TensorSpec) -> DeviceTensor:
        """Return a new tensor with arbitrary elements. The caller must `free` it.

        It takes `spec.nbytes` of the budget. The caller counts that: see `Engine`.
        """

    def free(self, tensor: DeviceTensor) -> None:
        """Free the memory of a tensor. It must be called once for a tensor, and never for a view."""

    def write(self, tensor: DeviceTensor, array: Array, call: CallContext) -> None:
        """Copy an array into a tensor. The array has the tensor's shape and type, and is in native byte order."""

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements: in `out`, an array of its shape and type, or in a new array."""

    def allocate_host_array(self, spec: TensorSpec, *, is_lasting: bool = False) -> Array:
        """Return a new C-contiguous array in the kind of host memory that the device reads and writes fastest.

        Its elements are arbitrary. Its memory is used again once nothing refers to it. It may take up to an eighth more
        memory than its size.

        Args:
            is_lasting: The array stays for long, and must take no more than its size, but for a page.
        """

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory, all zeros, that another process can open.

        It takes its size of the budget, as `empty` does.

        Raises:
            UnimplementedError: The device is no card.
        """

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare the device for arrays in some host memory, which nobody uses yet.

        Returns:
            A function that undoes it. It must be called once: after the last call that uses the memory, and before the
            memory is unmapped and the device is closed.
        """

    def close(self) -> None:
        """Free all that the device holds. No call may be running, and none may follow."""


TURN_S: Final = 0.1
"""How long a call computes before it lets another call have its place.

A call waits about this long for each call before it. A call that is shorter is never interrupted. It is much longer
than the change from one call to another takes.
"""


@runtime_checkable
class TimeSharedDevice(Protocol):
    """A device whose calls take turns: a long call lets other calls have its place now and then.

    Attributes:
        yield_turn: Set by the device's owner. The device calls it in the call's thread after each `TURN_S`, and
            computes nothing for the call meanwhile. It returns once the call has a place again, and raises as
            `CallContext.check` does.
    """

    yield_turn: Callable[[CallContext], None]

    def min_duration_s(self, problem: Problem, results: Collection[str]) -> float:
        """Return a bound below the seconds that a call takes if it is alone; 0 if none is known.

        Args:
            results: The names of the results that it computes.
        """
