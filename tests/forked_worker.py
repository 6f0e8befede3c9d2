"""Starts a Ray worker as a fork of the process that `tests.forks` started, and ends as it does.

Ray's own script for this starts an interpreter, which imports everything anew.
"""

import os
import sys
from pathlib import Path

from tests.forks import ask, line_of

if __name__ == "__main__":
    arguments = [one for one in sys.argv[1:] if not one.startswith(("--serialized-runtime-env-context", "--language"))]
    client = ask(arguments, str(Path.cwd()), os.environ, (1, 2))
    line_of(client)
    code = int(line_of(client))
    os._exit(code if code >= 0 else 128 - code)
