"""The driver loop, which gives units to workers, and the worker code, which runs one unit."""
