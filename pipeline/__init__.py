"""How it is run: command line, run directory, manifests, scheduling, executors. Nothing here imports torch."""
