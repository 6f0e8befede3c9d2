"""The page `report.html`: packed numbers, the size of a large one, and how it works in a browser.

Dimensions: L MoE layers, E experts.
"""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.config import read_config
from stages.contracts.dendrogram import read_dendrogram, write_dendrogram
from stages.contracts.events import FAILED, LOST, RUN_BEGINS, SEALED, STARTED, Event
from stages.contracts.evidence import read_evidence
from stages.contracts.layer_plan import LayerPlan, Member, Slot, write_plan
from stages.contracts.paths import domain_dir, plan_file
from stages.report.layer_data import layer_values
from stages.report.packing import packed, scaled
from stages.report.page import page_of, script_text
from stages.report.timeline import read_story, timeline_values
from tests.runs import FinishedRun
from tests.stages.large_report import DOMAINS, HOSTILE, large_job, page_values

MAX_BYTES = 6_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def unpacked(found: dict[str, Any], row: int = 1) -> "np.ndarray[Any, Any]":
    dtype = found["type"].removesuffix("Array").lower()
    values = np.frombuffer(base64.b64decode(found["data"]), np.dtype(dtype).newbyteorder("<"))
    return values if "scales" not in found else values * np.repeat(found["scales"], row)


def page(folder: Path, num_layers: int, num_experts: int, num_units: int = 4000) -> bytes:
    job = large_job(folder, num_layers, num_experts, num_units)
    story = read_story(folder, job.args.part_dirs)
    layers, timeline = layer_values(job, range(num_layers), num_experts), timeline_values(story)
    values = page_values(job, num_layers, num_experts)
    return page_of({**values, "layers": layers, "timeline": timeline, "command": story.command})


def data_of(html: bytes) -> dict[str, Any]:
    (found,) = re.findall(rb'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    return dict(json.loads(found))


def test_numbers_are_packed_within_half_a_step() -> None:
    chance = np.random.default_rng(1)
    values = chance.random((4, 100)) * np.array([[1e-6], [1.0], [1e9], [0.0]])
    for dtype, steps in (("uint8", 255), ("uint16", 65535)):
        error = np.abs(unpacked(scaled(values, dtype), 100).reshape(4, 100) - values)
        assert (error <= values.max(1, keepdims=True) / steps * 0.51).all()
    whole = np.array([[-1, 0, 300]])
    assert unpacked(packed(whole, "int16")).tolist() == [-1, 0, 300]


def test_a_page_of_94_layers_of_128_experts_is_smaller_than_6_mb(tmp_path: Path) -> None:
    html = page(tmp_path, 94, 128)
    assert 2_000_000 < len(html) < MAX_BYTES
    assert len(data_of(html)["layers"]["layers"]) == 94


def test_distances_use_and_plans_of_each_layer_are_those_of_its_files(tmp_path: Path) -> None:
    job = large_job(tmp_path, 2, 6, num_units=0)
    joined = Slot((0, 1), (Member(0, 1.0, (3, 1)), Member(1, 1.0, (2,))), is_joined=True)
    write_plan(plan_file(tmp_path / "pruned-0", 1), LayerPlan(1, 6, (joined, Slot((5,), (Member(5),)))))
    found = layer_values(job, [0, 1], 6)
    parts = [read_evidence(domain_dir(tmp_path / "calibrate-0", domain), 1) for domain in DOMAINS]
    mean_EH = sum(part["output_sum"] for part in parts) / (8000 * len(parts))
    expected = [np.linalg.norm(mean_EH[one] - mean_EH[other]) for one in range(6) for other in range(one + 1, 6)]
    assert np.allclose(unpacked(found["distances"], 15).reshape(2, 15)[1], expected, atol=max(expected) / 500)
    use = unpacked(found["use"], 6).reshape(2, len(DOMAINS), 6)
    assert np.allclose(use[1, 2], parts[2]["num_routed_tokens"] / 8000, rtol=1e-3)
    merged, pruned = found["targets"]
    plan = found["plans"][pruned["plan"]]
    assert unpacked(plan["slots"]).reshape(2, 6)[1].tolist() == [0, 0, -1, -1, -1, 1]
    first, last = plan["starts"][1:3]
    members = zip(
        *(unpacked(plan[f"member_{name}"])[first:last].tolist() for name in ("slots", "experts", "neurons")), strict=True
    )
    assert list(members) == [(0, 0, 2), (0, 1, 1), (1, 5, 65535)]
    assert (merged["dendrogram"], pruned["dendrogram"]) == (0, None)
    assert [list(one.values()) for one in pruned["refit"]] == [[0.3, 0.1, True], [0.301, 0.1, False]] and pruned[
        "protected"
    ] == [(), (3,)]
    assert found["never_routed"] == [(1, 5), ()]


def test_equal_plans_stand_in_the_page_once(tmp_path: Path) -> None:
    job = large_job(tmp_path, 2, 6, num_units=0)
    merged, pruned = job.args.targets
    again = replace(job, args=replace(job.args, targets=(merged, pruned, replace(merged, name="merged again", format="tied"))))
    found = layer_values(again, [0, 1], 6)
    assert [target["plan"] for target in found["targets"]] == [0, 1, 0]
    assert (len(found["plans"]), len(found["dendrograms"])) == (2, 1)


def test_a_dendrogram_is_read_as_it_was_written(tmp_path: Path) -> None:
    linkage_Z = np.array([[0, 2, 0.5, 2], [1, 3, 1.25, 3]])
    write_dendrogram(tmp_path / "layer.arrow", linkage_Z)
    assert np.array_equal(read_dendrogram(tmp_path / "layer.arrow"), linkage_Z)


def test_nothing_that_a_user_names_is_markup_in_the_page(tmp_path: Path) -> None:
    html = page(tmp_path, 2, 6, num_units=8)
    assert b"example.org/')</script>" not in html and b"<img" not in html
    assert data_of(html)["name"] == HOSTILE
    assert data_of(html)["command"] == f"hcsmoe run '{HOSTILE}'"
    assert not set(script_text({"a": "<>&\u2028é"})) & set("<>&\u2028é")


def log(folder: Path, *events: Event) -> Path:
    lines = [event.model_dump_json(exclude_defaults=True) for event in events]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"half": ']) + "\n")
    return folder


def test_a_continued_run_is_one_story_without_the_time_between(tmp_path: Path) -> None:
    """A unit that is lost and one of another part do not count; waiting is what is not the unit's own time."""

    def started(time: float, unit: str, worker: str = "") -> Event:
        return Event(time=time, event=STARTED, stage="s", unit=unit, worker=worker)

    def ended(time: float, event: str, unit: str, elapsed_s: float) -> Event:
        return Event(time=time, event=event, stage="s", unit=unit, host="n", elapsed_s=elapsed_s, bytes_read=5, peak_bytes=7)

    folder = log(
        tmp_path,
        Event(time=100, event=RUN_BEGINS, command="hcsmoe run a"),
        started(101, "p/1", "w"), ended(105, SEALED, "p/1", 3), started(101, "other/1"), ended(102, SEALED, "other/1", 1),
        started(105, "p/2", "w"), ended(106, LOST, "p/2", 1), started(106, "p/4"),
        Event(time=9106, event=RUN_BEGINS, command="hcsmoe run b"),
        started(9107, "p/2", "w"), ended(9109, SEALED, "p/2", 2), started(9107, "p/3"), ended(9109, SEALED, "p/3", 1),
        started(9107, "p/4"), ended(9109, SEALED, "p/4", 2), ended(9110, FAILED, "p/5", 2),
    )  # fmt: skip
    story = read_story(folder, ["p"])
    assert (story.command, story.num_retried) == ("hcsmoe run b", 1)
    assert [(one.event.unit, one.begin_s, one.start_s, one.end_s, one.wait_s) for one in story.units] == [
        ("p/1", 1, 2, 5, 1), ("p/2", 7, 7, 9, 0), ("p/3", 7, 8, 9, 1), ("p/4", 7, 7, 9, 0),
    ]  # fmt: skip
    found = timeline_values(story)
    assert [lane["worker"] for lane in found["lanes"]] == ["CPU 1", "CPU 2", "w"]
    (node,) = found["nodes"]
    assert (node["num_units"], node["busy_s"], node["wait_s"], node["bytes_read"], node["peak_bytes"]) == (4, 8, 2, 20, 7)


def test_without_a_log_there_is_no_story(tmp_path: Path) -> None:
    assert read_story(tmp_path, ["p"]).units == ()
    (tmp_path / "events.jsonl").mkdir()
    assert timeline_values(read_story(tmp_path, ["p"]))["num_units"] == 0


Open = Callable[[Path, int, str], Any]


@pytest.fixture(scope="module")
def open_page() -> Iterator[Open]:
    """A page in headless Chromium at a width, light or dark, with lists of what it asked for and complained of."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'hcsmoe[dev]'")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])

        def open_one(path: Path, width: int, scheme: str) -> Any:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            opened = context.new_page()
            opened.asked, opened.complaints = [], []
            opened.on("request", lambda request: opened.asked.append(request.url))
            opened.on("console", lambda message: opened.complaints.append(message.text))
            opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
            opened.goto(path.as_uri())
            return opened

        yield open_one
        browser.close()


def check_quiet_and_narrow(opened: Any, path: Path) -> None:
    assert opened.complaints == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [path.as_uri()]
    assert opened.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_large_page_draws_all_and_its_slider_works(tmp_path: Path, open_page: Open, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(page(tmp_path / "run", 3, 128, num_units=400))
    opened = open_page(path, width, scheme)
    check_quiet_and_narrow(opened, path)
    assert opened.inner_text("h1") == HOSTILE.replace("\u2028", " ") or opened.text_content("h1") == HOSTILE
    for part in ("quality", "dendrogram", "distances", "use", "saliency", "units"):
        assert opened.locator(f"#{part} svg[role=img]").count() > 0, part
    assert opened.locator("#models tbody tr").count() == 4
    assert "0.7500 ± 0.012" in opened.inner_text("#tasks") and HOSTILE[:40] in opened.inner_text("#tasks .bad")
    assert opened.inner_text("#gaps tbody").split() == ["merged", "8.40", "-", "-"]
    assert HOSTILE[:40] in opened.inner_text("#generation summary")
    assert opened.inner_text("#command pre").startswith("hcsmoe run '</script>")
    from playwright.sync_api import expect  # waits without code in the page, which its policy would refuse

    drawn = opened.inner_html("#dendrogram")
    assert "1, 5" in opened.inner_text("#summary")
    opened.locator("#layer").focus()
    opened.keyboard.press("ArrowRight")
    expect(opened.locator("#layer-name")).to_have_text("1 of 2")
    assert opened.inner_html("#dendrogram") != drawn
    assert "1, 5" not in opened.inner_text("#summary")
    opened.select_option("#target", label="pruned")
    expect(opened.locator("#refit svg").first).to_be_attached()
    assert "0.301 before, 0.1 after. W_down of its experts was solved for one after another" in opened.inner_text("#refit")
    assert opened.inner_text("#summary").count("3") and "no dendrogram" in opened.inner_text("#dendrogram")
    check_quiet_and_narrow(opened, path)
    back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_page_of_a_finished_run_shows_its_report(finished_run: Callable[[str], FinishedRun], open_page: Open) -> None:
    done = finished_run("mixtral")
    path = done.run_dir / "report.html"
    opened = open_page(path, 400, "light")
    check_quiet_and_narrow(opened, path)
    settings = yaml.safe_load(opened.text_content("#settings pre"))
    assert settings == done.report["settings"]
    assert read_config(settings).model_dump(exclude={"resources"}) == done.config.model_dump(exclude={"resources"})
    names = [model["name"] for model in done.report["models"]]
    assert opened.locator("#models tbody th").all_inner_texts() == names
    assert opened.locator("#groups li").count() + opened.inner_text("#groups").count("Kept as they are") > 0
    assert data_of(path.read_bytes())["timeline"]["num_units"] == len(done.recorder.units) - 1, "all but the report's own"
