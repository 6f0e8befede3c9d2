"""Files and storage: atomic writes, digests, prefetching, bounded reading, texts. No torch."""
