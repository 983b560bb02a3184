"""How fast tensors move: a round trip by each of our transports, and by others in the same run."""
