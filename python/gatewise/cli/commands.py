"""Run a command, and say in one line why it cannot run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gatewise.cli.options import DEFAULT_SIZES

# The extra that brings a package; any other package has to be installed by its own name.
EXTRAS = {
    "jax": "'gatewise[jax]'",
    "matplotlib": "'gatewise[plot]'",
    "rich": "'gatewise[demo]'",
    "threadpoolctl": "'gatewise[demo]'",
    "torch": "'gatewise[torch]'",
}


def run_command(options: argparse.Namespace) -> int:
    """Import and run the command that the options name, and return its exit status."""
    try:
        return _run_demo(options) if options.command == "demo" else _run_on_files(options)
    except ModuleNotFoundError as error:
        if (error.name or "gatewise").partition(".")[0] == "gatewise":
            raise
        return _refuse(options.command, _how_to_install(error))


def _run_demo(options: argparse.Namespace) -> int:
    from gatewise.cli import demo

    if options.load is None:
        for name, default in DEFAULT_SIZES.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
    try:
        demo.run(demo.Settings(**_arguments(options)))
    except demo.DemoError as error:
        return _refuse("demo", str(error))
    except MemoryError:
        return _refuse("demo", "not enough memory for this text and network")
    return 0


def _run_on_files(options: argparse.Namespace) -> int:
    """Run one of the commands info, convert, verify, run and bench: a function in the module of its name."""
    command: Callable[..., int] = getattr(import_module(f"gatewise.cli.{options.command}"), options.command)
    try:
        return command(**_arguments(options))
    except OSError as error:
        file = "" if error.filename is None else f"{error.filename}: "
        return _refuse(options.command, f"{file}{error.strerror or error}")
    except (ValueError, TypeError) as error:  # FormatError is a ValueError
        return _refuse(options.command, str(error))
    except MemoryError as error:
        return _refuse(options.command, f"not enough memory {error}".strip())


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "command"}


def _refuse(command: str, reason: str) -> int:
    """Print in one line why a command cannot run, and return the exit status for that."""
    print(f"gatewise {command}: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _how_to_install(error: ModuleNotFoundError) -> str:
    """How to install a missing package, unless the error has a message of its own."""
    if not str(error).startswith(("No module named", "import of")):
        return str(error)
    package = (error.name or "").partition(".")[0]
    return f"{package} is missing; try: pip install {EXTRAS.get(package, package)}"
