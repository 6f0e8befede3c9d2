"""Arrow files: what is written is read back, and a stranger finds what it means in the file itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stages.contracts.errors import InputError
from stages.contracts.paths import statistics_file
from stages.contracts.schemas import LABELS, TOKENS, read_table, write_table
from stages.contracts.tables import labels, statistics, token_ids
from tests.runs import FinishedRun


def test_token_ids_and_labels_are_read_back(tmp_path: Path) -> None:
    write_table(tmp_path / "tokens", {"token_ids": [[1, 2, 3], [4, 5, 6]]}, TOKENS)
    assert token_ids(tmp_path / "tokens").tolist() == [[1, 2, 3], [4, 5, 6]]
    columns = {"num_clusters": [1, 1, 2, 2], "expert": [0, 1, 0, 1], "label": [0, 0, 0, 1]}
    write_table(tmp_path / "labels", columns, LABELS)
    assert labels(tmp_path / "labels", 2).tolist() == [0, 1]


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
    found = statistics(path)
    assert (found.layer, found.num_tokens) == (2, 8 * 32)
    assert found.output_sum_ED.shape == (6, 32)
    assert found.router_logit_gram_EE.shape == (6, 6)
    np.testing.assert_allclose(found.router_logit_gram_EE, found.router_logit_gram_EE.T, rtol=1e-12)


def test_the_same_table_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_table(tmp_path / name, {"token_ids": [[1, 2]]}, TOKENS) for name in ("one", "two"))
    assert one.sha256 == two.sha256


def test_a_damaged_table_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"ARROW1 but no more")
    with pytest.raises(InputError, match=r"tokens is not a readable Arrow file .*; delete it and run again"):
        read_table(path)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, TOKENS) as writer:
        writer.write_table(pa.table({"token_ids": [[1]]}, schema=TOKENS))
    with pytest.raises(InputError, match=r"tokens has version '', this program reads '2'; use a new run_dir"):
        read_table(path)
