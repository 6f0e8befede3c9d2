"""Tests of hcsmoe; the folders mirror the packages."""
