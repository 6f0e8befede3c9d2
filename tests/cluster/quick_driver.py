"""The command line, with a lock that grows stale within seconds: `python -m tests.cluster.quick_driver run ...`."""

from pipeline.cli import main
from pipeline.state import lock

STALE_S = 2.0

if __name__ == "__main__":
    lock.HEARTBEAT_S, lock.STALE_S = 0.2, STALE_S
    main()
