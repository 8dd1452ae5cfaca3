"""Runs a command, and says in one line what it cannot do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module

from gatewise.cli.options import SIZES

# What brings a package that a command asks for; any other one is brought by its own name.
EXTRAS = {
    "jax": "'gatewise[jax]'",
    "matplotlib": "'gatewise[plot]'",
    "rich": "'gatewise[demo]'",
    "threadpoolctl": "'gatewise[demo]'",
    "torch": "'gatewise[torch]'",
}


def run_demo(options: argparse.Namespace) -> int:
    """Run `gatewise demo`; the exit status."""
    from gatewise.cli import demo

    if options.load is None:
        for name, size in SIZES.items():
            if getattr(options, name) is None:
                setattr(options, name, size)
    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        demo.run(demo.Settings(**values))
    except demo.DemoError as error:
        return refuse("demo", str(error))
    except MemoryError:
        return refuse("demo", "not enough memory for this text and network")
    return 0


def run_command(options: argparse.Namespace) -> int:
    """Run one of the commands on files; the exit status."""
    command: Callable[..., int] = getattr(import_module(f"gatewise.cli.{options.command}"), options.command)
    values = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        return command(**values)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return refuse(options.command, f"{where}{error.strerror or error}")
    except (ValueError, TypeError) as error:  # FormatError is a ValueError
        return refuse(options.command, str(error))
    except MemoryError as error:
        return refuse(options.command, f"not enough memory {error}".strip())


def refuse(command: str, reason: str) -> int:
    """Say in one line why a command does nothing; the exit status."""
    print(f"gatewise {command}: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def missing(error: ImportError) -> str:
    """What brings a package that is not there."""
    package = (error.name or "").partition(".")[0]
    if not str(error).startswith(("No module named", "import of")):  # who raised it said more
        return str(error)
    return f"{package} is missing; try: pip install {EXTRAS.get(package, package)}"
