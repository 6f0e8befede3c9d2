"""A checkpoint as it lies on disk: its folder, headers, quantised tensors, side files, readers."""
