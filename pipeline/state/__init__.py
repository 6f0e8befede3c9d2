"""Files that hold the state of a run: manifests, events, lock, logs."""
