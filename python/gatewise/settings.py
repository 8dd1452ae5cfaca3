"""The backend and the number of threads, the only state of the library that no object holds."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import whole_number


def backends() -> tuple[str, ...]:
    """The backends that this machine can run, best last."""
    return _core.backends()


def backend() -> str:
    """The backend in use."""
    return _core.backend()


def use_backend(name: str) -> None:
    """Use another backend from the next call on. Streams keep theirs until `refresh`.

    The environment variable GATEWISE_BACKEND does the same at import.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a backend's name, got {name!r}")
    if not _core.use_backend(name):
        raise ValueError(f"name: expected one of {', '.join(backends())} on this machine, got {name!r}")


def set_num_threads(n: int) -> None:
    """Let calls use at most n threads. Small calls use one thread; results have the same bits for any n."""
    _core.set_num_threads(whole_number("n", n, 1, 1024))


def get_num_threads() -> int:
    """How many threads a call may use."""
    return _core.get_num_threads()


def release_memory() -> int:
    """Return memory that gatewise keeps for later calls to the system, and say how many bytes it was.

    gatewise keeps large blocks that a call or an array no longer needs, at most 256 MB in all, since asking the system
    for memory takes time. It returns them by itself when memory is short.
    """
    return _core.release_memory()


def version() -> str:
    """The version of the project from which the core was built."""
    return _core.configuration()["version"]


def show_config() -> None:
    """Print version, processor, backends, threads and how the library was built."""
    built = _core.configuration()
    lanes = _core.lanes()
    print(
        f"gatewise {version()}, Python {platform.python_version()}, NumPy {np.__version__}, {sys.platform}\n"
        f"processor: {_processor()}\n"
        f"backend: {backend()} ({lanes[0]} float32 or {lanes[1]} float64 lanes) of {', '.join(backends())}\n"
        f"threads: {get_num_threads()}{'' if built['openmp'] else ' (built without OpenMP)'}\n"
        f"built: {built['compiler']}, Eigen {built['eigen']}, levels {', '.join(built['levels'])}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _environment_number(name: str) -> int | None:
    """A positive number from the environment; the first one of a list (OMP_NUM_THREADS=4,2); None for anything else."""
    try:
        number = int(os.environ.get(name, "").split(",")[0])
    except ValueError:
        return None
    return number if number > 0 else None


def _quota(root: Path = Path("/")) -> int | None:
    """The processors that this control group may use. More threads would be stopped, and the others wait for them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        shares = [share for line in lines for share in _shares(root / "sys/fs/cgroup", *line.split(":", 2)[1:])]
    except (OSError, ValueError, TypeError, ZeroDivisionError):
        return None
    return max(1, round(min(shares))) if shares else None


def _shares(folder: Path, controllers: str, group: str) -> Iterator[float]:
    """The processors that a group and the groups around it may use. Version 2 has all controllers in one, named ""."""
    if controllers:
        if "cpu" not in controllers.split(","):
            return
        folder /= "cpu"
    last = folder / group.lstrip("/")
    for place in (last, *last.parents):
        if place == folder.parent:
            return
        try:
            if controllers:
                quota, period = ((place / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            else:
                quota, period = (place / "cpu.max").read_text().split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def _default_threads() -> int:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [
        processors,
        _quota(),
        _environment_number("OMP_NUM_THREADS"),
        _environment_number("GATEWISE_NUM_THREADS"),
    ]
    return min(limit for limit in limits if limit is not None)


def _start() -> None:
    """Take the settings from the environment, once, at import."""
    if not _core.backends():
        built = ", ".join(_core.configuration()["levels"])
        raise ImportError(f"gatewise was built for {built} only, which this processor cannot run")
    _core.set_num_threads(_default_threads())
    name = os.environ.get("GATEWISE_BACKEND")
    if name and not _core.use_backend(name):
        raise ImportError(f"GATEWISE_BACKEND: expected one of {', '.join(backends())} on this machine, got {name!r}")
