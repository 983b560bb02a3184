"""What a framework's adapter adds to calls: see `benchmarks.frameworks.__main__`."""
