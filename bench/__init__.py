"""Benchmarks: what is measured, against what, on models that `bench.models` generates. Run `make bench`."""
