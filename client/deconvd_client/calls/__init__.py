"""One call: its specification, its deadline and its transport. This package imports no other of the client."""
