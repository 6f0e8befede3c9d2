"""One run: its identity, keys, units and published names."""
