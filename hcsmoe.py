"""Make sparse Mixture-of-Experts language models smaller, without retraining.

    import hcsmoe

    result = hcsmoe.compress("org/model", target=0.5, method="best", data=["text.jsonl"], evaluation="heldout.jsonl")
    print(result.report.source.perplexity, [model.perplexity for model in result.models])
    model = result.load()

`hcsmoe.plan` takes the same arguments and says what that would need; `hcsmoe.inspect` describes a checkpoint;
`hcsmoe.load_report` reads what an earlier run has found out. `python -m hcsmoe` is the command line.
"""

from pipeline import __version__
from pipeline.api.calls import compress, inspect, load_report, plan
from pipeline.api.results import Inspection, Model, Report, Result
from pipeline.commands.plan import PlannedStage
from pipeline.commands.plan import RunPlan as Plan
from pipeline.display.task_table import Score
from pipeline.errors import RunFailed
from stages.contracts.errors import InputError
from stages.contracts.inspection import TargetSize
from stages.contracts.spec import PlannedCheckpoint

__all__ = [
    "InputError", "Inspection", "Model", "Plan", "PlannedCheckpoint", "PlannedStage", "Report", "Result", "RunFailed", "Score",
    "TargetSize", "__version__", "compress", "inspect", "load_report", "plan",
]  # fmt: skip

if __name__ == "__main__":
    from pipeline.__main__ import entry

    entry()
