"""What the engine asks of a device."""

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
from deconvd_server.device.tensor import DeviceTensor, LentMemory, Tensor

__all__ = [
    "TURN_S",
    "CacheState",
    "Device",
    "DeviceInfo",
    "TimeSharedDevice",
]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is.

    Attributes:
        id: As in the server's ``--device``: ``cpu``, ``cuda:0``.
        name: The maker's name for it.
        memory_bytes: What it has in all.
        threads_count: Threads that compute on it; 0 on a GPU.
        budget_bytes: What the calls under way and the tensors that it holds may take of its memory,
            all together.
        calls_count: How many calls it computes at once; more would only wait inside it.
        has_own_memory: Whether its memory is apart from the host's.
        takes_arriving: Whether it takes operands that are still arriving.
        card: A card's `card_id`, by which all processes of its host know it; empty where
            there is none, and so no memory to lend.
    """

    id: str
    name: str
    memory_bytes: int
    threads_count: int
    budget_bytes: int
    calls_count: int
    has_own_memory: bool = False
    takes_arriving: bool = False
    card: bytes = b""


class Device(Protocol):
    """Computes the operations of `deconvd.model.operation`. Its methods may be called from many threads.

    Operands and places have the shapes and element types of the problem, and any mix of them may
    be in the device's memory. Those that are arrays may have any strides. Operands are in native
    byte order and may be read-only; they are never modified. Places overlap neither each other nor
    an operand; while a call is under way, and if it fails, their elements are arbitrary.

    Every method raises CallCancelledError or DeadlineError soon after the call has ended, and
    ExhaustedError if memory runs out; the device stays usable. No method touches an operand or a
    place once it has returned or raised.
    """

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""

    @property
    def caches(self) -> Sequence[CacheState]:
        """What it keeps between calls, now."""

    def footprint_bytes(
        self,
        operation: Operation,
        problem: Problem,
        operands: Collection[str],
        results: Collection[str],
        resident_bytes: int = 0,
    ) -> int:
        """Return a bound on the device memory that a call takes, in addition to what is there already.

        Args:
            operands, results: The names of those that it has, and that are computed.
            resident_bytes: What its operands and places that are tensors of the device take.
        """

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Tensor],
        options: Options,
        call: CallContext,
    ) -> None:
        """Compute those results of an operation that have places, into them.

        Args:
            problem: It has products: the engine computes others itself, see
                `no_products`.
            operands: By the names of their fields: those that the results need, and perhaps others. None
                is arriving, unless the device `takes_arriving`.
            places: By the names of their fields: at least one.

        Raises:
            ArrivalTimeoutError: An operand did not arrive in time: the call is to be made again once all are there.
        """

    def empty(self, spec: TensorSpec) -> DeviceTensor:
        """Return a new tensor with any elements, to be freed once by `free`.

        It takes `spec.nbytes` of the budget, which is for the caller to know and to count: see
        `Engine`.
        """

    def free(self, tensor: DeviceTensor) -> None:
        """Give the memory of a tensor back, once; a view is never freed."""

    def write(self, tensor: DeviceTensor, array: Array, call: CallContext) -> None:
        """Copy an array, of the tensor's shape and type and in native byte order, into the tensor."""

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements: in `out`, an array of its shape and type, or a new one."""

    def allocate_host_array(self, spec: TensorSpec) -> Array:
        """Return a new array in memory of the host's that it reads and writes fastest."""

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory, all zeros, that can be lent to another process.

        It takes of the budget as `empty` does.

        Raises:
            UnimplementedError: The device is no card.
        """

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Prepare for calls with arrays in some host memory, which nobody uses yet.

        Returns:
            What undoes it: called once, when no call uses the memory any more, before it is unmapped
            and before the device is closed.
        """

    def close(self) -> None:
        """Free what the device holds. No call may be running, and none may follow."""


TURN_S: Final = 0.1
"""How long a call computes before it lets another have its place.

That is about as long as a call waits for each other that is before it, and a call of less than this is done at once.
It is much more than it takes to change over.
"""


@runtime_checkable
class TimeSharedDevice(Protocol):
    """A device whose calls take turns: one that computes for long lets others have its place meanwhile.

    Attributes:
        yield_turn: Set by its owner. Called in a call's thread, after each `TURN_S`, while the device does
            nothing for the call: returns once the call has a place again, and raises as `Call.check` does.
    """

    yield_turn: Callable[[CallContext], None]

    def min_duration_s(self, problem: Problem, results: Collection[str]) -> float:
        """Return a bound below the seconds that a call takes, if it is alone; 0 if nothing is known.

        Args:
            results: The names of those that are computed.
        """
