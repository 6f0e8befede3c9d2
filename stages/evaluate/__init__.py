"""evaluate: perplexity of a checkpoint, streamed through layer shards like the calibration set."""
