"""cuDNN's graph API, called through ctypes.

Its own Python frontend holds the interpreter's lock for as long as a plan takes to build, and all
other requests would wait; ctypes lets go of it for the length of every call.
"""

from deconvd_server.device.cuda.cudnn.library import Cudnn, CudnnError
from deconvd_server.device.cuda.cudnn.plan import CudnnPlan
from deconvd_server.device.cuda.cudnn.search import EngineRules, EngineSearch, Layout

__all__ = ["Cudnn", "CudnnError", "CudnnPlan", "EngineRules", "EngineSearch", "Layout"]
