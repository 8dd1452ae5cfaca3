"""gatewise against its peers and against the machine's limits: `python -m benchmarks`.

Every row pairs gatewise with one peer in a process of their own, pinned to as many processors as threads, the two
taking turns; the ratio (its time / ours) is taken pair by pair. Before that both are checked against the reference.
Shares are of what the same processors reach at the same moment when they only multiply and add, or only read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from .peers import PEERS, gatewise, versions
from .workloads import (
    CELL,
    HOMES,
    LAYER,
    NETWORK,
    ONE_STEP,
    PLAIN,
    POOL,
    QUICK,
    RUN,
    STEP,
    TRAIN,
    WORKLOADS,
    Workload,
    threads_text,
)

RESULTS = Path(__file__).parent / "results"
# What a cold start imports, and the workload whose first result it waits for.
MODULES = {
    "gatewise": "gatewise",
    "PyTorch": "torch",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "JAX": "jax",
    "TensorFlow": "tensorflow",
}
COLD = "LSTM forward 100x1x128"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m benchmarks --quick                      under a minute: five workloads on one thread
  python -m benchmarks --plot                       everything, with figures: about half an hour
  python -m benchmarks --only "GRU forward" --peers "ONNX Runtime" OpenVINO --threads 2
  python -m benchmarks --against benchmarks/results/old.json
  python -m benchmarks --show benchmarks/results/old.json --plot

The exit status is 1 if a measurement does not reach its target, 2 if the arguments are wrong; that of --show is 0.""",
    )
    parser.add_argument("--quick", action="store_true", help="five workloads, one thread, less than a minute")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose names contain one of these")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: all installed)")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="default: 1, 2 and all")
    parser.add_argument("--seconds", type=float, help="for each pair of a workload and a peer (default: 1.5)")
    parser.add_argument("--calls", type=int, help="single steps for the distribution (default: a million)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go (default: benchmarks/results)")
    parser.add_argument("--plot", action="store_true", help="draw PNG figures beside the JSON")
    parser.add_argument("--against", type=Path, metavar="FILE", help="say what became slower than in these results")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show these results again")
    parser.add_argument("--list", action="store_true", help="list the workloads")
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


# ---- what is to be done


def installed(names: Sequence[str] | None) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The peers that take part, the reasons of those that do not, and the versions of all."""
    found, skipped, numbers = [], {}, versions(("gatewise", "numpy"))
    for name, peer in PEERS.items():
        if names is not None and name not in names:
            continue
        try:
            numbers.update(versions(peer.packages))
            found.append(name)
        except PackageNotFoundError as missing:
            skipped[name] = f"{missing.name} is not installed"
    return found, skipped, numbers


def jobs(options: argparse.Namespace, found: Sequence[str]) -> Iterator[dict[str, Any]]:
    """In the order in which they run. Single steps are measured on one thread."""
    processors = sorted(os.sched_getaffinity(0))

    def job(task: str, threads: int, workloads: Sequence[str], **more: Any) -> dict[str, Any]:
        # The last processors: the first one has more of the system's work to do.
        return {
            "task": task,
            "threads": threads,
            "processors": processors[-threads:],
            "workloads": workloads,
            "seconds": options.seconds,
            **more,
        }

    names: list[str] = options.workloads
    steps = [name for name in names if WORKLOADS[name].mode in (*ONE_STEP, RUN, NETWORK)]
    trained = [name for name in names if WORKLOADS[name].mode == TRAIN]
    if not options.quick:
        for who in ("gatewise", *found):
            if who in MODULES:
                yield job("cold", 1, [COLD], peer=who, module=MODULES[who])
    for threads in options.threads:
        at_these = [
            name for name in names if threads == 1 or WORKLOADS[name].mode not in (STEP, RUN, CELL, LAYER, NETWORK)
        ]
        yield job("limits", threads, at_these)
        for peer in found:
            yield job("pairs", threads, [name for name in at_these if not _hopeless(peer, WORKLOADS[name])], peer=peer)
    if steps and 1 in options.threads:
        yield job("latency", 1, steps, calls=options.calls) | {"seconds": 2 if options.quick else 20}
    for name in trained if 1 in options.threads else ():
        for who in ("gatewise", "PyTorch"):
            if who == "gatewise" or who in found:
                yield job("memory", 1, [name], peer=who)


def _hopeless(peer: str, workload: Workload) -> bool:
    if workload.mode in HOMES:
        return peer != HOMES[workload.mode]
    if workload.mode == NETWORK:
        return peer not in (PLAIN, "PyTorch", "ONNX Runtime", "ONNX Runtime bound")
    if workload.mode == RUN:
        return peer in ("PyTorch padded", "JAX", "TensorFlow")
    even = workload.lengths is None and workload.resets is None
    if peer == PLAIN:
        return even and not workload.checkpoint_every and workload.mode != POOL
    if peer == "PyTorch padded":
        return workload.lengths is None
    if peer in ("PyTorch", "JAX"):
        return workload.resets is not None
    return not even or (peer != "TensorFlow" and workload.mode == TRAIN)


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of a process of its own; a failure for each workload that it did not live to answer."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "OPENBLAS_NUM_THREADS": str(job["threads"]),
        "GATEWISE_NUM_THREADS": str(job["threads"]),
    }
    command = [sys.executable, "-m", "benchmarks.worker"]
    root = Path(__file__).parent.parent
    left = list(job["workloads"])
    with subprocess.Popen(
        command, cwd=root, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                left.remove(answer["name"])
                yield answer
        finally:
            process.kill()
    for name in left:
        yield {"name": name, "failed": f"the process ended with status {process.returncode}"}


# ---- the results


def machine(numbers: dict[str, str]) -> dict[str, Any]:
    import gatewise as gw
    from gatewise import _core

    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / part).read_text().strip() for part in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size.rstrip("K")) * 1024
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": str(date.today()),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches,
        "build": _core.configuration(),
        "versions": numbers,
        "backend": gw.settings.backend(),
        "peak_gflops": {},
    }


def add(document: dict[str, Any], job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Writes one answer where it belongs."""
    task, name, peer, found = job["task"], answer["name"], job.get("peer"), answer.get("found")
    if task == "cold":
        if found:
            document["cold"].append({"who": peer, **found})
        return
    rows = document["rows"]
    row = next((r for r in rows if r["name"] == name and r["threads"] == job["threads"]), None)
    if row is None:
        row = {"name": name, "threads": job["threads"], "peers": {}, "failed": {}, "memory": None, "latency": None}
        rows.append(row)
    if found is None:
        row["failed"][peer or "gatewise"] = answer["failed"]
    elif task == "limits":
        peak = document["made"]["peak_gflops"]
        dtype = WORKLOADS[name].dtype
        peak[dtype] = max(peak.get(dtype, 0), found.pop("peak_gflops"))
        row.update(found)
    elif task == "pairs":
        row["peers"][peer] = {key: found[key] for key in ("seconds", "ratio", "low", "high", "pairs")}
    elif task == "latency":
        row["latency"] = found
    else:
        row["memory"] = {**(row["memory"] or {}), peer: found}


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The results, and whether all of them were waited for."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    found, skipped, numbers = installed(options.peers)
    how = {name: (PEERS[name].make.__doc__ or "").strip() for name in found}
    document = {
        "made": machine(numbers),
        "how": {"gatewise": (gatewise.__doc__ or "").strip(), **how},
        "skipped": skipped,
        "rows": [],
        "cold": [],
    }
    todo = list(jobs(options, found))
    columns = (TextColumn("{task.description:48}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(job["workloads"]) for job in todo))
        try:
            for job in todo:
                who, threads = job.get("peer", job["task"]), threads_text(job["threads"])
                progress.update(bar, description=f"{who}, {threads}")
                for answer in work(job):
                    add(document, job, answer)
                    progress.update(bar, advance=1, description=f"{who}: {answer['name']}, {threads}")
        except KeyboardInterrupt:
            return document, False
    return document, True


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(WORKLOADS))
        return 0
    try:
        from rich.console import Console
    except ImportError:
        print("python -m benchmarks needs rich: pip install '.[bench]'", file=sys.stderr)
        return 2
    from . import report

    complete = True
    if not options.show:
        warn_of_load(max(options.threads))
    if options.show:
        document, file = json.loads(options.show.read_text()), options.show
    else:
        document, complete = measure(options)
        file = options.json
        if complete and not file and not options.quick:
            file = RESULTS / f"{document['made']['date']}.json"
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(document) + "\n")
    # Wide enough for the tables where nobody watches.
    console = Console() if sys.stdout.isatty() else Console(width=140)
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
        console.print(
            "\n".join(["slower than before, by ratio to a peer:", *slower]) if slower else "nothing is slower"
        )
    missed = report.missed(document)
    if missed:
        count = "1 target is" if len(missed) == 1 else f"{len(missed)} targets are"
        console.print("\n".join([f"{count} not reached:", *missed]), highlight=False)
    if not complete:
        return 130
    return 1 if missed and not options.show else 0


def warn_of_load(threads: int) -> None:
    """Say that others use this machine, if they do: their work changes the times, and less so the ratios."""
    load = os.getloadavg()[0]
    if load > threads:
        print(
            f"this machine is busy: its load average is {load:.1f}, the measurements use "
            f"{threads_text(threads)}. Leave the machine alone, or expect wide spreads.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
