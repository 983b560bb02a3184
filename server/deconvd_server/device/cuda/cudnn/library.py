"""The cuDNN library: loads it, translates its errors, and keeps a handle for each stream."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field

from deconvd_server.device.faults import DeviceUnavailableError

__all__ = ["Cudnn", "CudnnError", "CudnnHandle", "check_version"]

_OLDEST_VERSION = 91900
"""The oldest version that deconvd is tested with, 9.19.0. Version 9.14 ends the process by SIGFPE for some problems."""

_INSTALL = "pip install '.[server,cuda13]' in a checkout of deconvd"
_MESSAGE_BYTES = 1024


class CudnnError(Exception):
    """A call of cuDNN failed.

    Attributes:
        status: The `cudnnStatus_t`.
    """

    def __init__(self, function: str, status: int, detail: str) -> None:
        super().__init__(f"{function} failed with status {status}: {detail}")
        self.status = status

    @property
    def is_unsupported(self) -> bool:
        """Whether cuDNN does not support this: `CUDNN_STATUS_NOT_SUPPORTED`, 3000, or a status of its kind."""
        return self.status // 1000 == 3


@dataclass(slots=True)
class CudnnHandle:
    """A cuDNN handle bound to a stream, and the lock that a thread must have to use it."""

    pointer: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Cudnn:
    """cuDNN on the current device of the threads that call it.

    Raises:
        DeviceUnavailableError: cuDNN is missing or too old.
    """

    def __init__(self) -> None:
        self._library, path = _load()
        self._handles: dict[int, CudnnHandle] = {}
        self._lock = threading.Lock()
        self.version = self._read_version()
        check_version(self.version, path)

    def call(self, function: str, *arguments: object) -> None:
        """Call a function that returns a status. The interpreter's lock is released meanwhile.

        Raises:
            CudnnError: The status is not success.
        """
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise CudnnError(function, status, self._last_error())

    def execute(self, handle: CudnnHandle, plan: int, pack: int) -> None:
        """Enqueue a plan on the handle's stream, given the addresses of its descriptors."""
        self.call(
            "cudnnBackendExecute",
            ctypes.c_void_p(handle.pointer),
            ctypes.c_void_p(plan),
            ctypes.c_void_p(pack),
        )

    def handle(self, stream: int) -> CudnnHandle:
        """Return the handle that is bound to a stream. It is made when it is first needed."""
        handle = self._handles.get(stream)
        if (
            handle is None
        ):  # looked up without the lock: threads that have a handle do not wait while one is made
            with self._lock:
                handle = self._handles.get(stream)
                if handle is None:
                    handle = self._handles[stream] = self._create_handle(stream)
        return handle

    def destroy_handle(self, stream: int) -> None:
        """Destroy the handle of a stream that is about to end. Nobody may be using it."""
        with self._lock:
            handle = self._handles.pop(stream, None)
        if handle is not None:
            self.call("cudnnDestroy", ctypes.c_void_p(handle.pointer))

    def _create_handle(self, stream: int) -> CudnnHandle:
        pointer = ctypes.c_void_p()
        self.call("cudnnCreate", ctypes.byref(pointer))
        self.call("cudnnSetStream", pointer, ctypes.c_void_p(stream))
        return CudnnHandle(pointer.value or 0)

    def _read_version(self) -> int:
        read = self._library.cudnnGetVersion
        read.restype = ctypes.c_size_t
        return int(read())

    def _last_error(self) -> str:
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._library.cudnnGetLastErrorString(message, ctypes.c_size_t(_MESSAGE_BYTES))
        return message.value.decode(errors="replace").strip()


def check_version(version: int, path: str) -> None:
    """Raise DeviceUnavailableError if a version of cuDNN is too old.

    Args:
        version: As `cudnnGetVersion` returns it.
        path: The file that the library was loaded from.
    """
    if version < _OLDEST_VERSION:
        raise DeviceUnavailableError(
            f"cuDNN {_format_version(version)}, loaded from {path}, is too old and may crash the server: "
            f"{_format_version(_OLDEST_VERSION)} or newer is needed: {_INSTALL}; if it is installed already, make sure "
            "that the older one is not found first (see LD_LIBRARY_PATH and the system's packages)"
        )


def _format_version(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _load() -> tuple[ctypes.CDLL, str]:
    """Return the library, and the file that it was loaded from."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cudnn").abs_path or "libcudnn.so.9"
        return ctypes.CDLL(path), path
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceUnavailableError(f"cuDNN 9 cannot be loaded ({reason}): {_INSTALL}") from None
