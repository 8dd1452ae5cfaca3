"""Loading files in a process of its own, with limits, which says what came of each and how much memory it took.

The peak of the resident set (VmHWM) counts what any library takes, where tracemalloc counts Python's objects only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Outcome(NamedTuple):
    """What became of one file."""

    kind: str  # the class of what was loaded, or of the error
    message: str  # of the error
    peak: int  # bytes that were resident at most, less those before
    seconds: float  # of the processor


def load_in_child(
    paths: Iterable[str | os.PathLike[str]],
    *,
    warm_up: str | os.PathLike[str] | None = None,
    seconds: int = 60,
    memory: int = 4 << 30,
    **options: Any,
) -> list[Outcome]:
    """Load files one after another in one child process.

    Parameters
    ----------
    paths
        The files.
    warm_up
        A small file of the same format, loaded or refused first, so that imports are not counted.
    seconds
        Processor time for each file, after which the child is ended and the test fails.
    memory
        Bytes of address space that the child may take after the warm-up.
    **options
        Of `gw.load`.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory cannot be measured here")
    names = [os.fspath(path) for path in paths]
    order = json.dumps([names, warm_up and os.fspath(warm_up), seconds, memory, options])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__), order],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    outcomes = [Outcome(*json.loads(line)) for line in child.stdout.splitlines()]
    if len(outcomes) < len(names):
        reason = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.fail(f"{names[len(outcomes)]} ended the process with {child.returncode}: {reason}")
    return outcomes


def assert_refused(
    paths: Iterable[str | os.PathLike[str]], *, factor: float = 10, spare: int = 64 << 20, **options: Any
) -> None:
    """Each file is a FormatError, and takes `factor` times its size and `spare` bytes of memory at most."""
    paths = [Path(path) for path in paths]
    for path, outcome in zip(paths, load_in_child(paths, **options), strict=True):
        assert outcome.kind == "FormatError", f"{path.name}: {outcome}"
        assert outcome.peak < factor * path.stat().st_size + spare, f"{path.name}: {outcome}"


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _main(names: list[str], warm_up: str | None, seconds: int, memory: int, options: dict[str, Any]) -> None:
    import resource
    import time

    import gatewise as gw

    def load(name: str) -> tuple[str, str]:
        try:
            return type(gw.load(name, **options)).__name__, ""
        except Exception as error:
            return type(error).__name__, str(error)

    if warm_up is not None:
        load(warm_up)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + memory,) * 2)
    most_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for name in names:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        resident, begin = _status("VmRSS"), time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + seconds, most_seconds))
        kind, message = load(name)
        outcome = kind, message, max(0, _status("VmHWM") - resident), time.process_time() - begin
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
