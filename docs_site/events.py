"""Page of the events of a run, from the class that reads and writes them."""

from docs_site.markdown import escaped, page, table
from stages.contracts.events import EVENTS_DIR, EVENTS_FILE, KINDS, Event

_BEGINNING = f"""
A run writes what happens to `{EVENTS_FILE}` in its run directory as it happens, one JSON object a line; on object storage to
files of such lines in the folder `{EVENTS_DIR}/`. `hcsmoe status` and the report read it. Whether a unit is finished is read
from its manifest alone, so a lost or damaged log loses no work.
"""


def events_page() -> str:
    """The page."""
    lines = page("Events", "docs_site/events.py", _BEGINNING)
    lines += ["## Kinds", ""]
    lines += table(("`event`", "what it says"), [(f"`{kind}`", meaning) for kind, meaning in KINDS.items()])
    lines += ["## Fields", "", "A field that is empty or 0 is left out of its line.", ""]
    properties = Event.model_json_schema()["properties"]
    rows = [(f"`{name}`", f"`{one['type']}`", escaped(one["description"])) for name, one in properties.items()]
    lines += table(("field", "type", "meaning"), rows)
    return "\n".join(lines)
