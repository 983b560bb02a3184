"""Runs calls on a card: lanes, pipelines, staging buffers and graphs."""
