"""merge: write the target's weight files, each an independent unit."""
