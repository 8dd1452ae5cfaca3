"""gatewise against its peers and against the machine's limits.

Every row pairs gatewise with one peer in a process of their own, pinned to as many processors as threads. The two take
turns, and the ratio (its time / ours) is taken pair by pair. Before that both are checked against the reference. Shares
are of what the same processors reach at the same moment when they only multiply and add, or only read.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .measurement import find_peers, measure
from .peers import PEERS
from .workloads import PLAIN, QUICK, WORKLOADS, threads_text

RESULTS = Path(__file__).parent / "results"
if not RESULTS.is_dir():  # the harness is installed
    RESULTS = Path("gatewise-results")
INSTALL = "pip install 'gatewise[bench]'"
PROGRAM = "python -m benchmarks"
EXAMPLES = """\
examples:
  %(prog)s --quick                      under a minute: five workloads on one thread
  %(prog)s --plot                       everything, with figures: about half an hour
  %(prog)s --only "GRU forward" --peers "ONNX Runtime" OpenVINO --threads 2
  %(prog)s --against old.json           what became slower, by ratio to a peer
  %(prog)s --show old.json --plot       earlier results again, with figures

The exit status is 1 if a measurement fails or does not reach its target, 2 if
the arguments are wrong; that of --show is 0.
"""


def make_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument("--quick", action="store_true", help="five workloads, one thread, less than a minute")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose names contain one of these")
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME", help=f"some of {', '.join(PEERS)} (default: all installed ones)"
    )
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="default: 1, 2 and all")
    parser.add_argument("--seconds", type=float, help="for each pair of a workload and a peer (default: 1.5)")
    parser.add_argument("--calls", type=int, help="single steps for the distribution (default: a million)")
    folder = "/".join(RESULTS.parts[-2:])
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write results here (default: {folder}/DATE.json)")
    parser.add_argument("--plot", action="store_true", help="draw PNG figures beside the JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="say what became slower than in these results")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show these results again")
    parser.add_argument("--list", action="store_true", help="list the workloads")
    return parser


def parse(arguments: Sequence[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    parser = make_parser(program)
    options = parser.parse_args(arguments)
    for name in options.peers or ():
        if name not in PEERS:
            parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {name}")
    most = len(os.sched_getaffinity(0))
    for threads in options.threads or ():
        if not 1 <= threads <= most:
            parser.error(f"--threads: expected 1 to {most}, the processors of this process, got {threads}")
    for name in ("show", "against"):
        file = getattr(options, name)
        if file and not file.is_file():
            parser.error(f"--{name}: expected a file of results, got {file}")
    options.threads = options.threads or sorted({1} if options.quick else {1, min(2, most), most})
    options.seconds = options.seconds or (0.3 if options.quick else 1.5)
    options.calls = options.calls or (50_000 if options.quick else 1_000_000)
    names = QUICK if options.quick else list(WORKLOADS)
    options.workloads = [name for name in names if not options.only or any(text in name for text in options.only)]
    if not options.workloads:
        parser.error(f"--only: no workload's name contains {' or '.join(options.only)}; --list names them all")
    return options


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the harness; `program` is how its user started it. Return the exit status."""
    options = parse(arguments, program)
    if options.list:
        print("\n".join(WORKLOADS))
        return 0
    for package in ("rich", "matplotlib") if options.plot else ("rich",):
        if find_spec(package) is None:
            print(f"{program}: {package} is missing; try: {INSTALL}", file=sys.stderr)
            return 2
    from rich.console import Console

    complete = True
    if options.show:
        document, file = json.loads(options.show.read_text()), options.show
    else:
        warn_of_load(max(options.threads))
        warn_of_missing_peers(options.peers)
        words = sys.argv[1:] if arguments is None else arguments
        document, complete = measure(options, f"{program} {shlex.join(words)}".strip())
        file = write_results(document, options, complete)
    # Wide enough for the tables where the output is not a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    has_passed = print_results(document, options, file, console)
    if not complete:
        return 130
    return 0 if has_passed or options.show else 1


def write_results(document: dict[str, Any], options: argparse.Namespace, complete: bool) -> Path | None:
    """Write the results to the file that was asked for, or to one with today's date; return its path."""
    file: Path | None = options.json
    if complete and not file and not options.quick:
        file = RESULTS / f"{document['made']['date']}.json"
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document) + "\n")
    return file


def print_results(document: dict[str, Any], options: argparse.Namespace, file: Path | None, console: Any) -> bool:
    """Print tables, figures and comparisons; return whether all targets are reached and nothing failed."""
    from . import report

    for table in report.tables(document):
        console.print(table)
    for name, reason in document["skipped"].items():
        console.print(f"without {name}: {reason}")
    if file:
        console.print(f"results: {file}")
    if options.plot:
        from . import plot

        folder = file.parent / "figures" if file else RESULTS / "figures"
        for figure in plot.figures(document, folder):
            console.print(f"figure: {figure}")
    if options.against:
        slower = report.against(document, json.loads(options.against.read_text()))
        heading = "slower than before, by ratio to a peer:" if slower else "nothing is slower"
        console.print("\n".join([heading, *slower]))
    missed, failed = report.missed(document), report.failed(document)
    if missed:
        count = "1 target is" if len(missed) == 1 else f"{len(missed)} targets are"
        console.print("\n".join([f"{count} not reached:", *missed]), highlight=False)
    if failed:
        count = "1 measurement" if len(failed) == 1 else f"{len(failed)} measurements"
        console.print("\n".join([f"{count} failed:", *failed]), highlight=False, markup=False)
    return not missed and not failed


def warn_of_load(threads: int) -> None:
    """Warn if other processes are using this machine: they distort the times and, to a lesser degree, the ratios."""
    load = os.getloadavg()[0]
    if load > threads:
        print(
            f"this machine is busy: its load average is {load:.1f}, the measurements use "
            f"{threads_text(threads)}. Leave the machine alone, or expect wide spreads.",
            file=sys.stderr,
        )


def warn_of_missing_peers(names: Sequence[str] | None) -> None:
    """Warn if gatewise is measured without a peer, although some were asked for."""
    peers, skipped, _ = find_peers(names)
    if skipped and not any(name != PLAIN for name in peers):
        print(f"none of the peers is installed; try: {INSTALL}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
