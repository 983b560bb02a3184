"""Array libraries other than numpy: their arrays can be operands, and results become their arrays."""
