"""Which guards of the readers does no test miss? `python -m tests.guards` takes out one at a time.

A guard is an `if` that ends in `raise`. Each is taken out in a copy of the package, and the tests of its file run until
the first one fails. A guard without which all tests pass is either not tested or not needed.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gatewise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PACKAGE = Path(gatewise.__file__).parent
ROOT = Path(__file__).parent.parent
SECONDS = 300  # for the tests of one guard; a guard against a hang is missed, too

# The tests of each part of the package, the quickest first.
TESTS = {
    "formats/keras": ("keras_refusals", "hostile_files", "hdf5", "keras"),
    "formats/pytorch": ("checkpoints", "pytorch_files", "hostile_files"),
    "formats/safetensors": ("damaged_files", "files", "hostile_files"),
    "formats/rtneural.py": ("rtneural", "saving", "hostile_files"),
    "formats/json_text.py": ("damaged_files", "rtneural", "hostile_files"),
    "formats/files.py": ("files", "rtneural", "hostile_files"),
    "formats/verification.py": ("verification",),
    "arguments/sequences.py": ("errors", "sequences"),
}

# Guards that no test can miss, and why; "file: condition" as the table prints them.
EXPLAINED: dict[str, str] = {}

EXAMPLES = """
examples:
  python -m tests.guards                             all of them: an hour or two on two processors
  python -m tests.guards --file formats/rtneural.py  those of one file or folder
  python -m tests.guards --list                      only print them
"""


class Guard(NamedTuple):
    path: Path  # within the package
    line: int
    start: int  # where the condition begins and ends, in characters of the file
    end: int
    condition: str

    @property
    def key(self) -> str:
        return f"{self.path}: {' '.join(self.condition.split())}"


def guards(part: str) -> Iterator[Guard]:
    """The guards of a file or a folder of the package."""
    place = PACKAGE / part
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        text = path.read_text()
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.If) or not isinstance(node.body[-1], ast.Raise):
                continue
            test = node.test
            assert test.end_lineno is not None
            assert test.end_col_offset is not None
            start = starts[test.lineno - 1] + test.col_offset
            end = starts[test.end_lineno - 1] + test.end_col_offset
            yield Guard(path.relative_to(PACKAGE), node.lineno, start, end, text[start:end])


def is_missed(guard: Guard, tests: tuple[str, ...], copy: Path) -> bool:
    """Whether a test fails without the guard; `copy` is a folder with a copy of the package."""
    path = copy / "gatewise" / guard.path
    text = path.read_text()
    path.write_text(f"{text[: guard.start]}False and ({guard.condition}){text[guard.end :]}")
    files = [str(next((ROOT / "tests").rglob(f"test_{name}.py"))) for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    try:
        run = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)
    return run.returncode != 0


def check(jobs: list[tuple[Guard, tuple[str, ...]]], workers: int, console: Console) -> list[Guard]:
    """The guards that no test misses."""
    survivors: list[Guard] = []
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(prefix="gatewise-guards-") as folder:
        for number in range(workers):
            copy = Path(folder, str(number))
            shutil.copytree(PACKAGE, copy / "gatewise", ignore=shutil.ignore_patterns("__pycache__"))
            copies.put(copy)

        def work(job: tuple[Guard, tuple[str, ...]]) -> tuple[Guard, bool]:
            copy = copies.get()
            try:
                return job[0], is_missed(*job, copy)
            finally:
                copies.put(copy)

        with Progress(*columns, console=console) as progress, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            task = progress.add_task("guards", total=len(jobs))
            for guard, missed in pool.map(work, jobs):
                progress.update(task, advance=1, description=str(guard.path))
                if not missed:
                    survivors.append(guard)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.guards",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", action="append", metavar="PATH", help="within the package; may be said several times")
    parser.add_argument("--list", action="store_true", help="only print the guards")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at a time (default: processors)"
    )
    options = parser.parse_args()
    console = Console()
    parts = {part: part for part in TESTS} if not options.file else {name: part_of(name) for name in options.file}
    jobs = [(guard, TESTS[part]) for name, part in parts.items() for guard in guards(name)]
    if options.list:
        for guard, _ in jobs:
            console.print(f"{guard.path}:{guard.line}: {guard.key.partition(': ')[2]}", markup=False, soft_wrap=True)
        return 0
    survivors = check(jobs, options.workers, console)
    table = Table("guard", "why no test misses it", title=f"{len(survivors)} of {len(jobs)} guards are not missed")
    for guard in survivors:
        table.add_row(f"{guard.path}:{guard.line}: {' '.join(guard.condition.split())}", EXPLAINED.get(guard.key, ""))
    console.print(table)
    return int(any(guard.key not in EXPLAINED for guard in survivors))


def part_of(name: str) -> str:
    """The entry of TESTS for a file or folder."""
    for part in TESTS:
        if name == part or name.startswith(f"{part}/"):
            return part
    raise SystemExit(f"--file: expected something in {', '.join(TESTS)}, got {name}")


if __name__ == "__main__":
    sys.exit(main())
