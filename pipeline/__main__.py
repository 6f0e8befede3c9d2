"""Entry point of `python -m pipeline` and of the command `hcsmoe`."""

import gc

from pipeline.driver.process import prepare_to_compute, run_and_leave


def entry() -> None:
    """Entry point. Exit codes: see `pipeline.cli.main`."""
    prepare_to_compute()
    gc.disable()  # imports allocate much and free little; the command line turns collection on again before a run
    from pipeline.cli import main

    run_and_leave(main)


if __name__ == "__main__":
    entry()
