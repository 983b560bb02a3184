"""Hostile clients, a small class for each kind."""
