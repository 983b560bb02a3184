"""Tensors on a card, and the prepacked forms of W that are kept with them."""
