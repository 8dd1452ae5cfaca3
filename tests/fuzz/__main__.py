"""The command line of the fuzzer."""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before NumPy: children are forked

import argparse
import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz import formats, workers
from tests.fuzz.workers import Source

PIECE = 20  # inputs that a child is given at once
MAX_SAVED = 5  # inputs of the same fault

DESCRIPTION = """
Gives files to gw.load that are almost what they should be: nodes swapped, doubled, left out or nested, sizes, names,
dtypes and offsets changed, and bytes. Each must load, or be refused with gw.FormatError, in 5 seconds of the processor
and little memory. What else happens is a fault: it is printed, and the file saved.
"""
EXAMPLES = """
examples:
  python -m tests.fuzz                               the corpus, then 35,000 inputs: a minute on two processors
  python -m tests.fuzz --format onnx --count 50000   one format, for longer
  python -m tests.fuzz --seed 7                      other inputs; the same seed always makes the same ones
  python -m tests.fuzz --seconds 3600                an hour, over all formats and ever new seeds
  python -m tests.fuzz --guided --seconds 3600       the same led by coverage (pip install atheris)
  python -m tests.fuzz --replay build/fuzz/onnx-0-1234.onnx    one file again, with its traceback

A file that found a fault belongs into tests/fuzz/corpus/FORMAT/ once the fault is fixed (a few KB: shrink it by hand).
The corpus is replayed by each run, and by tests/project/test_fuzz.py.
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not workers.is_supported():
        print("the fuzzer measures memory as Linux tells it; there is none here", file=sys.stderr)
        return 0
    warnings.simplefilter("ignore")
    console = Console()
    if options.guided:
        return _guided(options, console)
    if options.replay:
        return _replay(options.replay, console)
    names = [name for name in options.format or formats.FORMATS if not formats.missing(name)]
    for name in options.format or formats.FORMATS:
        if name not in names:
            console.print(f"{name}: left out, without {', '.join(formats.missing(name))}")
    return _fuzz(names, options, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, metavar="N", help="inputs of each format (default: 3000 to 8000)")
    parser.add_argument(
        "--format", action="append", choices=formats.FORMATS, help="only this format; may be said several times"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which inputs are made (default: 0)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="go on with further seeds until so much time is over"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="children (default: processors)"
    )
    parser.add_argument(
        "--save", type=Path, default=Path("build/fuzz"), metavar="FOLDER", help="where faults are saved"
    )
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="load these files, and nothing else")
    parser.add_argument(
        "--guided",
        action="store_true",
        help="led by coverage, with the package atheris; for --seconds (default: 60) in all",
    )
    return parser


def _fuzz(names: list[str], options: argparse.Namespace, console: Console) -> int:
    sources: dict[str, Source] = {}
    jobs: list[list[workers.Job]] = []
    known = {name: formats.corpus(name) for name in names}
    for name in names:
        count = options.count or formats.FORMATS[name].count
        sources[name] = lambda index, name=name: formats.made(name, options.seed + index // 10**6, index % 10**6)
        sources[f"{name} corpus"] = lambda index, name=name: [*known[name].values()][index]()
        formats.made(name, options.seed, 0)  # so that no child imports or makes seeds
        jobs.append([*_pieces(f"{name} corpus", 0, len(known[name])), *_pieces(name, 0, count)])
    in_turn = [job for group in itertools.zip_longest(*jobs) for job in group if job is not None]
    total = sum(job.end - job.first for job in in_turn)
    all_jobs = iter(in_turn) if options.seconds is None else _until(time.monotonic() + options.seconds, in_turn, names)

    outcomes: dict[str, Counter[str]] = {source: Counter() for name in names for source in (f"{name} corpus", name)}
    faults: Counter[str] = Counter()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("fuzzing", total=total if options.seconds is None else None)
        for result in workers.run(sources, all_jobs, options.workers):
            kind = result.outcome if result.outcome in ("loaded", "refused") else "faults"
            outcomes[result.source][kind] += 1
            if kind == "faults":
                faults[f"{result.source}: {result.outcome[:60]}"] += 1
                if faults[f"{result.source}: {result.outcome[:60]}"] <= MAX_SAVED:
                    place = _kept(result, sources, known, options)
                    progress.console.print(
                        f"FAULT {place}: {result.outcome}", markup=False, highlight=False, soft_wrap=True
                    )
            progress.update(task, advance=1, description=f"fuzzing {result.source}")
            progress.refresh()

    table = Table("format", "inputs", "loaded", "refused", "faults")
    for source, counts in outcomes.items():
        if counts:
            table.add_row(
                source, *(str(n) for n in (counts.total(), counts["loaded"], counts["refused"], counts["faults"]))
            )
    console.print(table)
    return int(bool(faults))


def _pieces(source: str, first: int, end: int) -> Iterator[workers.Job]:
    for begin in range(first, end, PIECE):
        yield workers.Job(source, begin, min(begin + PIECE, end))


def _until(deadline: float, first: list[workers.Job], names: list[str]) -> Iterator[workers.Job]:
    """The usual jobs, and then those of one seed after the other."""
    ever_more = (
        workers.Job(name, begin, begin + PIECE)
        for seed in itertools.count(1)
        for begin in range(seed * 10**6, seed * 10**6 + 10_000, PIECE)
        for name in names
    )
    return itertools.takewhile(lambda job: time.monotonic() < deadline, itertools.chain(first, ever_more))


def _kept(
    result: workers.Result, sources: dict[str, Source], known: dict[str, dict[str, Any]], options: argparse.Namespace
) -> str:
    """Where the input is that did it."""
    name = result.source.removesuffix(" corpus")
    if name != result.source:
        return [*known[name]][result.index]
    seed, index = options.seed + result.index // 10**6, result.index % 10**6
    if result.outcome.startswith(workers.NOT_MADE):
        return f"{name}, seed {seed}, input {index}"
    return str(formats.write(options.save / f"{name}-{seed}-{index}", sources[name](result.index)))


def _guided(options: argparse.Namespace, console: Console) -> int:
    """One format after the other; the first fault ends its turn."""
    from tests.fuzz import guided

    names = [name for name in options.format or formats.FORMATS if not formats.missing(name)]
    seconds = int((options.seconds or 60) / len(names))
    wrong = [name for name in names if guided.run(name, seconds, options.seed, options.save)]
    console.print(f"faults: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


def _replay(paths: list[Path], console: Console) -> int:
    sources: dict[str, Source] = {"files": lambda index: formats.read(paths[index])}
    faults = 0
    for result in workers.run(sources, iter([workers.Job("files", 0, len(paths))]), 1):
        faults += result.outcome not in ("loaded", "refused")
        console.print(f"{paths[result.index]}: {result.outcome}", markup=False, highlight=False, soft_wrap=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
