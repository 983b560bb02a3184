"""Serves calls that come by direct connections."""
