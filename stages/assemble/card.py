"""The model card of a merged checkpoint."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from stages.assemble.facts import CardFacts
from stages.assemble.spec import AssembleFacts

_MAX_LISTED = 20
_INHERITED = ("license", "license_name", "license_link", "language")
_TAGS = ["hcsmoe", "mixture-of-experts", "merge"]


def inherited_metadata(source_card: str) -> dict[str, Any]:
    """Licence and languages of the source, from the front matter of its model card. Malformed entries are left out."""
    block = REGEX_YAML_BLOCK.search(source_card)
    try:
        values = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    if isinstance(values.get("language"), list):  # YAML parses "no", the language code of Norwegian, as False
        values["language"] = ["no" if one is False else one for one in values["language"]]
    return {name: values[name] for name in _INHERITED if _is_text(values.get(name))}


def _is_text(value: Any) -> bool:
    """Whether a value is a short text, or a list of short texts."""
    if isinstance(value, list):
        return 0 < len(value) <= 1000 and all(isinstance(one, str) and _is_text(one) for one in value)
    return isinstance(value, str) and 0 < len(value) <= 1000


def model_card(facts: CardFacts, export_format: str, written: AssembleFacts, source_card: str) -> str:
    """Model card in Markdown: source, revision, method, calibration, sizes, and how to reproduce the checkpoint.

    source_card: text of the source's own card, or empty.
    """
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation="merge" if facts.base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        **inherited_metadata(source_card),
    )
    return f"---\n{data.to_yaml()}\n---\n{_body(facts, export_format, written)}"


def _body(facts: CardFacts, export_format: str, written: AssembleFacts) -> str:
    revision = f" (revision {facts.revision})" if facts.revision else ""
    settings = yaml.safe_dump({**facts.settings, "run_dir": f"runs/{facts.name}"}, sort_keys=False, allow_unicode=True)
    tied = export_format == "tied"
    load = ", trust_remote_code=True" if tied else ""
    rows = f"has one row for each merged expert (rule `{facts.router}`)" if facts.merging else "keeps the rows of these experts"
    note = (
        "The router keeps a row for every source expert and `expert_map` sends each to the expert that stands for it; "
        "`modeling_hcsmoe.py` in this folder does that, for transformers only."
        if tied
        else f"The router {rows}; any engine that runs the source architecture runs this checkpoint."
    )
    verb = "merged" if facts.merging else "pruned"
    made, width_row = f"{verb} to {facts.experts_text}", ""
    if facts.num_neurons is not None:
        before, after = facts.num_neurons
        made = f"of {before} neurons {verb} to {facts.experts_text} of {after}"
        width_row = f"\n| neurons of an expert | {before:,} | {after:,} |"
    how = {
        "Calibration": _inline(facts.calibration),
        "Clustering": facts.clustering,
        "Budget": facts.budget,
        "Merging": facts.merging,
        "Refit": facts.refit,
    }
    lines = "\n".join(f"- {name}: {text}" for name, text in how.items() if text)
    return f"""
# {facts.name}

{_inline(facts.source + revision)} with {facts.num_experts} experts a layer {made}, without
retraining, by {facts.method} ({_linked(facts.method_source)}).

| | source | this model |
|---|---|---|
| experts a layer | {facts.num_experts} | {facts.experts_text} |{width_row}
| parameters | {facts.source_parameters:,} | {written.parameters:,} |
| bytes of weights | {facts.source_bytes:,} | {written.bytes:,} |

{lines}
- Export: {export_format}. {note}
- Files of the source that are not copied: {_listed(written.left_behind)}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{load})
```

To make it again, write this to `run.yaml` and call `hcsmoe run run.yaml`:

{_fenced(settings.rstrip(), "yaml")}
"""


def _linked(source: str) -> str:
    """A source as text, with a link if it is an arXiv paper."""
    kind, _, number = source.partition(":")
    return f"[{source}](https://arxiv.org/abs/{number})" if kind == "arXiv" else source


def _inline(text: str) -> str:
    """Text in one line: characters that are not printable are replaced."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _listed(names: Sequence[str]) -> str:
    shown = [f"`{_inline(name).replace('`', '')}`" for name in names[:_MAX_LISTED]]
    more = [f"{len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return ", ".join(shown + more) or "none"


def _fenced(text: str, language: str) -> str:
    """A Markdown code block. Its fence is longer than any fence in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
