"""Executors of units: in this process, or on a Ray cluster. The same driver loop drives both."""
