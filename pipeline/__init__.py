"""How a run is executed: command line, run directory, manifests, scheduling, executors. Nothing here imports torch."""

__version__ = "0.1.0"
