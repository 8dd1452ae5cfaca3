"""`gatewise bench`: the time of a model, here and in ONNX Runtime."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import Array
from gatewise.arguments.axes import Axes
from gatewise.cli.models import described, load, threads_set, why_not_in_pieces
from gatewise.cli.tables import print_table
from gatewise.running.network import Chain

PIECE = 2**20
MOST_CALLS = 20_000
SECONDS = 4.0  # for the calls that one line of `bench` is about
VARIETY = 256  # different inputs of a step, so that no table or cache holds the one that is asked for


def bench(file: str, steps: int, batch: int, block: int, window: int | None, threads: int | None) -> int:
    """Time a step, a block of steps and a sequence, here and in ONNX Runtime."""
    with threads_set(threads):
        model = load(file)
        of = model._chain
        threads_used = gw.get_num_threads()
        with_threads = "1 thread" if threads_used == 1 else f"{threads_used} threads"
        print(f"{file}: {described(of)}; backend {gw.backend()}, {with_threads}")
        clock = _clock()
        peer, why = _peer(model) if window is None else (None, "has no windows")
        lines = [
            *_step_lines(model, window, clock, peer),
            *_block_lines(model, block, window, clock, peer),
            *_sequence_lines(model, steps, batch, clock, peer),
        ]
    print_table(("", "p50", "p99", "p99.9", "calls"), lines)
    if reason := why_not_in_pieces(of):
        hint = "" if window else "; try --window N"
        print(f"step: {'of a window' if window else f'none{hint}'}, since {reason}")
    if why is not None:
        print(f"ONNX Runtime: {why}")
    print(f"the clock's own {clock} ns are subtracted")
    return 0


def _step_lines(model: gw.Sequential, window: int | None, clock: int, peer: Peer | None) -> Iterator[tuple[str, ...]]:
    of = model._chain
    if window is None and of.looks_ahead:
        return
    stream = model.stream(window=window)
    out = np.empty(of.output_size, of.dtype)
    xs = list(_draw(of, (VARIETY,)))
    yield _line(f"step{_of_window(window)}", _times(stream.step, [(np.asarray(x), out) for x in xs], clock))
    if peer is not None and peer.can_step:
        yield _line("  ONNX Runtime", _times(peer.stepper(), [(x.reshape(1, 1, *of.units),) for x in xs], clock))


def _block_lines(
    model: gw.Sequential, block: int, window: int | None, clock: int, peer: Peer | None
) -> Iterator[tuple[str, ...]]:
    """Blocks of one row by stream.run(block, out), as a sound card hands them over."""
    of = model._chain
    if window is None and of.looks_ahead:
        return
    stream = model.stream(window=window)
    out = np.empty((block, of.output_size), of.dtype)
    xs = list(_draw(of, (min(VARIETY, max(PIECE // block, 1)), block)))
    yield _line(f"block of {block}{_of_window(window)}", _times(stream.run, [(x, out) for x in xs], clock))
    if peer is not None and peer.can_step:
        leading = Axes(model.batch_first, False, block, 1).leading
        yield _line("  ONNX Runtime", _times(peer.stepper(), [(x.reshape(*leading, *of.units),) for x in xs], clock))


def _of_window(window: int | None) -> str:
    return "" if window is None else f", window {window}"


def _sequence_lines(
    model: gw.Sequential, steps: int, batch: int, clock: int, peer: Peer | None
) -> Iterator[tuple[str, ...]]:
    axes = Axes(model.batch_first, False, steps, batch)
    x = _draw(model._chain, axes.leading)
    yield _line(f"sequence {steps} x {batch}", _times(model, [(x,)], clock))
    if peer is not None:
        yield _line("  ONNX Runtime", _times(partial(peer.sequence, batch), [(x,)], clock))


def _draw(of: Chain, leading: tuple[int, ...]) -> Array:
    generator = np.random.default_rng(1)
    if of.vocabulary is not None:
        return generator.integers(0, of.vocabulary, leading)
    return generator.standard_normal((*leading, *of.units)).astype(of.dtype)


def _clock() -> int:
    """Nanoseconds between two readings of the clock with nothing between them."""
    readings = [(perf_counter_ns(), perf_counter_ns()) for _ in range(10_000)]
    return int(np.median([after - before for before, after in readings]))


def _times(call: Callable[..., object], arguments: Sequence[tuple[Any, ...]], clock: int) -> Array:
    """Nanoseconds of each of many calls, without the clock's; the arguments take turns."""
    count, start = 0, perf_counter()
    while count < 3 or (count < 2000 and perf_counter() < start + SECONDS / 10):  # until caches are warm
        call(*arguments[count % len(arguments)])
        count += 1
    one = (perf_counter() - start) / count
    times = np.empty(max(10, min(MOST_CALLS, int(SECONDS / one))), np.int64)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(len(times)):
            given = arguments[i % len(arguments)]
            begin = perf_counter_ns()
            call(*given)
            times[i] = perf_counter_ns() - begin
    finally:
        if was_enabled:
            gc.enable()
    return np.maximum(times - clock, 0)


def _line(name: str, times: Array) -> tuple[str, ...]:
    shown = [_duration(float(np.quantile(times, q))) for q in (0.5, 0.99, 0.999)]
    return name, *shown, f"{len(times):,}"


def _duration(nanoseconds: float) -> str:
    for unit, size in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        if nanoseconds < 999.5 * size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1e9:.3g} s"


@dataclass(frozen=True)
class Peer:
    """A session of ONNX Runtime: its first input is x, the others are states, and so it is with its outputs."""

    session: Any
    dtype: np.dtype[Any]

    @property
    def states(self) -> list[Any]:
        return list(self.session.get_inputs()[1:])

    @property
    def outputs(self) -> list[str]:
        return [one.name for one in self.session.get_outputs()]

    @property
    def can_step(self) -> bool:
        """Whether each state that comes out goes in again."""
        return len(self.states) + 1 == len(self.outputs)

    def feed(self, batch: int) -> dict[str, Array]:
        """Zero states of some rows; sizes that the graph leaves open are the batch's."""
        shapes = {one.name: [n if isinstance(n, int) else batch for n in one.shape] for one in self.states}
        return {name: np.zeros(shape, self.dtype) for name, shape in shapes.items()}

    def sequence(self, batch: int, x: Array) -> Array:
        first = self.session.get_inputs()[0].name
        y: Array = self.session.run(self.outputs[:1], {first: x, **self.feed(batch)})[0]
        return y

    def stepper(self) -> Callable[[Array], None]:
        """One step of one row at a time, with the states of the one before."""
        name, names, feed = self.session.get_inputs()[0].name, self.outputs, self.feed(1)
        states = [one.name for one in self.states]

        def step(x: Array) -> None:
            feed[name] = x
            _, *after = self.session.run(names, feed)
            feed.update(zip(states, after, strict=True))

        return step


def _peer(model: gw.Sequential) -> tuple[Peer | None, str | None]:
    """ONNX Runtime with the same model, or why there is none."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None, "not installed; try: pip install onnxruntime onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = gw.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        try:
            gw.save(model, path)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            peer = Peer(session, model.dtype)
            axes = Axes(model.batch_first, False, 3, 2)
            x = _draw(model._chain, axes.leading)
            y, ours = peer.sequence(2, x), model(x)
            if peer.can_step:
                peer.stepper()(_draw(model._chain, (1, 1)))
        except Exception as error:  # of its own kinds, which have no base of their own
            return None, f"left out: {' '.join(str(error).split())[:200]}"
    if y.shape != ours.shape or not np.allclose(y, ours, rtol=1e-3, atol=1e-3):
        return None, "left out: its output is another one"
    return peer, None
