"""lm-evaluation-harness's own command line on several checkpoints in one process: `python -m tests.harness_command`.

It reads a list of lists of arguments as JSON and runs each of them. To save time, it knows no tasks but those of include_path,
and resamples less often for standard errors than the command does by itself.
"""

import functools
import json
import sys

import lm_eval
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

BOOTSTRAP_ITERS = 1000


def main() -> None:
    lm_eval.simple_evaluate = functools.partial(lm_eval.simple_evaluate, bootstrap_iters=BOOTSTRAP_ITERS)
    lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    for arguments in json.loads(sys.stdin.read()):
        sys.argv = ["lm_eval", *arguments]
        cli_evaluate()


if __name__ == "__main__":
    main()
