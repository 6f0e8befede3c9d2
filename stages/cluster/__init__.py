"""cluster: what becomes of each layer's experts, by the method of the run file."""
