"""An execution plan of cuDNN, made from its serialized form to be small."""

from __future__ import annotations

import threading
import weakref

from deconvd_server.device.cuda.cudnn.convolution import UIDS
from deconvd_server.device.cuda.cudnn.descriptor import Descriptor
from deconvd_server.device.cuda.cudnn.enums import Attribute, AttributeType, DescriptorType
from deconvd_server.device.cuda.cudnn.library import Cudnn

__all__ = ["CudnnPlan"]


class CudnnPlan:
    """A plan of cuDNN for one product in one layout. See `Plan`.

    It is made from the plan's serialized form: it needs a tenth of the memory of the plan that was serialized, and no
    graph. It is freed when it is collected, but not at the interpreter's exit, when cuDNN may be unloaded already.

    Args:
        name, deterministic: As in `Plan`.
        blob: The serialized form, of this version of cuDNN and this kind of card.
        stream: A stream whose handle may be used now.

    Raises:
        CudnnError: The blob is damaged, or is of another version or card.
    """

    def __init__(
        self, cudnn: Cudnn, stream: int, blob: bytes, *, name: str, deterministic: bool
    ) -> None:
        self.name = name
        self.deterministic = deterministic
        self.blob = blob
        self._cudnn = cudnn
        # cuDNN does not say that two threads may execute one plan at once
        self._lock = threading.Lock()
        self._descriptor = _deserialize(cudnn, stream, blob)
        self._finalizer = weakref.finalize(self, self._descriptor.close)
        self._finalizer.atexit = False
        self.workspace_bytes = self._descriptor.get(
            Attribute.EXECUTION_PLAN_WORKSPACE_SIZE, AttributeType.INT64
        )[0]

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the product. The tensors are in the plan's layout. See `Plan`.

        Raises:
            CudnnError: It could not be enqueued.
        """
        handle = self._cudnn.handle(stream)
        pack = Descriptor(self._cudnn, DescriptorType.VARIANT_PACK)
        try:
            pack.set(Attribute.VARIANT_PACK_UNIQUE_IDS, AttributeType.INT64, *UIDS)
            pack.set(Attribute.VARIANT_PACK_DATA_POINTERS, AttributeType.VOID_PTR, a, b, out)
            pack.set(Attribute.VARIANT_PACK_WORKSPACE, AttributeType.VOID_PTR, workspace)
            pack.finalize()
            with handle.lock, self._lock:
                self._cudnn.execute(handle, self._descriptor.address, pack.address)
        finally:
            pack.close()

    def close(self) -> None:
        """Free the plan now. Nobody may execute it afterwards, nor a graph that it was captured into."""
        self._finalizer()


def _deserialize(cudnn: Cudnn, stream: int, blob: bytes) -> Descriptor:
    handle = cudnn.handle(stream)
    descriptor = Descriptor(cudnn, DescriptorType.EXECUTION_PLAN)
    try:
        with handle.lock:
            descriptor.set_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, blob)
            descriptor.set(Attribute.EXECUTION_PLAN_HANDLE, AttributeType.HANDLE, handle.pointer)
            descriptor.finalize()
    except BaseException:
        descriptor.close()
        raise
    return descriptor
