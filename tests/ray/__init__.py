"""How it is run on a Ray cluster on this machine."""
