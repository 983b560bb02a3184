"""An execution plan of cuDNN, kept as small as it can be."""

from __future__ import annotations

import threading
import weakref

from deconvd_server.device.cuda.cudnn.convolution import UIDS
from deconvd_server.device.cuda.cudnn.descriptor import Descriptor
from deconvd_server.device.cuda.cudnn.enums import Attribute, AttributeType, DescriptorType
from deconvd_server.device.cuda.cudnn.library import Cudnn

__all__ = ["CudnnPlan"]


class CudnnPlan:
    """A way of cuDNN's to compute one operation in one layout. See `Plan`.

    It is made from cuDNN's own serialized form, which needs a tenth of the memory of the plan that
    it was taken from, and no graph. It is freed when nobody refers to it any more, a captured graph
    included; but not at the interpreter's end, when cuDNN may have gone first.

    Args:
        name, deterministic: As in `Plan`.
        blob: The serialized form, of this version of cuDNN for this kind of card.
        stream: A stream whose handle may be used now.

    Raises:
        CudnnError: The blob is damaged, or of another version or card.
    """

    def __init__(
        self, cudnn: Cudnn, stream: int, blob: bytes, *, name: str, deterministic: bool
    ) -> None:
        self.name = name
        self.deterministic = deterministic
        self.blob = blob
        self._cudnn = cudnn
        # cuDNN does not promise that one plan may be executed by two threads at once
        self._lock = threading.Lock()
        self._descriptor = _deserialize(cudnn, stream, blob)
        self._finalizer = weakref.finalize(self, self._descriptor.close)
        self._finalizer.atexit = False
        self.workspace_bytes = self._descriptor.get(
            Attribute.EXECUTION_PLAN_WORKSPACE_SIZE, AttributeType.INT64
        )[0]

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the operation; the operands lie in the plan's layout. See `Plan`.

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
        """Free it now. Nobody may execute it any more, nor a graph that it was captured into."""
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
