"""The wire format: tensors, errors and streams to bytes, and back."""
