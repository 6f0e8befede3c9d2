"""Page of the exit codes of the command line."""

from docs_site.markdown import page, table
from pipeline.errors import BAD_INPUT, DONE, EXIT_CODES, FAILED, INTERRUPTED

_MORE = {
    DONE: "Everything that was asked for is there. Warnings do not change it.",
    FAILED: "The last lines say what failed and why. What was finished is kept: mend the cause, and the same command "
    "continues. A bug "
    "of hcsmoe ends with this code, too, and a traceback.",
    BAD_INPUT: "Nothing was computed. The line that begins with `error:` names the setting, file or option, its value and "
    "what to do: [Troubleshooting](../troubleshooting.md) lists all of them.",
    INTERRUPTED: "What was finished is kept, and the same command continues.",
}
"""What a code means for who sees it; a test compares its codes with those of the program."""


_SIGNALS = """
A process that a signal ends before the program can answer has no code of its own. Shells report 128 and the number of the
signal, such as 137 for SIGKILL. That is often a limit of memory, the system's or a container's: lower
`resources.worker_memory`. The same command continues; the lock that the killed process leaves is taken over after a minute.
"""


def exit_codes_page() -> str:
    """The page."""
    lines = page("Exit codes", "docs_site/exit_codes.py", "All commands of `hcsmoe` end with one of these:")
    lines += table(("code", "meaning", "what to do"), [(str(code), said, _MORE[code]) for code, said in EXIT_CODES.items()])
    lines += [_SIGNALS]
    return "\n".join(lines)
