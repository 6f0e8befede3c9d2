"""Collectors: each keeps some sums of evidence, one class a file. Importing them does not import torch."""
