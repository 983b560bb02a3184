"""Array libraries other than numpy: how their arrays become operands, and results become their arrays."""
