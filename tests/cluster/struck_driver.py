"""A driver of a run whose units are struck, in a process of its own: `python -m tests.cluster.struck_driver --help`."""

import argparse
from pathlib import Path

from pipeline.config import load_config
from pipeline.executors.ray import connect
from tests.cluster.faults import FaultyExecutor
from tests.runs import execute

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--address", required=True, help="of the cluster")
    parser.add_argument("--marker-dir", type=Path, required=True, help="for the faults that have struck")
    parser.add_argument("--fault", nargs=2, action="append", metavar=("PATTERN", "FAULT"), help="as of FaultyExecutor")
    options = parser.parse_args()
    config = load_config(options.run_file, [])

    def make_executor() -> FaultyExecutor:
        connect(options.address)
        return FaultyExecutor(config.resources, dict(options.fault), options.marker_dir)

    execute(config, make_executor)
