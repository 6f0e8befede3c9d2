"""Runs a checkpoint with transformers: families, adapter, layer shards, streaming, expert weights."""
