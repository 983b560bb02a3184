"""NVIDIA cards as devices: cuDNN, and our own kernels where those are faster.

Needs the `cuda13` extra. CUDA is loaded when a device is opened, not when this package is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deconvd_server.device.cuda.api.early_start import start_cards
from deconvd_server.device.faults import DeviceLostError, DeviceUnavailableError

if TYPE_CHECKING:
    from deconvd_server.device.cuda.device import CudaDevice

__all__ = [
    "DeviceLostError",
    "DeviceUnavailableError",
    "check_device",
    "devices_count",
    "open_device",
    "start_cards",
]


def open_device(
    ordinal: int,
    *,
    memory_limit_bytes: int | None = None,
    plan_store: Path | None = None,
    on_lost: Callable[[DeviceLostError], None] = lambda _: None,
    parts_count: int = 1,
    is_plan_store_lasting: bool = True,
) -> CudaDevice:
    """Return a card as a device, which warms up in the background. The other arguments, and errors, are `CudaDevice`'s.

    Our own kernels, once compiled, are kept in the folder of plans too; without a lasting one, in the user's folder of
    caches.

    Args:
        is_plan_store_lasting: Whether the folder of plans outlives the server.
    """
    from deconvd_server.device.cuda import kernels
    from deconvd_server.device.cuda.device import CudaDevice

    kernels.keep_compiled(
        plan_store / "kernels"
        if plan_store is not None and is_plan_store_lasting
        else kernels.default_folder()
    )
    device = CudaDevice(
        ordinal,
        memory_limit_bytes=memory_limit_bytes,
        plan_store=plan_store,
        on_lost=on_lost,
        parts_count=parts_count,
    )
    device.rehearse()
    return device


def devices_count() -> int:
    """Return how many cards this process can see.

    Raises:
        DeviceUnavailableError: CuPy or the driver is missing.
    """
    from deconvd_server.device.cuda.api.runtime import cards_count

    return cards_count()


def check_device(ordinal: int) -> None:
    """Raise DeviceUnavailableError if a card cannot be used, as far as can be told without opening it.

    It may be too old, or cuDNN may be missing or too old.
    """
    from deconvd_server.device.cuda.api.runtime import check_card
    from deconvd_server.device.cuda.cudnn import Cudnn

    check_card(ordinal)
    Cudnn()
