"""What stages and pipeline agree on: units, file formats, paths. No torch."""
