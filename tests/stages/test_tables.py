"""Arrow files: what is written is read back, and a stranger finds what it means in the file itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.contracts.arrow import read_table
from stages.contracts.dendrogram import read_labels, write_labels
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import statistics_file
from stages.contracts.tokens import read_tokens, write_tokens
from tests.runs import FinishedRun


def test_token_ids_and_labels_are_read_back(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", np.array([[1, 2, 3], [4, 5, 6]]))
    assert read_tokens(tmp_path / "tokens").tolist() == [[1, 2, 3], [4, 5, 6]]
    write_labels(tmp_path / "labels", np.array([[0, 0], [0, 1]], dtype=np.int32))
    assert read_labels(tmp_path / "labels", 2).tolist() == [0, 1]


def test_statistics_are_float64_sums_with_counts_and_say_what_they_mean(finished_run: Callable[[str], FinishedRun]) -> None:
    done = finished_run("qwen2_moe")
    path = statistics_file(done.calibrate_dir, 2)
    schema = read_table(path).schema
    floats = {field.name for field in schema if field.name.endswith(("_sum", "_gram"))}
    assert len(floats) == 5
    for field in schema:
        kind = field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type
        assert kind == pa.float64() if field.name in floats else pa.types.is_integer(kind), field.name
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert (metadata["num_experts"], metadata["hidden_size"], metadata["version"]) == ("6", "32", "2")
    assert {field.name for field in schema} - set(metadata) == {"expert"}
    found = read_evidence(done.calibrate_dir, 2)
    assert (found.layer, found.num_tokens) == (2, 8 * 32)
    assert found["output_sum"].shape == (6, 32)
    assert found["router_logit_gram"].shape == (6, 6)
    np.testing.assert_allclose(found["router_logit_gram"], found["router_logit_gram"].T, rtol=1e-12)


def test_the_same_table_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_tokens(tmp_path / name, np.array([[1, 2]])) for name in ("one", "two"))
    assert one.sha256 == two.sha256


def test_a_damaged_table_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"ARROW1 but no more")
    with pytest.raises(InputError, match=r"tokens is not a readable Arrow file .*; delete it and run again"):
        read_table(path)
    table = pa.table({"token_ids": [[1]]})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"tokens has version '', this program reads '2'; use a new run_dir"):
        read_table(path)
