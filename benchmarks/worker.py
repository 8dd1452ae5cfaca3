"""What runs in a process of its own: gatewise and one peer in turns, or gatewise beside the machine's limits.

A job comes as JSON on the standard input; a line of JSON goes out for each workload. A process knows one peer only,
so that no two peers' thread pools meet (PyTorch exports networks for ONNX Runtime, but on one thread); it is pinned to
as many processors as the job has threads.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from operator import is_
from time import perf_counter, perf_counter_ns, sleep
from typing import Any

import numpy as np

from . import peers
from .peers import Array, Case, Party
from .workloads import DENSE, EMBEDDING, GATES, GOES_ON, PADDED, TRAIN, TRAINING, WORKLOADS, Workload

# Waited before each turn of several threads, so that the workers of the party before stop spinning for work: libgomp's
# do after some milliseconds, ONNX Runtime's after a million pauses, 20 ms or more. With less the next party shares its
# processors with them: at 20 ms two threads of one row came out at half or at twice the speed, by chance.
REST = 0.1
# A turn's least time: calls much shorter are repeated within it, and the clock costs nothing. After a rest processors
# come back slowly: of calls of 0.6 ms the first two took 1.2 and 0.9 ms. Hence a longer turn then, and a longer start.
TURN = 0.002
START_AFTER_REST, TURN_AFTER_REST = 0.005, 0.02
# Before they begin again. Always the same token would leave its row of the table in the first cache.
TOKENS = 1000


def uniform(random: np.random.Generator, size: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    bound = 1 / np.sqrt(size)
    return {name: random.uniform(-bound, bound, shape) for name, shape in shapes.items()}


def recurrent(random: np.random.Generator, cell: str, inputs: int, hidden: int, way: str) -> dict[str, Array]:
    rows = GATES[cell] * hidden
    shapes = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    return uniform(random, hidden, {f"{kind}_{way}": shape for kind, shape in shapes.items()})


def of_network(random: np.random.Generator, workload: Workload) -> dict[str, Array]:
    """With the number of the layer before each name."""
    parameters: dict[str, Array] = {}
    for i, (kind, inputs, outputs, _) in enumerate(workload.blocks):
        if kind == EMBEDDING:
            own = {"weight": random.standard_normal((inputs, outputs))}
        elif kind == DENSE:
            own = uniform(random, inputs, {"weight": (outputs, inputs), "bias": (outputs,)})
        else:
            own = recurrent(random, kind, inputs, outputs, "l0")
        parameters.update({f"{i}.{name}": value for name, value in own.items()})
    return parameters


def make_case(workload: Workload, threads: int) -> Case:
    """Uniform weights of PyTorch's size and normal inputs, the same for everyone."""
    w, random = workload, np.random.default_rng(1)
    drawn = of_network(random, w)
    for index, (inputs, hidden) in enumerate(() if w.blocks else w.sequences):
        way = f"l{index // w.directions}" + "_reverse" * (index % w.directions)
        drawn.update(recurrent(random, w.cell, inputs, hidden, way))
    parameters = {name: value.astype(w.dtype) for name, value in drawn.items()}
    x: Array = random.standard_normal((w.steps, w.batch, w.input)).astype(w.dtype)
    if w.takes_tokens:
        x = random.integers(w.blocks[0].inputs, size=(TOKENS, w.batch))
    grad_output = random.standard_normal((w.steps, w.batch, w.directions * w.hidden)).astype(w.dtype)
    if w.lengths is not None:  # so that a run over the padding can be held against the same gradients
        grad_output[np.arange(w.steps)[:, None] >= w.lengths] = 0
    return Case(w, threads, parameters, x, grad_output)


# ---- the check, before anything is timed

# Relative to the largest element: an approximate tanh of a few 1e-7 passes, another equation does not. The gradients
# of weights add up thousands of terms.
TOLERANCES = {"float32": (1e-5, 2e-4), "float64": (1e-10, 1e-9)}


def expected_of(case: Case, calls: int = 1, *, padded: bool = False) -> dict[str, Array]:
    """The reference's results in float64; where a call goes on from the last one, the outputs of so many of them.

    padded: as if all rows had all steps, and no resets; of a network only the recurrent layers.
    """
    from gatewise import reference

    w = case.workload
    if w.blocks:
        return {"output": output_of_network(peers.recurrent_alone(case) if padded else case, calls)}
    x = np.tile(case.x, (calls, 1, 1)).astype(float)
    schedule: dict[str, Any] = {} if padded else case.schedule
    output, _, tape = reference.forward(
        w.cell.lower(), x, None, case.parameters, num_layers=w.layers, bidirectional=w.directions == 2,
        **schedule,
    )  # fmt: skip
    expected = {"output": output}
    if w.mode in TRAINING:
        expected["input"], _, gradients = reference.backward(tape, case.grad_output.astype(float))
        expected.update(gradients)
    return expected


def output_of_network(case: Case, steps: int) -> Array:
    """Layer after layer, each over all steps."""
    from gatewise import reference

    w = case.workload
    x: Array = case.x[:steps] if w.takes_tokens else np.repeat(case.x, steps, axis=0).astype(float)
    for i, block in enumerate(w.blocks):
        start = f"{i}."
        own = {
            name.removeprefix(start): value.astype(float)
            for name, value in case.parameters.items()
            if name.startswith(start)
        }
        if block.kind == EMBEDDING:
            x = own["weight"][x]
        elif block.kind == DENSE:
            x = reference.ACTIVATIONS[block.activation](x @ own["weight"].T + own["bias"])
        else:
            x, _, _ = reference.forward(block.kind.lower(), x, None, own)
    return x


def check(case: Case, party: Party, expected: dict[str, Array]) -> None:
    """Raises ValueError if the party computes something else than the reference."""
    of_output, of_gradient = TOLERANCES[case.workload.dtype]
    results = [party.collect(party.run()) for _ in range(3 if case.workload.mode in GOES_ON else 1)]
    found = dict(results[-1])
    if case.workload.mode in GOES_ON:
        found = {"output": np.concatenate([result["output"] for result in results])}
    for name, value in found.items():
        limit = of_output if name == "output" else of_gradient
        error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
        if not error <= limit:
            raise ValueError(f"wrong {name}: error {error:.1e} of the largest element, expected {limit:.0e} at most")


# ---- timing


def calls_for(run: Callable[[], Any], least: float) -> int:
    """So many calls as take a turn's least time."""
    calls = 1
    while (seconds := time_of(run, calls)) < least:
        calls = max(2 * calls, int(1.2 * calls * least / max(seconds, 1e-7)))
    return calls


def time_of(run: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    for _ in repeat(None, calls):
        run()
    return perf_counter() - start


def turns(run: Callable[[], Any], threads: int) -> Callable[[], float]:
    """A function that takes a turn: seconds of one call, after some that are not timed and wake threads and caches."""
    calls = calls_for(run, TURN if threads == 1 else TURN_AFTER_REST)

    def turn() -> float:
        if threads > 1:
            sleep(REST)
            end = perf_counter() + START_AFTER_REST
            while perf_counter() < end:
                run()
        run()
        return time_of(run, calls) / calls

    return turn


def pairs(first: Callable[[], float], second: Callable[[], float], seconds: float) -> Array:
    """Turns of both [pair, 2] until the time is over: at least 5 pairs. Who begins changes from pair to pair."""
    found: list[tuple[float, float]] = []
    end = perf_counter() + seconds
    while len(found) < 5 or (perf_counter() < end and len(found) < 1000):
        if len(found) % 2:
            later = second()
            found.append((first(), later))
        else:
            found.append((first(), second()))
    return np.array(found)


def against_peer(case: Case, seconds: float, peer: str) -> dict[str, Any]:
    calls = 3 if case.workload.mode in GOES_ON else 1
    expected = expected_of(case, calls)
    ours, theirs = peers.gatewise(case), peers.PEERS[peer].make(case)
    check(case, ours, expected)
    check(case, theirs, expected_of(case, calls, padded=True) if peer in PADDED else expected)
    our_turn, their_turn = (turns(party.run, case.threads) for party in (ours, theirs))
    gc.disable()
    times = pairs(our_turn, their_turn, seconds)
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


def on_all(threads: int, work: Callable[[], int]) -> float:
    """How many of what `work` counts are done a second by that many threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    def one() -> tuple[int, float]:
        start = perf_counter()
        return work(), perf_counter() - start

    if threads == 1:
        count, seconds = one()
        return count / seconds
    with ThreadPoolExecutor(threads) as pool:
        return sum(count / seconds for count, seconds in pool.map(lambda _: one(), range(threads)))


def peak(dtype: str, threads: int) -> float:
    """Operations a second of cores that only multiply and add, over a millisecond or so."""
    from gatewise import _core

    return on_all(threads, lambda: _core.multiply_add(np.dtype(dtype), 500_000))


def bandwidth(dtype: str, threads: int, size: int) -> float:
    """Bytes a second of cores that only read their shares of `size` bytes, again and again, 32 MB in all."""
    from gatewise import _core

    share = max(4096, size // threads)
    return on_all(threads, lambda: _core.read(np.dtype(dtype), share, max(1, (1 << 25) // share)))


def against_limits(case: Case, seconds: float) -> dict[str, Any]:
    w = case.workload
    turn = turns(peers.gatewise(case).run, case.threads)
    times = pairs(turn, lambda: peak(w.dtype, case.threads), seconds)
    rates = w.operations / times[:, 0]
    shares = rates / times[:, 1]
    found = {
        "seconds": float(np.median(times[:, 0])),
        "gflops": float(np.median(rates)) / 1e9,
        "share": float(np.median(shares)),
        "share_best": float(np.percentile(shares, 90)),
        "peak_gflops": float(np.median(times[:, 1])) / case.threads / 1e9,
        "bandwidth_share": None,
    }
    if w.batch == 1 and w.mode not in TRAINING:
        working_set = w.weight_bytes // w.steps
        times = pairs(turn, lambda: bandwidth(w.dtype, case.threads, working_set), seconds / 2)
        found["bandwidth_share"] = float(np.median(w.weight_bytes / times[:, 0] / times[:, 1]))
    return found


# ---- single steps, one by one


def distribution(times: Array) -> dict[str, Any]:
    """Percentiles in nanoseconds, and counts in bins that are 2 % wide."""
    edges = np.unique(np.round(10 * 1.02 ** np.arange(1000)))  # 10 ns to 4 s
    counts, _ = np.histogram(times, np.append(edges, np.inf))
    p50, p99, p999 = np.percentile(times, [50, 99, 99.9])
    histogram = [[int(edge), int(count)] for edge, count in zip(edges, counts, strict=True) if count]
    return {"p50": p50, "p99": p99, "p99.9": p999, "max": int(times.max()), "histogram": histogram}


def latency(case: Case, calls: int, seconds: float) -> dict[str, Any]:
    """Each call between two readings of the clock, and an empty call of as many arguments right after it.

    A million calls, or as many as the time allows.
    """
    run = peers.gatewise(case).run
    call, arguments = run.func, run.args  # type: ignore[attr-defined]
    x, out = arguments[0], arguments[-1]
    if len(arguments) > 2:  # a pool's, whose ticks are long enough
        call = lambda *_: run()  # noqa: E731
    clock = perf_counter_ns
    one = time_of(run, 2000) / 2000
    calls = min(calls, max(1000, int(seconds / (one + 3e-7))))
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


def peak_memory(case: Case, party: Callable[[Case], Party]) -> int:
    """Bytes that a training step adds at most to the process, parameters and inputs apart; Linux only."""
    small = make_case(Workload(TRAIN, case.workload.cell, 2, 2, 8, 8), case.threads)
    party(small).run()  # code and pools
    run = party(case).run
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = _status("VmRSS:")
    kept = run()
    after = _status("VmHWM:")
    del kept
    return after - before


def cold_start(case: Case, start: float, party: Callable[[Case], Party], module: str) -> dict[str, float]:
    """Seconds from the start, with NumPy there already: to import, to the first result, and of the second."""
    __import__(module)
    imported = perf_counter()
    run = party(case).run
    run()
    first = perf_counter()
    run()
    return {"import": imported - start, "first": first - start, "second": perf_counter() - first}


# ---- the job


def results(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    threads, task = job["threads"], job["task"]
    begin = perf_counter()
    peer = peers.PEERS.get(job.get("peer", ""))
    if peer and peer.start:
        peer.start(threads)
    make = peer.make if peer else peers.gatewise
    for name in job["workloads"]:
        try:
            case = make_case(WORKLOADS[name], threads)
            if task == "pairs":
                found: Any = against_peer(case, job["seconds"], job["peer"])
            elif task == "limits":
                found = against_limits(case, job["seconds"])
            elif task == "latency":
                found = latency(case, job["calls"], job["seconds"])
            elif task == "memory":
                found = peak_memory(case, make)
            else:
                found = cold_start(case, begin, make, job["module"])
            yield {"name": name, "found": found}
        except Exception as error:  # a peer's failure is a result, whatever its kind
            yield {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    job = json.load(sys.stdin)
    os.sched_setaffinity(0, job["processors"])
    # What libraries print while they start must not mix with the results.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for result in results(job):
        print(json.dumps(result), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # without the libraries' own ways of ending


if __name__ == "__main__":
    main()
