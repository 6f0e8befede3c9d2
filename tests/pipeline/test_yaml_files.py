"""Run files, batch files and values of --set: nothing is dropped, nothing is unbounded, and all errors are one line."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands.batch import load_batch
from pipeline.config import apply_setting, load_config
from pipeline.yaml_files import MAX_FILE_BYTES, parse_yaml, read_yaml
from stages.contracts.errors import InputError

GOOD = "model: m\nrun_dir: r\ncalibration: {data: x.txt}\nclustering: {num_experts: 4}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))

BAD = {
    "a section twice": (
        GOOD + "clustering: {num_experts: 3}\n",
        "clustering is given twice, in lines 4 and 5; keep one of them",
    ),
    "a key twice": (
        GOOD + "merging:\n  method: average\n  # much later\n  method: frequency\n",
        "merging.method is given twice, in lines 6 and 8; keep one of them",
    ),
    "quoted": (GOOD + '"model": n\n', "model is given twice, in lines 1 and 5; keep one of them"),
    "in a list": (GOOD + "x: [{a: 1, a: 2}]\n", "x.a is given twice, in lines 5 and 5; keep one of them"),
    "a key of two lines": (GOOD + '"a\\nb": 1\n"a\\nb": 2\n', "a\\nb is given twice, in lines 5 and 6; keep one of them"),
    "aliases of aliases": (BOMB, "has more than 50,000 values, aliases written out; write fewer"),
    "merges of merges": (MERGES, "has more than 50,000 values, aliases written out; write fewer"),
    "an alias of itself": ("a: &a [*a]\n", "the value in line 1 contains itself by an alias"),
    "deep": ("a: " + "[" * 20_000, "is nested too deeply"),
    "a date that is none": ("a: 2024-13-45\n", "is not YAML: month must be in 1..12"),
    "infinity": (GOOD + "resources: {num_gpus: .inf}\n", "is not YAML: .inf in line 5 is not a finite number"),
    "not a number": ("a: .nan\n", "is not YAML: .nan in line 1 is not a finite number"),
    "a number without end": (f"a: {'9' * 5000}\n", "is not YAML: Exceeds the limit (4300 digits)"),
    "code": ("a: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor for the tag"),
    "a key that is a list": ("? [a]\n: 1\n", "is not YAML: while constructing a mapping"),
}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, case: str) -> None:
    text, says = BAD[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for kind, load in (("run file", lambda: load_config(path, [])), ("batch file", lambda: load_batch(path))):
        message = refusal(load)
        assert message.startswith(f"{kind} {path}")
        assert says in message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "calibration={seed: 1, seed: 2}",
            "the value of --set calibration={seed: 1, seed: 2}: seed is given twice, in lines 1 and 1; keep one of them",
        ),
        ("a..b=1", "--set a..b=1: a..b is no setting; write names with a dot between them, such as clustering.linkage"),
        (".a=1", "--set .a=1: .a is no setting; write names with a dot between them, such as clustering.linkage"),
        ("a.=1", "--set a.=1: a. is no setting; write names with a dot between them, such as clustering.linkage"),
        ("=x", "--set =x: write KEY=VALUE, for example --set clustering.linkage=single"),
        ("", "--set : write KEY=VALUE, for example --set clustering.linkage=single"),
    ],
)
def test_an_odd_setting_is_one_line(setting: str, says: str) -> None:
    values: dict[str, object] = {}
    assert refusal(lambda: apply_setting(values, setting)) == says
    assert values == {}


def test_a_setting_of_any_depth_is_refused_soon() -> None:
    key = ".".join(["a"] * 100_000)
    assert refusal(lambda: apply_setting({}, f"{key}=1")).endswith(
        "is no setting; write names with a dot between them, such as clustering.linkage"
    )


DEVICE = "is a pipe, socket or device; a regular file is needed; give the path of a {kind}"
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, DEVICE),
    "a device": (
        lambda path: path.symlink_to("/dev/zero"),
        DEVICE,
    ),
    "a folder": (Path.mkdir, "is a folder; a regular file is needed; give the path of a {kind}"),
    "a dangling link": (
        lambda path: path.symlink_to("gone"),
        "cannot be read: No such file or directory; give the path of a file that exists and can be read",
    ),
    "too large": (
        lambda path: path.write_text("#" * (MAX_FILE_BYTES + 1)),
        "has 1,048,577 bytes; at most 1,048,576 are read of a file of this kind: remove what does not belong there, or "
        "give another file; give the path of a {kind}",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_only_small_regular_files_are_read(tmp_path: Path, case: str) -> None:
    make, says = PLACES[case]
    path = tmp_path / "run.yaml"
    make(path)
    for kind, load in (("run file", lambda: load_config(path, [])), ("batch file", lambda: load_batch(path))):
        message = refusal(load)
        assert message.startswith(f"{kind} {path} cannot be read: ") and message.endswith(says.format(kind=kind))


def test_aliases_and_merges_of_a_sane_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("text: &t {data: x, seed: 1}\nlist: [1, *t]\nmerged:\n  <<: *t\n  seed: 2\nbig: 2.5e+3\nwhen: 2024-01-02\n")
    value = read_yaml(path, "run file")
    assert value["merged"] == {"data": "x", "seed": 2}
    assert value["list"] == [1, {"data": "x", "seed": 1}]
    assert (value["big"], str(value["when"])) == (2500.0, "2024-01-02")
    assert parse_yaml("", "x") is None


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ("[{run: a.yaml, set: {calibration.seed: 2024-01-02}}]", "runs.0.set.calibration.seed"),
        ("[{run: a.yaml, sets: {}}]", "runs.0.sets is not a setting"),
        ("[]", "runs"),
        ("{run: a.yaml}", "runs"),
    ],
)
def test_a_bad_batch_file_names_the_entry(tmp_path: Path, runs: str, says: str) -> None:
    path = tmp_path / "batch.yaml"
    path.write_text(f"batch_dir: b\nruns: {runs}\n")
    message = refusal(lambda: load_batch(path))
    assert message.startswith(f"{path}: ") and says in message
    path.write_text("- a\n")
    assert refusal(lambda: load_batch(path)) == f"batch file {path} must hold batch_dir and runs; write both"


def test_a_size_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    size = "9" * 400
    message = refusal(lambda: load_config(path, [f"export.max_file_bytes={size} GB"]))
    assert "is larger than any file or memory; write for example 8 GB" in message
    assert len(message) < 1000 + len(str(path))


@pytest.mark.parametrize("name", ["run_dir", "model", "cache_dir"])
def test_a_path_with_a_null_character_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    message = refusal(lambda: load_config(path, [f'{name}="a\\0b"']))
    assert message == f"{path}: {name}: must not hold the character NUL; write a path without it (it is 'a\\x00b')"


@pytest.mark.parametrize("value", ["C:\\runs\\x", "c:/runs/x", "s3:/bucket/x"])
@pytest.mark.parametrize("name", ["run_dir", "model", "cache_dir"])
def test_a_path_of_another_system_and_a_url_with_a_slash_too_few_are_refused(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    scheme = value.partition(":")[0]
    assert refusal(lambda: load_config(path, [f"{name}='{value}'"])) == (
        f"{path}: {name}: names no folder here; write {scheme}://... for a URL, or a path that begins with / (it is {value!r})"
    )


def test_run_files_of_a_batch_are_found_from_where_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "run.yaml").write_text(GOOD)
    path = tmp_path / "batch.yaml"
    path.write_text("batch_dir: b\nruns: [{run: run.yaml, set: {calibration.seed: 3, clustering: {num_experts: [2, 3]}}}]\n")
    (entry,) = load_batch(path).runs
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(entry.run, [], entry.set)
    assert (config.calibration.seed, config.clustering.num_experts) == (3, (2, 3))
    monkeypatch.chdir(tmp_path)
    assert refusal(lambda: load_config(entry.run, [], entry.set)) == (
        "run file run.yaml cannot be read: No such file or directory; give the path of a file that exists and can be read"
    )
    run_file = tmp_path / "here" / "run.yaml"
    assert refusal(lambda: load_config(run_file, [], {"calibration..seed": 3})) == (
        f"set of {run_file}: calibration..seed is no setting; write names with a dot between them, such as clustering.linkage"
    )
