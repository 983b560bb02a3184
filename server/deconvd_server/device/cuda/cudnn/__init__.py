"""cuDNN's graph API, called through ctypes.

cuDNN's own Python frontend holds the interpreter's lock while it builds a plan, and all other requests would wait.
ctypes releases the lock for the length of every call.

    search          finds engines for an operation, and builds their plans
    convolution       the operation as cuDNN's graph
    plan            a plan, made again from its serialized form
    descriptor      the objects that all of these are made of
    library         the library and its handles
"""

from deconvd_server.device.cuda.cudnn.library import Cudnn, CudnnError
from deconvd_server.device.cuda.cudnn.plan import CudnnPlan
from deconvd_server.device.cuda.cudnn.search import EngineRules, EngineSearch, Layout

__all__ = ["Cudnn", "CudnnError", "CudnnPlan", "EngineRules", "EngineSearch", "Layout"]
