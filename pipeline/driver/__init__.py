"""The loop that gives units to workers, and what a worker does with one."""
