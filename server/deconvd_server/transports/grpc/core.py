"""gRPC's core, as grpcio's own servers have it: queues and batches. It is not public: this alone imports it."""

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave out what is not public

__all__ = ["cygrpc"]
