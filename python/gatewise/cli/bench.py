"""`gatewise bench`: time a model, here and in ONNX Runtime."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import Array
from gatewise.arguments.axes import Axes
from gatewise.cli.models import load_model, streaming_obstacles, summary, using_threads
from gatewise.cli.onnx_runtime import OnnxRuntime, open_onnx_runtime, random_input
from gatewise.cli.tables import print_table

MAX_CALLS = 20_000
SECONDS = 4.0  # for the calls of one line
MAX_INPUT_STEPS = 2**20  # in all inputs of a line together
NUM_INPUTS = 256  # different ones, so that no cache holds the input or the rows of a table that a step needs

Line = tuple[str, ...]


def bench(
    file: str | None,
    peers: Sequence[str] | None,
    steps: int,
    batch: int,
    block: int,
    window: int | None,
    threads: int | None,
) -> int:
    """Print the times of a step, of a block of steps and of a sequence; without a file, run the benchmarks."""
    if file is None:
        return _bench_peers(peers or ())
    with using_threads(threads):
        model = load_model(file)
        num_threads = gw.get_num_threads()
        threads_text = "1 thread" if num_threads == 1 else f"{num_threads} threads"
        print(f"{file}: {summary(model._chain)}; backend {gw.backend()}, {threads_text}")
        overhead = _clock_overhead()
        runtime, why_no_runtime = open_onnx_runtime(model) if window is None else (None, "has no windows")
        lines = [
            *_step_lines(model, window, overhead, runtime),
            *_block_lines(model, block, window, overhead, runtime),
            *_sequence_lines(model, steps, batch, overhead, runtime),
        ]
    print_table(("", "p50", "p99", "p99.9", "calls"), lines)
    if obstacles := streaming_obstacles(model._chain):
        print(f"step: {'in a window' if window else 'none; try --window N'}, since {obstacles}")
    if why_no_runtime is not None:
        print(f"ONNX Runtime: {why_no_runtime}")
    print(f"the clock's own {overhead} ns are subtracted")
    return 0


def _bench_peers(arguments: Sequence[str]) -> int:
    """Run the benchmarks that are installed with gatewise; the first arguments may be names of peers."""
    if find_spec("gatewise.benchmarks") is None:  # gatewise comes from a source tree
        raise ValueError("--peers: there are no benchmarks in this installation; try: python -m benchmarks")
    harness = import_module("gatewise.benchmarks.__main__")
    has_names = bool(arguments) and not arguments[0].startswith("-")
    status: int = harness.main(["--peers", *arguments] if has_names else list(arguments), "gatewise bench --peers")
    return status


# ---- the lines of the table


def _step_lines(model: gw.Sequential, window: int | None, overhead: int, runtime: OnnxRuntime | None) -> Iterator[Line]:
    chain = model._chain
    if window is None and chain.streaming_obstacle:
        return
    stream = model.stream(window=window)
    out = np.empty(chain.output_size, chain.dtype)
    inputs = list(random_input(chain, (NUM_INPUTS,)))
    yield _line(f"step{_window_text(window)}", _times(stream.step, [(np.asarray(x), out) for x in inputs], overhead))
    if runtime is not None and runtime.can_step:
        arguments = [(x.reshape(1, 1, *chain.units),) for x in inputs]
        yield _line("  ONNX Runtime", _times(runtime.make_stepper(), arguments, overhead))


def _block_lines(
    model: gw.Sequential, block: int, window: int | None, overhead: int, runtime: OnnxRuntime | None
) -> Iterator[Line]:
    """Blocks of one row by stream.run(block, out), as an audio callback gets them."""
    chain = model._chain
    if window is None and chain.streaming_obstacle:
        return
    stream = model.stream(window=window)
    out = np.empty((block, chain.output_size), chain.dtype)
    inputs = list(random_input(chain, (min(NUM_INPUTS, max(MAX_INPUT_STEPS // block, 1)), block)))
    times = _times(stream.run, [(x, out) for x in inputs], overhead)
    yield _line(f"block of {block}{_window_text(window)}", times)
    if runtime is not None and runtime.can_step:
        leading = Axes(model.batch_first, False, block, 1).leading
        arguments = [(x.reshape(*leading, *chain.units),) for x in inputs]
        yield _line("  ONNX Runtime", _times(runtime.make_stepper(), arguments, overhead))


def _sequence_lines(
    model: gw.Sequential, steps: int, batch: int, overhead: int, runtime: OnnxRuntime | None
) -> Iterator[Line]:
    x = random_input(model._chain, Axes(model.batch_first, False, steps, batch).leading)
    yield _line(f"sequence {steps} x {batch}", _times(model, [(x,)], overhead))
    if runtime is not None:
        yield _line("  ONNX Runtime", _times(partial(runtime.run_sequence, batch), [(x,)], overhead))


def _window_text(window: int | None) -> str:
    return "" if window is None else f", window {window}"


def _line(name: str, times: Array) -> Line:
    quantiles = [_duration_text(float(np.quantile(times, q))) for q in (0.5, 0.99, 0.999)]
    return name, *quantiles, f"{len(times):,}"


def _duration_text(nanoseconds: float) -> str:
    for unit, size in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        if nanoseconds < 999.5 * size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1e9:.3g} s"


# ---- timing


def _clock_overhead() -> int:
    """Nanoseconds between two readings of the clock with nothing between them."""
    readings = [(perf_counter_ns(), perf_counter_ns()) for _ in range(10_000)]
    return int(np.median([after - before for before, after in readings]))


def _times(call: Callable[..., object], arguments: Sequence[tuple[Any, ...]], overhead: int) -> Array:
    """The nanoseconds of each of many calls, less those of the clock; the calls take the arguments in turn."""
    count, start = 0, perf_counter()
    while count < 3 or (count < 2000 and perf_counter() < start + SECONDS / 10):  # until the caches are warm
        call(*arguments[count % len(arguments)])
        count += 1
    seconds_per_call = (perf_counter() - start) / count
    times = np.empty(max(10, min(MAX_CALLS, int(SECONDS / seconds_per_call))), np.int64)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(len(times)):
            call_arguments = arguments[i % len(arguments)]
            before = perf_counter_ns()
            call(*call_arguments)
            times[i] = perf_counter_ns() - before
    finally:
        if was_enabled:
            gc.enable()
    return np.maximum(times - overhead, 0)
