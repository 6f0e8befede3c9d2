"""Options and arguments that commands share, and the words that they take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stages.registry import STAGES

StageName = StrEnum("StageName", {name.upper(): name for name in STAGES})  # type: ignore[misc]  # from the registry


class ExecutorName(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


class LogLevel(StrEnum):
    """Level of the log files."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogLevelOption = Annotated[
    LogLevel | None, typer.Option("--log-level", help="Level of the log files in RUN_DIR/logs, above resources.log_level.")
]


class TableFormat(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"


class GgufType(StrEnum):
    """Number format of a GGUF file, by the names of llama.cpp's converter."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


RunFile = Annotated[Path, typer.Argument(help="Run file (YAML); see examples/tiny-mixtral.yaml.", metavar="RUN.yaml")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, for example clustering.linkage=single. Repeatable.")
]


Address = Annotated[
    str, typer.Option(help="Ray cluster: auto (the running one, else a new one here), local (a new one here), or ADDRESS.")
]
ExecutorOption = Annotated[ExecutorName, typer.Option(help="ray, or local: everything in this process.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check digests of all finished files, not only sizes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only, no progress.")]
Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a model of the hub as org/name.", metavar="MODEL")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Context = Annotated[int, typer.Option(help="Tokens of a sequence that the cache of keys and values has room for.")]
Batch = Annotated[int, typer.Option(help="Sequences that the cache has room for.")]
RunDir = Annotated[str, typer.Argument(help="Run directory, or its URL.", metavar="RUN_DIR")]
