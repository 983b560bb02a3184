"""Calls by gRPC."""
