"""`python -m pipeline`, and the command `hcsmoe`."""

import gc

from pipeline.driver.process import prepare_to_compute, run_and_leave


def entry() -> None:
    """Entry point. Exit codes: see `pipeline.cli.main`."""
    prepare_to_compute()
    gc.disable()  # until all is imported: the command line turns it on again before a run begins
    from pipeline.cli import main

    run_and_leave(main)


if __name__ == "__main__":
    entry()
