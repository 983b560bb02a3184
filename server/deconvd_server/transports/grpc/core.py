"""gRPC's core as grpcio's own servers use it: queues and batches. It is private, and only this module imports it."""

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave private modules out

__all__ = ["cygrpc"]
