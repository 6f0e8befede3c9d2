"""report: every number of a run in one file."""
