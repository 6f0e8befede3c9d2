"""Page of all error messages with what to do, by the place that they come from."""

from collections.abc import Iterable, Iterator, Mapping

from docs_site.markdown import escaped, page
from docs_site.messages import FAILURE, Message, all_messages, is_an_order

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Commands": ("pipeline/cli.py", "pipeline/commands/", "pipeline/api/"),
    "Run files and settings": (
        "pipeline/config.py", "pipeline/yaml_files.py", "pipeline/checks.py", "pipeline/display/problems.py",
        "pipeline/run/variants.py",
        "pipeline/run/fit.py", "pipeline/run/view.py", "stages/contracts/section.py", "stages/contracts/settings.py",
        "stages/contracts/target_settings.py", "stages/contracts/text_settings.py", "stages/contracts/naming.py",
        "stages/contracts/widths.py",
    ),
    "Models and checkpoints": ("pipeline/hub.py", "pipeline/run/weights_identity.py", "stages/checkpoint/", "stages/model/"),
    "Texts": ("pipeline/hub_data.py", "pipeline/run/identity.py", "stages/prepare/", "stages/io/texts.py",
    "stages/io/splits.py"),
    "Tasks": ("stages/harness/", "stages/contracts/tasks.py", "stages/evaluate/"),
    "Methods, budgets and layer plans": ("stages/cluster/", "stages/contracts/layer_plan.py", "stages/contracts/evidence.py"),
    "Calibrate": ("stages/calibrate/",),
    "Refit": ("stages/recombine/",),
    "Merge": ("stages/merge/", "stages/mtp/"),
    "Run directories and files": ("pipeline/run/", "pipeline/state/", "stages/contracts/", "stages/io/"),
    "Workers and Ray": ("pipeline/executors/", "pipeline/driver/"),
    "vLLM": ("stages/engines/",),
}  # fmt: skip
"""Headings, and the modules whose messages stand below each: a message belongs to the first that fits."""
_AGAIN = (
    "Nothing at first: the unit is tried again, up to `resources.max_attempts` times. If the run fails of it, read the last "
    "lines "
    "of the logs in `RUN_DIR/logs`, which say what the worker did."
)


_BEGINNING = """
A line that begins with `error:` tells of a mistake in what you gave: nothing has been computed for it. A line that begins
with `failed:` tells what went wrong during a run. Both name the place, the value and what to do. Here are all of them, with
`<name>` for what differs, `[text]` for what is left out where it does not apply, and `(one|other)` for one of several. Search
for words of the message without names and numbers.

Where the place is a setting, such as `clustering.num_experts`, [Settings](reference/settings.md) says what it takes. A line
such as `calibration.seed: Input should be a valid integer (it is one)` names the setting, what it needs and its value.

Other things to look at: `hcsmoe status RUN_DIR` (what runs, what failed and why), `RUN_DIR/logs` (one log a process, with
tracebacks), `hcsmoe plan RUN.yaml` (what a run needs), and the [exit code](reference/exit-codes.md).

An error of the system, such as a full disk or a missing permission, begins with `failed:` and names the file. Free the disk
or change the permission; the same command continues. A traceback is a bug of hcsmoe: report it.
"""


def group_of(message: Message) -> str:
    """Heading that a message stands below."""
    fitting = [heading for heading, places in GROUPS.items() if message.path.startswith(places)]
    assert fitting, f"GROUPS has no heading for messages of {message.path}"
    return fitting[0]


def troubleshooting_page() -> str:
    """The page."""
    lines = page("Troubleshooting", "docs_site/troubleshooting.py", _BEGINNING)
    for heading in GROUPS:
        lines += [f"## {heading}", "", *_entries(one for one in all_messages() if group_of(one) == heading)]
    return "\n".join(lines)


def _entries(messages: Iterable[Message]) -> Iterator[str]:
    """Messages by their first words, each with what to do; once where several places say the same."""
    remedies: dict[str, list[str]] = {}
    for message in messages:
        problem, remedy = message.parts
        said = remedies.setdefault(" ".join(problem.split()), [])
        said += [one for one in [_AGAIN if message.kind == FAILURE else _sentence(remedy)] if one not in said]
    for problem, said in sorted(remedies.items(), key=lambda entry: entry[0].lower()):
        fence, space = ("``", " ") if "`" in problem else ("`", "")
        yield from (f"{fence}{space}{problem}{space}{fence}", *(f":   {one}\n" for one in said))


def _sentence(remedy: str) -> str:
    """A remedy as a sentence, with names of values as code."""
    words = " ".join(remedy.split())
    words = words.removesuffix("]") if words.count("[") < words.count("]") else words
    if not is_an_order(words) and words:
        words = f"choose one: {words}"
    text = escaped(words[:1].upper() + words[1:])
    return text if text.endswith((".", "?")) else f"{text}."
