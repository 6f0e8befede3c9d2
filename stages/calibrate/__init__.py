"""calibrate: stream token shards through layer shards and keep sums for every expert."""
