"""The command line: `gatewise demo`, `info`, `convert`, `verify`, `run`, `bench`; the same as `python -m gatewise`.

What a command needs is imported when it runs, so that `gatewise --help` works without any extra.
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
        What follows the program's name; `sys.argv[1:]` by default.

    Returns
    -------
    int
        The exit status: 0, 1 if `verify` finds too large a difference, 2 for an error of use, 130 after Ctrl-C.
    """
    _prepare_streams()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    from gatewise.cli.commands import missing, refuse, run_command, run_demo

    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by gatewise.startup
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run_demo(options) if options.command == "demo" else run_command(options)
    except ModuleNotFoundError as error:
        if (error.name or "gatewise").partition(".")[0] == "gatewise":
            raise
        return refuse(options.command, missing(error))
    except KeyboardInterrupt:
        print("gatewise: interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Make sure that whatever is printed goes somewhere, and raises nothing."""
    for name in ("stdout", "stderr"):
        file = getattr(sys, name)
        if file is None:  # closed, as `2>&-` does: what is opened next must not take its place and get the messages
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # until the process ends
        elif hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark


if __name__ == "__main__":
    sys.exit(main())
