"""Metrics for Prometheus, on a port of their own: what the server counts, in the words of prometheus-client."""
