"""calibrate: streams token shards through layer shards and records sums for every expert."""
