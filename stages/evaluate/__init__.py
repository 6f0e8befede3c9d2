"""evaluate: perplexity of a checkpoint on held-out text, streamed through layer shards as in calibrate."""
