"""What a cluster does to a run: killed workers, nodes and drivers, on real processes."""
