"""Measurements: the jobs, the worker processes that do them, and the document that takes their answers."""

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

from .peers import PEERS, peer_named, versions
from .workloads import CELL, LAYER, NETWORK, ONE_STEP, RUN, STEP, TRAIN, WORKLOADS, threads_text

# The workload whose first result a cold start waits for.
COLD = "LSTM forward 100x1x128"


# ---- the jobs


def find_peers(names: Sequence[str] | None) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The peers that take part, the reasons of those that do not, and the versions of all packages."""
    installed, skipped, numbers = [], {}, versions(("gatewise", "numpy"))
    for name, peer in PEERS.items():
        if names is not None and name not in names:
            continue
        try:
            numbers.update(versions(peer.modules))
            installed.append(name)
        except PackageNotFoundError as missing:
            skipped[name] = f"{missing.name} is not installed"
    return installed, skipped, numbers


def jobs(options: argparse.Namespace, peers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All jobs, in the order in which they run. Single steps are measured on one thread."""
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
    if not options.quick:
        for name in ("gatewise", *peers):
            if not peer_named(name).is_variant:
                yield job("cold", 1, [COLD], peer=name)
    for threads in options.threads:
        workloads = [name for name in names if threads == 1 or _uses_threads(name)]
        yield job("limits", threads, workloads)
        for peer in peers:
            workloads_of_peer = [name for name in workloads if not PEERS[peer].refusal(WORKLOADS[name])]
            if workloads_of_peer:
                yield job("pairs", threads, workloads_of_peer, peer=peer)
    if 1 not in options.threads:
        return
    steps = [name for name in names if WORKLOADS[name].mode in (*ONE_STEP, RUN, NETWORK)]
    if steps:
        yield job("latency", 1, steps, calls=options.calls) | {"seconds": 2 if options.quick else 20}
    for name in names:
        if WORKLOADS[name].mode == TRAIN:
            for peer in ("gatewise", "PyTorch"):
                if peer == "gatewise" or peer in peers:
                    yield job("memory", 1, [name], peer=peer)


def _uses_threads(name: str) -> bool:
    return WORKLOADS[name].mode not in (STEP, RUN, CELL, LAYER, NETWORK)


# ---- the processes


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of a process of its own, and a failure for each workload that the process did not live to answer."""
    threads = str(job["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "GATEWISE_NUM_THREADS": threads,
    }
    unanswered = list(job["workloads"])
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "start_worker.py")],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                unanswered.remove(answer["name"])
                yield answer
        finally:
            process.kill()
    for name in unanswered:
        yield {"name": name, "failed": f"the process ended with status {process.returncode}"}


# ---- the document


def describe_machine(numbers: dict[str, str], command: str) -> dict[str, Any]:
    import gatewise as gw
    import gatewise._core as _core

    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / part).read_text().strip() for part in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size.rstrip("K")) * 1024
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": str(date.today()),
        "command": command,
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches,
        "build": _core.configuration(),
        "versions": numbers,
        "backend": gw.settings.backend(),
        "peak_gflops": {},
    }


def add(document: dict[str, Any], job: dict[str, Any], answer: dict[str, Any]) -> None:
    """Write one answer into the document."""
    task, name, peer, result = job["task"], answer["name"], job.get("peer"), answer.get("result")
    if task == "cold":
        if result:
            document["cold"].append({"who": peer, **result})
        return
    rows = document["rows"]
    row = next((r for r in rows if r["name"] == name and r["threads"] == job["threads"]), None)
    if row is None:
        row = {"name": name, "threads": job["threads"], "peers": {}, "failed": {}, "memory": None, "latency": None}
        rows.append(row)
    if result is None:
        row["failed"][peer or "gatewise"] = answer["failed"]
    elif task == "limits":
        peak = document["made"]["peak_gflops"]
        dtype = WORKLOADS[name].dtype
        peak[dtype] = max(peak.get(dtype, 0), result.pop("peak_gflops"))
        row.update(result)
    elif task == "pairs":
        row["peers"][peer] = {key: result[key] for key in ("seconds", "ratio", "low", "high", "pairs")}
    elif task == "latency":
        row["latency"] = result
    else:
        row["memory"] = {**(row["memory"] or {}), peer: result}


def measure(options: argparse.Namespace, command: str) -> tuple[dict[str, Any], bool]:
    """The document, and whether all measurements were waited for."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    peers, skipped, numbers = find_peers(options.peers)
    document = {
        "made": describe_machine(numbers, command),
        "how": {name: (peer_named(name).make.__doc__ or "").strip() for name in ("gatewise", *peers)},
        "skipped": skipped,
        "rows": [],
        "cold": [],
    }
    all_jobs = list(jobs(options, peers))
    columns = (TextColumn("{task.description:48}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(job["workloads"]) for job in all_jobs))
        try:
            for job in all_jobs:
                subject, threads = job.get("peer", job["task"]), threads_text(job["threads"])
                progress.update(bar, description=f"{subject}, {threads}")
                for answer in work(job):
                    add(document, job, answer)
                    progress.update(bar, advance=1, description=f"{subject}: {answer['name']}, {threads}")
        except KeyboardInterrupt:
            return document, False
    return document, True
