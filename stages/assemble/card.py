"""The model card of a merged checkpoint."""

from collections.abc import Mapping
from typing import Any

import yaml


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown that states source, revision, method, calibration, sizes and how to make the checkpoint again.

    facts: name, source, revision (or None), format, num_experts, experts_text, source_parameters, parameters, source_bytes,
    bytes, calibration, clustering, merging, router, settings (a run file).
    """
    revision = f" (revision {facts['revision']})" if facts["revision"] else ""
    settings = yaml.safe_dump({**facts["settings"], "run_dir": f"runs/{facts['name']}"}, sort_keys=False, allow_unicode=True)
    tied = facts["format"] == "tied"
    load = ", trust_remote_code=True" if tied else ""
    note = (
        "The router keeps a row for every source expert and `expert_map` sends each to the expert that stands for it; "
        "`modeling_hcsmoe.py` in this folder does that."
        if tied
        else f"The router has one row for each merged expert (rule `{facts['router']}`); any engine that runs the source "
        "architecture runs this checkpoint."
    )
    return f"""---
base_model: {facts["source"]}
tags: [hcsmoe, mixture-of-experts, merge]
---

# {facts["name"]}

{facts["source"]}{revision} with {facts["num_experts"]} experts a layer merged to {facts["experts_text"]}, without
retraining, by HC-SMoE ([arXiv:2410.08589](https://arxiv.org/abs/2410.08589)).

| | source | this model |
|---|---|---|
| experts a layer | {facts["num_experts"]} | {facts["experts_text"]} |
| parameters | {facts["source_parameters"]:,} | {facts["parameters"]:,} |
| bytes of weights | {facts["source_bytes"]:,} | {facts["bytes"]:,} |

- Calibration: {facts["calibration"]}
- Clustering: {facts["clustering"]}
- Merging: {facts["merging"]}
- Export: {facts["format"]}. {note}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{load})
```

To make it again, write this to `run.yaml` and call `hcsmoe run run.yaml`:

```yaml
{settings.rstrip()}
```
"""
