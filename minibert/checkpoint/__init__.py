"""A checkpoint: where it lies (hub), what its tensors are called (names), and how it is read and written."""
