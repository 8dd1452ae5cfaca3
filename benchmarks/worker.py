"""A worker process: it measures gatewise and one peer in turns, or gatewise and the machine's limits.

A job comes as JSON on the standard input; a line of JSON goes out for each workload. A process knows only one peer, so
that no two peers' thread pools meet (PyTorch exports networks for ONNX Runtime, but on one thread). It is pinned to as
many processors as the job has threads.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import repeat
from operator import is_
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

import numpy as np

from .cases import Array, Case, Party, make_case
from .checks import check, reference_results
from .peers import GATEWISE, PEERS, Peer, peer_named
from .workloads import TRAIN, TRAINING, WORKLOADS, Workload

# Seconds of waiting before each turn of several threads, so that the workers of the other party stop spinning for work:
# libgomp's do after some milliseconds, ONNX Runtime's after a million pauses, 20 ms or more. With less waiting the two
# parties share their processors: at 20 ms, two threads of one row came out at half or at twice the speed, by chance.
REST = 0.1
# The least seconds of a turn: much shorter calls are repeated within it, and the clock costs nothing. After a rest the
# processors speed up slowly: of calls of 0.6 ms the first two took 1.2 and 0.9 ms. Hence a longer turn after a rest,
# and calls before it that are not timed.
TURN = 0.002
START_AFTER_REST, TURN_AFTER_REST = 0.005, 0.02


# ---- timing


def calls_per_turn(run: Callable[[], Any], least: float) -> int:
    """The number of calls that take at least `least` seconds."""
    calls = 1
    while (seconds := time_of(run, calls)) < least:
        calls = max(2 * calls, int(1.2 * calls * least / max(seconds, 1e-7)))
    return calls


def time_of(run: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    for _ in repeat(None, calls):
        run()
    return perf_counter() - start


def make_turn(run: Callable[[], Any], threads: int) -> Callable[[], float]:
    """A function that takes a turn and returns the seconds of one call.

    Some calls before it, which are not timed, wake threads and fill caches.
    """
    calls = calls_per_turn(run, TURN if threads == 1 else TURN_AFTER_REST)

    def turn() -> float:
        if threads > 1:
            sleep(REST)
            end = perf_counter() + START_AFTER_REST
            while perf_counter() < end:
                run()
        run()
        return time_of(run, calls) / calls

    return turn


def take_turns(first: Callable[[], float], second: Callable[[], float], seconds: float) -> Array:
    """What both return [pair, 2] until the time is over, at least 5 pairs. The one that begins changes each time."""
    pairs: list[tuple[float, float]] = []
    end = perf_counter() + seconds
    while len(pairs) < 5 or (perf_counter() < end and len(pairs) < 1000):
        if len(pairs) % 2:
            value = second()
            pairs.append((first(), value))
        else:
            pairs.append((first(), second()))
    return np.array(pairs)


def compare_with_peer(case: Case, seconds: float, name: str) -> dict[str, Any]:
    peer = PEERS[name]
    expected = reference_results(case)
    ours, theirs = GATEWISE.make(case), peer.make(case)
    check(case, ours, expected)
    check(case, theirs, reference_results(case, padded=True) if peer.computes_padding else expected)
    our_turn, their_turn = (make_turn(party.run, case.threads) for party in (ours, theirs))
    gc.disable()
    times = take_turns(our_turn, their_turn, seconds)
    gc.enable()
    low, ratio, high = np.percentile(times[:, 1] / times[:, 0], [25, 50, 75])
    return {
        "ours": float(np.median(times[:, 0])),
        "seconds": float(np.median(times[:, 1])),
        "ratio": float(ratio),
        "low": float(low),
        "high": float(high),
        "pairs": len(times),
    }


# ---- the machine's limits


def rate_of_threads(threads: int, work: Callable[[], int]) -> float:
    """How many units of work that many threads do in a second, all at once; `work` returns how many it did."""
    from concurrent.futures import ThreadPoolExecutor

    def timed_work() -> tuple[int, float]:
        start = perf_counter()
        return work(), perf_counter() - start

    if threads == 1:
        count, seconds = timed_work()
        return count / seconds
    with ThreadPoolExecutor(threads) as pool:
        return sum(count / seconds for count, seconds in pool.map(lambda _: timed_work(), range(threads)))


def peak(dtype: str, threads: int) -> float:
    """Operations per second of cores that only multiply and add, over a millisecond or so."""
    import gatewise._core as _core

    return rate_of_threads(threads, lambda: _core.multiply_add(np.dtype(dtype), 500_000))


def bandwidth(dtype: str, threads: int, size: int) -> float:
    """Bytes per second of cores that only read their shares of `size` bytes, again and again, 32 MB in all."""
    import gatewise._core as _core

    share = max(4096, size // threads)
    return rate_of_threads(threads, lambda: _core.read(np.dtype(dtype), share, max(1, (1 << 25) // share)))


def compare_with_limits(case: Case, seconds: float) -> dict[str, Any]:
    workload = case.workload
    turn = make_turn(GATEWISE.make(case).run, case.threads)
    times = take_turns(turn, lambda: peak(workload.dtype, case.threads), seconds)
    rates = workload.operations / times[:, 0]
    shares = rates / times[:, 1]
    result = {
        "seconds": float(np.median(times[:, 0])),
        "gflops": float(np.median(rates)) / 1e9,
        "share": float(np.median(shares)),
        "share_best": float(np.percentile(shares, 90)),
        "peak_gflops": float(np.median(times[:, 1])) / case.threads / 1e9,
        "bandwidth_share": None,
    }
    if workload.batch == 1 and workload.mode not in TRAINING:
        working_set = workload.weight_bytes // workload.steps
        times = take_turns(turn, lambda: bandwidth(workload.dtype, case.threads, working_set), seconds / 2)
        result["bandwidth_share"] = float(np.median(workload.weight_bytes / times[:, 0] / times[:, 1]))
    return result


# ---- single steps, one by one


def distribution(times: Array) -> dict[str, Any]:
    """Percentiles in nanoseconds, and counts in bins that are 2 % wide."""
    edges = np.unique(np.round(10 * 1.02 ** np.arange(1000)))  # 10 ns to 4 s
    counts, _ = np.histogram(times, np.append(edges, np.inf))
    p50, p99, p999 = np.percentile(times, [50, 99, 99.9])
    histogram = [[int(edge), int(count)] for edge, count in zip(edges, counts, strict=True) if count]
    return {"p50": p50, "p99": p99, "p99.9": p999, "max": int(times.max()), "histogram": histogram}


def latency(case: Case, calls: int, seconds: float) -> dict[str, Any]:
    """Each call between two readings of the clock, and an empty call with as many arguments right after it.

    A million calls, or as many as the time allows.
    """
    run = GATEWISE.make(case).run
    call, arguments = run.func, run.args  # type: ignore[attr-defined]
    x, out = arguments[0], arguments[-1]
    if len(arguments) > 2:  # a pool, whose ticks take long enough
        call = lambda *_: run()  # noqa: E731
    clock = perf_counter_ns
    seconds_per_call = time_of(run, 2000) / 2000
    calls = min(calls, max(1000, int(seconds / (seconds_per_call + 3e-7))))
    times, empty = np.empty(calls, np.int64), np.empty(calls, np.int64)
    gc.disable()
    for i in range(calls):
        start = clock()
        call(x, out)
        times[i] = clock() - start
        start = clock()
        is_(x, out)
        empty[i] = clock() - start
    gc.enable()
    return {"calls": calls, **distribution(times), "empty": distribution(empty)}


# ---- memory, and the start


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def peak_memory(case: Case, make: Callable[[Case], Party]) -> int:
    """The most bytes that a training step adds to the process, without parameters and inputs; Linux only."""
    small = make_case(Workload(TRAIN, case.workload.cell, 2, 2, 8, 8), case.threads)
    make(small).run()  # loads code, and fills pools of memory
    run = make(case).run
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = _status("VmRSS:")
    result = run()
    after = _status("VmHWM:")
    del result
    return after - before


def cold_start(workload: Workload, threads: int, peer: Peer, begin: float) -> dict[str, float]:
    """Seconds since `begin`, with NumPy imported: to import, to the first result, and those of the second call.

    The random data is not part of them.
    """
    import_module(peer.modules[0])
    import_seconds = perf_counter() - begin
    case = make_case(workload, threads)
    start = perf_counter()
    run = peer.make(case).run
    run()
    first = perf_counter()
    run()
    second_seconds = perf_counter() - first
    return {"import": import_seconds, "first": import_seconds + first - start, "second": second_seconds}


# ---- the job


def results(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An answer for each workload, with its result or with how it failed."""
    threads = job["threads"]
    begin = perf_counter()
    peer = peer_named(job.get("peer", "gatewise"))
    if peer.start:
        peer.start(threads)
    for name in job["workloads"]:
        try:
            yield {"name": name, "result": _result(job, WORKLOADS[name], peer, begin)}
        except Exception as error:  # any error: it is reported for this workload, and the others go on
            yield {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}


def _result(job: dict[str, Any], workload: Workload, peer: Peer, begin: float) -> Any:
    task, threads = job["task"], job["threads"]
    if task == "cold":
        return cold_start(workload, threads, peer, begin)
    case = make_case(workload, threads)
    if task == "pairs":
        return compare_with_peer(case, job["seconds"], job["peer"])
    if task == "limits":
        return compare_with_limits(case, job["seconds"])
    if task == "latency":
        return latency(case, job["calls"], job["seconds"])
    return peak_memory(case, peer.make)


def main() -> None:
    job = json.load(sys.stdin)
    os.sched_setaffinity(0, job["processors"])
    # What libraries print while they start must not mix with the results.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for answer in results(job):
        print(json.dumps(answer), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # without what libraries do at the end of a process
