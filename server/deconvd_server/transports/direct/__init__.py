"""Serves calls that come by direct connections, which carry them without gRPC."""
