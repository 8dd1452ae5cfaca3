"""How near the machine's limit the core runs: `python -m benchmarks`.

Every timing of a product is paired with one of pure multiply-adds in registers, taken right before it on the same
core: the share of the peak is the ratio of the two, so that it holds while the machine's clock wanders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter, perf_counter_ns

import gatewise as gw
import numpy as np
from gatewise import _core

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SEQUENCES = [(100, 32, 128), (50, 64, 256), (25, 64, 512), (35, 20, 650), (100, 1, 64), (100, 1, 128), (100, 1, 256)]
STEPS = [16, 64, 128, 256]


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def peak(dtype: np.dtype[np.floating]) -> float:
    """GFLOP/s of one core that does nothing but multiply and add, over about a millisecond."""
    start = perf_counter()
    operations = _core.multiply_add(dtype, 500_000)
    return operations / (perf_counter() - start) / 1e9


def sequence_row(cell: str, dtype: str, steps: int, batch: int, size: int, threads: int, repetitions: int) -> str:
    layer = getattr(gw, cell)(size, size, dtype=dtype, seed=1)
    x = np.random.default_rng(1).standard_normal((steps, batch, size)).astype(dtype)
    out, grad = np.empty_like(x), np.ones_like(x)
    operations = 2 * steps * batch * GATES[cell] * size * 2 * size / 1e9
    works = {"forward": (lambda: layer(x, out=out), operations)}
    works["train"] = (lambda: layer.record(x).backward(grad), 3 * operations)
    cells = []
    for work, gigas in works.values():
        work()
        rates, shares = [], []
        for _ in range(repetitions):
            limit = peak(layer.dtype) * threads
            rates.append(gigas / seconds(work))
            shares.append(rates[-1] / limit)
        best = np.percentile(shares, 90)
        cells.append(f"{gigas / median(rates) * 1e3:9.3f} ms {median(rates):7.1f} {median(shares):6.0%} {best:5.0%}")
    return f"{cell:4} {dtype} {steps:4} x{batch:3} x{size:4} {cells[0]}  |{cells[1]}"


def step_row(cell: str, dtype: str, size: int, count: int) -> str:
    layer = getattr(gw, cell)(size, size, dtype=dtype, seed=1)
    step = layer.stream().step
    x, out = np.ones(size, dtype), np.empty(size, dtype)
    for _ in range(1000):
        step(x, out)
    together = min(seconds(lambda: [step(x, out) for _ in range(1000)]) for _ in range(50)) * 1e3
    clock = perf_counter_ns
    times, empty = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        start = clock()
        step(x, out)
        times[i] = clock() - start
        start = clock()
        empty[i] = clock() - start
    spread = [f"{np.percentile(times, p) / 1e3:8.2f} ({np.percentile(empty, p) / 1e3:.2f})" for p in (50, 99, 99.9)]
    return f"{cell:4} {dtype} {size:5} {together:9.3f}   {' '.join(spread)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of the sequences (default: 1)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--repetitions", type=int, default=25, help="of each sequence (default: 25)")
    parser.add_argument("--steps", type=int, default=100_000, help="single steps to time (default: 100000)")
    options = parser.parse_args()

    gw.set_num_threads(options.threads)
    gw.show_config()
    print(f"peak: {max(peak(np.dtype(options.dtype)) for _ in range(50)):.1f} GFLOP/s a core, {options.dtype}\n")
    print("sequences, T x B x H: median ms, GFLOP/s, share of the peak (median, best tenth) | forward and backward")
    for cell in ("LSTM", "GRU"):
        for shape in SEQUENCES:
            print(sequence_row(cell, options.dtype, *shape, options.threads, options.repetitions), flush=True)
    print("\nstep(x, out), us: best mean of 1000; p50, p99, p99.9 of single ones (of reading the clock alone)")
    for cell in ("LSTM", "GRU"):
        for size in STEPS:
            print(step_row(cell, options.dtype, size, options.steps), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
