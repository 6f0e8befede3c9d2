"""Additions as a user of the house would write them: one short file each."""
