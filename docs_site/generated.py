"""Pages of the site that are made from the code."""

from collections.abc import Callable, Mapping

from docs_site.api import api_page
from docs_site.commands import commands_page
from docs_site.events import events_page
from docs_site.exit_codes import exit_codes_page
from docs_site.files import files_page
from docs_site.settings import settings_page
from docs_site.troubleshooting import troubleshooting_page

GENERATED: Mapping[str, Callable[[], str]] = {
    "troubleshooting.md": troubleshooting_page,
    "reference/commands.md": commands_page,
    "reference/settings.md": settings_page,
    "reference/exit-codes.md": exit_codes_page,
    "reference/files.md": files_page,
    "reference/events.md": events_page,
    "reference/python.md": api_page,
}
"""What makes each page. Links in it are paths in the repository, as if the page lay in docs/."""
