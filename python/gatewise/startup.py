"""What must happen before the rest of the package is imported: Ctrl-C is quiet, and a missing build is reported."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec


def _is_command() -> bool:
    """Whether this process is `gatewise` or `python -m gatewise`, which still has to import what it needs."""
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module that it will run
        return sys.orig_argv[-len(sys.argv)] in ("gatewise", "-mgatewise")
    return os.path.basename("".join(sys.argv[:1])) == "gatewise"


# Ctrl-C ends a command that is importing without a traceback. `__main__.main` restores its usual meaning.
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if find_spec("gatewise._core") is None:
    raise ImportError(
        f"gatewise is not built here for Python {sys.version_info.major}.{sys.version_info.minor}: leave the source "
        "tree if gatewise is installed; if not, `pip install .` in the source tree builds and installs it"
    )
