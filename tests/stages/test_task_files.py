"""Which files of a folder each task's key depends on."""

from pathlib import Path

import pytest

from stages.contracts.errors import InputError
from stages.harness.files import TaskFolder
from tests.harness_tasks import write_tasks

EXTRA = {
    "base": "output_type: multiple_choice\ntag: mine\ndataset_path: json\ndataset_kwargs: {data_files: DATA}\n",
    "derived": "include: deep/base.yaml\ntask: derived\n",
    "outer": "group: outer\ntask:\n  - group: inner\n    task: [derived, {task: tiny_word, num_fewshot: 2}]\n  - arc_easy\n",
    "aliases": "task: aliases\na: &a {self: *a}\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "circle": "include: [circle.yaml]\ntask: circle\n",
    "coded": "task: coded\nclass: !function code.Coded\n",
    "local": "task: local\ndataset_path: FOLDER/kept\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    (tmp_path / "elsewhere.jsonl").write_text("{}\n")
    for name, text in EXTRA.items():
        path = tmp_path / "tasks" / ("deep" if name == "base" else "") / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("DATA", str(tmp_path / "elsewhere.jsonl")).replace("FOLDER", str(tmp_path / "tasks")))
    (tmp_path / "tasks" / "kept").mkdir()
    (tmp_path / "tasks" / "kept" / "rows.csv").write_text("a\n")
    return tmp_path / "tasks"


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("tiny_choice", {"documents.jsonl", "tiny_choice.yaml"}),
        ("tiny_group", {"documents.jsonl", "tiny_choice.yaml", "tiny_group.yaml", "tiny_word.yaml"}),
        ("tiny_broken", {"code.py", "documents.jsonl", "rows.csv", "tiny_broken.yaml"}),
        ("tiny_gone", {"tiny_gone.yaml"}),
        ("derived", {"base.yaml", "derived.yaml", "elsewhere.jsonl"}),
        ("mine", {"base.yaml", "derived.yaml", "elsewhere.jsonl"}),
        ("outer", {"base.yaml", "derived.yaml", "documents.jsonl", "elsewhere.jsonl", "outer.yaml", "tiny_word.yaml"}),
        ("aliases", {"aliases.yaml"}),
        ("circle", {"circle.yaml"}),
        ("coded", {"code.py", "coded.yaml", "documents.jsonl", "rows.csv"}),
        ("local", {"local.yaml", "rows.csv"}),
        ("arc_easy", set()),
    ],
)
def test_a_task_depends_on_what_it_names_and_on_all_that_its_code_may_read(folder: Path, task: str, names: set[str]) -> None:
    assert {path.name for path in TaskFolder(folder, "here").files_of(task)} == names


def test_a_folder_that_is_missing_or_holds_no_yaml_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^here: .*gone is not a folder; give a folder with task files$"):
        TaskFolder(folder / "gone", "here")
    (folder / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"^here: .*bad\.yaml is not YAML: line 1, "):
        TaskFolder(folder, "here").files_of("tiny_choice")
