"""How it is run, in this process."""
