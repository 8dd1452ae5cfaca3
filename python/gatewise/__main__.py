"""The command line: `gatewise demo`, `info`, `convert`, `verify`, `run`, `bench`; the same as `python -m gatewise`.

This module does only what must happen before a command runs; a command's module is imported when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from gatewise.cli.options import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        The exit status: 0 for success, 1 if `verify` finds too large a difference, 2 for an error, 130 after Ctrl-C.
    """
    _prepare_streams()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        from gatewise.cli.commands import run_command

        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by gatewise.startup
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run_command(options)
    except KeyboardInterrupt:
        print("gatewise: interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Make sure that every message can be printed, whatever stdout and stderr are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `2>&-`: the next file to be opened must not take its descriptor
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # stays open until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a question mark for a character that the terminal lacks


if __name__ == "__main__":
    sys.exit(main())
