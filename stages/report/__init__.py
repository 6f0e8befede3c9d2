"""report: writes every number of a run into one file."""
