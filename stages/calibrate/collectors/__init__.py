"""Collectors of evidence, one class per file. Importing them does not import torch."""
