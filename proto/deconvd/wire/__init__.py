"""Values as messages: tensors, errors and streams, to bytes and back."""
