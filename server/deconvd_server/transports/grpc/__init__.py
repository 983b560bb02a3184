"""Serves calls that come by gRPC, with gRPC's own health and reflection."""
