"""The next layer shard's bytes are asked for while this one computes: all of them, no others, once."""

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.checkpoint.folder import Checkpoint
from stages.contracts.stream_units import LayerShardArgs
from stages.io.file_cache import read_ahead
from stages.model.layer_shard import LayerShard


def _asked_for(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], None]) -> Counter[tuple[str, int, int]]:
    asked: Counter[tuple[str, int, int]] = Counter()
    names: dict[int, str] = {}
    real_open = os.open

    def opened(path: Path, flags: int) -> int:
        descriptor = real_open(path, flags)
        names[descriptor] = Path(path).name
        return descriptor

    def advised(descriptor: int, begin: int, num_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked[names[descriptor], begin, num_bytes] += 1

    monkeypatch.setattr("stages.io.file_cache.os.open", opened)
    monkeypatch.setattr("stages.io.file_cache.os.posix_fadvise", advised)
    ask()
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(30)
    monkeypatch.undo()
    return asked


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_what_is_read_ahead_is_what_the_next_layer_shard_reads(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = tiny_checkpoint(family)
    shard = LayerShard(Checkpoint(folder), 0, 1, num_threads=1)
    asked = _asked_for(monkeypatch, lambda: shard.read_ahead(LayerShardArgs(str(folder), 1, 2, 1)))
    tensors = Checkpoint(folder).tensors.values()
    due = {(entry.file, entry.begin, entry.num_bytes) for entry in tensors if ".layers.1." in entry.name}
    assert due
    assert asked == Counter(due)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_file_that_is_gone_keeps_no_other_from_being_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_bytes(b"12")
    stretches = [("gone", 0, 1), ("there", 0, 2)]
    assert _asked_for(monkeypatch, lambda: read_ahead(tmp_path, stretches)) == {("there", 0, 2): 1}


def test_another_models_layers_are_left_alone(tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shard = LayerShard(Checkpoint(tiny_checkpoint("mixtral")), 0, 1, num_threads=1)
    assert not _asked_for(monkeypatch, lambda: shard.read_ahead(LayerShardArgs("/elsewhere", 1, 2, 1)))
