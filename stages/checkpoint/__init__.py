"""A checkpoint on disk: its folder, headers, quantised tensors, side files and readers."""
