"""Names that the command line needs before anything heavy is imported."""

from enum import StrEnum


class StageName(StrEnum):
    """The stages, in the order in which they run."""

    PREPARE = "prepare"
    CALIBRATE = "calibrate"
    CLUSTER = "cluster"
    MERGE = "merge"
    ASSEMBLE = "assemble"
    EVALUATE = "evaluate"
    REPORT = "report"


STAGES: tuple[str, ...] = tuple(stage.value for stage in StageName)
