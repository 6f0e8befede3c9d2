"""A checkpoint as transformers runs it: families, adapter, layer shards, streaming, expert weights."""
