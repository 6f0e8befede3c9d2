"""The page `report.html`: one file with its styles, scripts, plotting library and data, which opens offline.

Plots are made by Observable Plot and D3 (ISC licence, both by Observable; https://observablehq.com/plot). They draw SVG, which
styles colour for light and dark; know dendrograms (links), heat maps (rasters) and bars as marks of one grammar; and take 0.5
MB together. They are copied into the page from `static/`, unchanged, as published on npm (versions in their first lines).

Names and texts of the user reach the page in one JSON block alone, and the scripts put them there as text, never as markup.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("d3.min.js", "plot.umd.min.js", "values.js", "results.js", "layers.js", "timeline.js", "page.js")


def page_of(values: Mapping[str, Any]) -> bytes:
    """The page that shows these values, which are JSON values."""
    template = (_STATIC / "page.html").read_text(encoding="utf-8")
    filled = {
        "STYLE": (_STATIC / "page.css").read_text(encoding="utf-8"),
        "DATA": script_text(values),
        "SCRIPTS": "\n".join(f"<script>\n{(_STATIC / name).read_text(encoding='utf-8')}</script>" for name in _SCRIPTS),
    }
    head, *rest = template.split("{{")
    pieces = [head]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [filled[name], text]
    return "".join(pieces).encode("utf-8")


def script_text(values: Mapping[str, Any]) -> str:
    """JSON that may stand between `<script>` and `</script>`: nothing in it is markup, and it is plain ASCII."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
