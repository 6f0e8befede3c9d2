"""Interfaces between stages and pipeline: units, file formats, paths. No torch."""
