"""An engine of vLLM that a worker holds. It is opened through lm-evaluation-harness's own class for it."""

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from stages.checkpoint.folder import Checkpoint
from stages.contracts.units import HoldCall

PLUGINS = "vllm.general_plugins"
"""Group of entry points that vLLM loads."""


@dataclass(frozen=True)
class EngineArgs:
    """model: checkpoint folder. trust_remote_code: for the tokenizer. max_length: tokens that the model reads at most; None for
    its positions. seed: of what it draws; None for the harness's. num_gpus: that the model's tensors are split over.
    dtype: that it computes in, which vLLM would choose anew for some checkpoints."""

    model: str
    trust_remote_code: bool
    max_length: int | None
    seed: int | None
    num_gpus: int
    dtype: str


@dataclass
class Engine:
    """lm: the harness's model class. Its engine runs in the worker's process, so that it ends whenever that does."""

    lm: Any

    @property
    def bytes_read(self) -> int:
        """Not known: the engine reads the checkpoint itself."""
        return 0

    def read_ahead(self, args: object) -> None:
        """Nothing: the engine of the next model reads its checkpoint itself."""

    def close(self) -> None:
        """End the engine and free its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        lm, self.lm = self.lm, None
        lm.model.llm_engine.engine_core.shutdown()
        del lm
        cleanup_dist_env_and_memory()


OPEN_ENGINE = HoldCall("stages.harness.engine:open_engine", EngineArgs)


def open_engine(args: EngineArgs) -> Engine:
    """Start an engine on a checkpoint."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from stages.harness.models import vllm_model

    folder = str(Checkpoint(args.model).local_folder)
    given = {
        "trust_remote_code": args.trust_remote_code,
        "tensor_parallel_size": args.num_gpus,
        "dtype": args.dtype,
        "max_length": args.max_length,
        "seed": args.seed,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    return Engine(vllm_model(folder, **settings))


def runs_tied() -> bool:
    """Whether vLLM would load hcsmoe's plug-in, which tied exports need."""
    return any(entry.dist is not None and entry.dist.name == "hcsmoe" for entry in entry_points(group=PLUGINS))
