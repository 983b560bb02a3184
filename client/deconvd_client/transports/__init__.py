"""How calls reach a server: which transport carries a call, what is retried, and how long tensors are streamed."""
