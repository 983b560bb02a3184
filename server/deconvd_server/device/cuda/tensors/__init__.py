"""Tensors that stay on a card between calls, and their prepacked forms."""
