"""What the commands `gatewise info FILE`, `convert`, `verify`, `run` and `bench` do; `__main__.py` has their options.

A sequence goes from file to file in pieces of some steps, so that its length costs no memory:

    x.npy or x.csv -> pieces (T, I) -> model.stream().run -> (T, O) -> a file beside y, which becomes y at the end

Rich shows tables and progress where it is installed and somebody looks; without it everything works, too.
"""

from __future__ import annotations

import gc
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter, perf_counter_ns
from typing import Any, TextIO

import numpy as np
from numpy.lib.format import open_memmap

import gatewise as gw
from gatewise.arguments.arrays import Array, describe, floating, tokens
from gatewise.arguments.axes import Axes
from gatewise.formats.errors import at
from gatewise.layers.activation import Activation
from gatewise.layers.blocks import Bidirectional
from gatewise.layers.recurrent import Layer
from gatewise.running.network import Chain

PIECE = 2**20  # numbers in the widest place of a piece: a few MB
PASSED, FAILED = 0, 1
MOST_CALLS = 20_000
SECONDS = 4.0  # for the calls that one line of `bench` is about
LINE_NUMBERS = 2**14  # of lines that are Python's objects at the same time, some ten times as large as their text
MOST_CHARACTERS = 1000  # of a number in a line
VARIETY = 256  # different inputs of a step, so that no table or cache holds the one that is asked for


# ---- models and what they say


def load(path: str) -> gw.Sequential:
    """The model in a file; a layer alone is a model of one."""
    made = gw.load(path)
    return made if isinstance(made, gw.Sequential) else gw.Sequential([made])


def _described(of: Chain) -> str:
    layers = "1 layer" if len(of.stages) == 1 else f"{len(of.stages)} layers"
    return f"{layers}, {'tokens' if of.vocabulary is not None else of.sizes[0]} to {of.output_size}, {of.dtype}"


def why_not_in_pieces(of: Chain) -> str | None:
    """The layers that keep a model from streaming, and why; None if nothing does."""
    reasons = [f"layers[{i}]: {stage.looks_ahead}" for i, stage in enumerate(of.stages) if stage.looks_ahead]
    return "; ".join(reasons) or None


def print_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table on stdout, the first column to the left and the others to the right."""
    cells = [tuple(header), *map(tuple, lines)]
    if sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            return _print_rich_table(cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        shown = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        print("  ".join(shown).rstrip())


def _print_rich_table(cells: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left")
    for line in cells[1:]:
        table.add_row(*map(Text, line))  # brackets are no markup
    Console().print(table)


# ---- info


def info(file: str | None) -> int:
    """Print what a file holds; without one, what this installation is."""
    if file is None:
        gw.show_config()
        return PASSED
    model = load(file)
    of = model._chain
    print(f"{file}: {_described(of)}, {'batch' if model.batch_first else 'time'} first\n")
    header = ("layer", "input", "output", "parameters", "multiply-adds", "state bytes", "streams")
    print_table(
        header, [*_layer_lines(model), ("together", "", "", *_counts(model.layers, of.dtype), _yes(of.looks_ahead))]
    )
    rows = ["B", "T"] if model.batch_first else ["T", "B"]
    units = of.output_size
    print(f"\ninput   {describe([*rows, *of.units])} or {describe(['T', *of.units])}, {_input_kind(of)}")
    if of.ends_at_last:
        print(f"output  {describe(['B', units])} or {describe([units])}: of the last step")
    else:
        print(f"output  {describe([*rows, units])} or {describe(['T', units])}")
    if (reason := why_not_in_pieces(of)) is None:
        print("stream  yes: step by step, with the bits of a whole sequence")
    else:
        print(
            f"stream  no: {reason}\n        stream(window=k) gives at each step what a call on the last k inputs gives"
        )
    print("multiply-adds: of one step of one row, in matrix products; state: of one row")
    return PASSED


def _layer_lines(model: gw.Sequential) -> Iterator[tuple[str, ...]]:
    of = model._chain
    for i, layer in enumerate(model):
        stage = layer._stage
        units = "token" if stage.vocabulary is not None else str(of.sizes[i])
        yield (f"{i} {_name(layer)}", units, str(of.sizes[i + 1]), *_counts([layer], of.dtype), _yes(stage.looks_ahead))


def _name(layer: Any) -> str:
    """A layer in a few words; its sizes stand beside them."""
    if isinstance(layer, (Layer, Bidirectional)):
        return repr(layer)
    options = layer._options()
    shown = [f"{name}={options[name]!r}" for name in ("kernel_size", "dilation", "padding") if name in options]
    kind = layer if isinstance(layer, Activation) else options.get("activation")
    if kind is not None and kind.name != "linear":
        shown.append(kind.name)
    return f"{type(layer).__name__}({', '.join(shown)})"


def _yes(reason: str | None) -> str:
    return "yes" if reason is None else "no"


def _counts(layers: Iterable[Any], dtype: np.dtype[Any]) -> tuple[str, str, str]:
    """Parameters, multiply-adds and bytes of state of some layers together."""
    parameters = products = state = 0
    for layer in layers:
        stage, arrays = layer._stage, layer._holder.weights.arrays.values()
        parameters += layer.num_parameters
        if stage.vocabulary is None:  # of which rows are looked up
            products += sum(array.size for array in arrays if array.ndim > 1)  # each number of a matrix once a step
        if stage.state is not None:
            state += sum(parts * units for parts, units in stage.state.parts()) * dtype.itemsize
    return f"{parameters:,}", f"{products:,}", f"{state:,}"


def _input_kind(of: Chain) -> str:
    return "floating numbers" if of.vocabulary is None else f"whole numbers from 0 to {of.vocabulary - 1}"


# ---- convert and verify


def convert(file: str, output: str) -> int:
    """Write the model of one file to another one, in the format that its ending says."""
    _check_other(output, file)
    gw.save(gw.load(file), output)
    print(f"{output}: {os.path.getsize(output):,} bytes")
    return PASSED


def verify(file: str, original: str) -> int:
    """Compare a model with the one that it was made from."""
    compare: Any = getattr(gw, "verify", None)
    if compare is None:
        raise ValueError(f"gatewise {gw.__version__} cannot verify")
    found = compare(gw.load(file), original)
    windows = "not compared" if found.windows is None else f"{found.windows:.2g}"
    lines = [("sequences", f"{found.sequences:.2g}"), ("windows", windows), ("tolerance", f"{found.tolerance:.2g}")]
    print_table(("", "largest difference"), lines)
    print(f"{file}: {'the same as' if found.passed else 'differs from'} {original}")
    return PASSED if found.passed else FAILED


# ---- run: the sequence that comes in


@dataclass(frozen=True)
class Input:
    """A sequence in a file: so many steps, of so many rows (None: unbatched), taken in pieces of `chunk` steps."""

    path: str
    steps: int
    batch: int | None
    pieces: Callable[[int], Iterator[Array]]


def open_input(path: str, of: Chain, batch_first: bool) -> Input:
    """The sequence in an .npy or .csv file, if it is one for this model."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: expected a file")
    return _npy_input(path, of, batch_first) if _ending(path) == ".npy" else _csv_input(path, of)


def _ending(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".npy", ".csv"):
        raise ValueError(f"{path}: expected a name that ends in .npy or .csv")
    return ending


def _npy_input(path: str, of: Chain, batch_first: bool) -> Input:
    try:
        array: Array = open_memmap(path, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a header is an expression, which may be wrong in many ways
        raise ValueError(f"{path}: expected an array as numpy.save writes it ({error})") from None
    check = partial(floating, dtype=of.dtype) if of.vocabulary is None else partial(tokens, count=of.vocabulary)
    if of.vocabulary is not None and array.dtype.kind not in "iu":
        raise TypeError(f"{path}: expected whole numbers, got {array.dtype}")
    axes = Axes.of(of.units, batch_first, path, array)
    check(path, array[:0])  # its dtype; numbers are looked at as they come
    # Rows without steps have no byte in the file, but each would take memory.
    if axes.steps == 0 and axes.batch > os.path.getsize(path):
        raise ValueError(f"{path}: expected some steps, got none, of {axes.batch} rows")
    axis = _time_axis(batch_first, axes.unbatched)

    def pieces(chunk: int) -> Iterator[Array]:
        for first in range(0, axes.steps, chunk):
            yield array[(slice(None),) * axis + (slice(first, first + chunk),)]

    return Input(path, axes.steps, None if axes.unbatched else axes.batch, pieces)


def _time_axis(batch_first: bool, unbatched: bool) -> int:
    return 1 if batch_first and not unbatched else 0


def _csv_input(path: str, of: Chain) -> Input:
    steps = _count_lines(path)
    at_once = max(LINE_NUMBERS // (of.units[0] if of.units else 1), 1)

    def pieces(chunk: int) -> Iterator[Array]:
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
            for first in range(0, steps, chunk):
                last = min(first + chunk, steps)
                starts = range(first, last, at_once)
                yield np.concatenate([_parse(path, file, start, min(start + at_once, last), of) for start in starts])

    return Input(path, steps, None, pieces)


def _count_lines(path: str) -> int:
    """The lines of a file, however long they are, in little memory."""
    count, end = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**16):
            count, end = count + block.count(b"\n"), block[-1:]
    return count + (end != b"\n")


def _parse(path: str, file: TextIO, first: int, last: int, of: Chain) -> Array:
    """The next lines of a file: of numbers (last - first, I), of tokens (last - first,)."""
    width = of.units[0] if of.units else 1
    longest = width * MOST_CHARACTERS
    lines, rows = [], []
    for number in range(first + 1, last + 1):
        line = file.readline(longest + 1)
        if not line:
            raise ValueError(f"{path}: the file was cut while it was read")
        row = _numbers(line, width, float if of.units else int) if len(line) <= longest else None
        if row is None:
            what = ("a number" if of.units else "a whole number") if width == 1 else f"{width} numbers with commas"
            raise ValueError(f"{path}: line {number}: expected {what}, got {line[:60].rstrip()!r}")
        lines.append(line)
        rows.append(row)
    if not of.units:
        return np.array(rows, np.int64)[:, 0]
    array = np.array(rows)
    for place in np.unique(np.nonzero(_infinite(array, of.dtype))[0]):
        for field in lines[place].split(","):
            if "inf" not in field.lower() and _infinite(np.array(float(field)), of.dtype):
                where = f"{path}: line {first + place + 1}"
                raise ValueError(f"{where}: expected numbers that fit {of.dtype}, got {field.strip()[:60]}")
    return array


def _numbers(line: str, width: int, kind: type) -> list[Any] | None:
    """The numbers of a line; None if they are not so many, or no numbers."""
    if line.count(",") != width - 1 or "_" in line:
        return None
    with suppress(ValueError):
        values = [kind(field) for field in line.split(",")]
        # Tokens that are too large for any vocabulary are refused here, where the line is known.
        if kind is float or -(2**63) <= values[0] < 2**63:
            return values
    return None


def _infinite(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        found: Array = np.isinf(array.astype(dtype))
    return found


# ---- run: the model


def run(
    file: str, input: str, output: str, chunk: int | None, window: int | None, whole: bool, threads: int | None
) -> int:
    """Run a model over the sequence in one file, and write what it gives to another one."""
    _check_other(output, input, file)
    is_csv = _ending(output) == ".csv"
    model = load(file)
    of = model._chain
    reason = why_not_in_pieces(of)
    if reason and not whole and window is None:
        raise ValueError(f"{file}: cannot run in pieces: {reason}; try --whole or --window N")
    given = open_input(input, of, model.batch_first)
    if is_csv and given.batch is not None:
        raise ValueError(f"{output}: expected a name that ends in .npy, since {input} holds several rows")
    with _threads(threads), _progress(given.steps) as advance:
        results = _whole(model, given) if whole else _in_pieces(model, given, chunk, window, advance)
        with _replacing(output) as temporary:
            if is_csv:
                _write_csv(temporary, results)
            else:
                rows = () if given.batch is None else (given.batch,)
                axes = Axes(
                    model.batch_first, given.batch is None, given.steps, 1 if given.batch is None else given.batch
                )
                shape = (*rows, of.output_size) if of.ends_at_last else axes.shape(of.output_size)
                axis = None if of.ends_at_last else _time_axis(model.batch_first, axes.unbatched)
                _write_npy(temporary, shape, of.dtype, axis, results)
    return PASSED


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = gw.get_num_threads()
    if count is not None:
        gw.set_num_threads(count)
    try:
        yield
    finally:
        gw.set_num_threads(before)


def _whole(model: gw.Sequential, given: Input) -> Iterator[Array]:
    if given.steps:
        piece = next(given.pieces(given.steps))
    else:
        rows = () if given.batch is None else (given.batch,)
        piece = _nothing(model, rows)
    with at(given.path):
        y = model(piece)
    yield y


def _nothing(model: gw.Sequential, rows: tuple[int, ...]) -> Array:
    """A sequence without steps."""
    of = model._chain
    axes = Axes(model.batch_first, not rows, 0, rows[0] if rows else 1)
    return np.empty((*axes.leading, *of.units), of.dtype if of.units else np.int64)


def _in_pieces(
    model: gw.Sequential, given: Input, chunk: int | None, window: int | None, advance: Callable[[int], None]
) -> Iterator[Array]:
    """The outputs of piece after piece; of a model that ends at the last step, that one alone."""
    of = model._chain
    if given.steps == 0 or given.batch == 0:  # what the last step gives then, the call knows
        yield from _whole(model, given)
        return
    stream = model.stream(given.batch, window=window)
    widest = max(*of.sizes, *(units for _, units in of.parts), 1) * (given.batch or 1)
    size = chunk or min(max(PIECE // widest, 1), 4096)
    axis, first = _time_axis(model.batch_first, given.batch is None), 0
    for piece in given.pieces(size):
        steps = piece.shape[axis]
        with at(f"{given.path}: steps {first} to {first + steps - 1}"):
            y = stream.run(piece)
        if not of.ends_at_last:
            yield y
        first += steps
        advance(steps)
    if of.ends_at_last:
        yield y[(slice(None),) * axis + (-1,)]


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; what comes is told of each piece's steps."""
    try:
        if not sys.stderr.isatty():
            raise ModuleNotFoundError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ModuleNotFoundError:
        yield lambda _: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), "steps", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield partial(bar.advance, task)


# ---- run: the output


def _check_other(output: str, *inputs: str) -> None:
    """No file is overwritten by what is made from it."""
    for path in inputs:
        with suppress(FileNotFoundError):  # said later, by who reads it
            if os.path.samefile(path, output):
                raise ValueError(f"{output}: expected another file than {path}")


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A file to write, in the folder of `path`, that takes its place at the end; on any exception it is gone."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: expected a file, or nothing yet")
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target), f".gatewise.{secrets.token_hex(8)}")
    try:
        try:
            with open(temporary, "xb"):
                pass
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
            yield temporary
            os.replace(temporary, target)
        except OSError as error:
            if error.filename == temporary:  # which nobody knows
                error.filename = path
            raise
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_npy(
    path: str, shape: tuple[int, ...], dtype: np.dtype[Any], axis: int | None, results: Iterable[Array]
) -> None:
    """Results one after the other along the axis of time; axis None: one for all."""
    target = open_memmap(path, "w+", dtype, shape)
    _reserve(path)
    first = 0
    for y in results:
        if axis is None:
            target[...] = y
        else:
            last = first + y.shape[axis]
            target[(slice(None),) * axis + (slice(first, last),)] = y
            first = last
    target.flush()


def _reserve(path: str) -> None:
    """Space for all of a file: a full disk is an error here, and would be a crash where its memory is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None


def _write_csv(path: str, results: Iterable[Array]) -> None:
    """A line a step, with as many digits as give the same numbers again."""
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for y in results:
            file.writelines(",".join(map(str, row)) + "\n" for row in np.atleast_2d(y))


# ---- bench


def bench(
    file: str | None,
    peers: Sequence[str] | None,
    steps: int,
    batch: int,
    block: int,
    window: int | None,
    threads: int | None,
) -> int:
    """Time a step, a block of steps and a sequence, here and in ONNX Runtime; without a file, run the benchmarks."""
    if file is None:
        return _bench_peers(peers or ())
    with _threads(threads):
        model = load(file)
        of = model._chain
        threads_used = gw.get_num_threads()
        with_threads = "1 thread" if threads_used == 1 else f"{threads_used} threads"
        print(f"{file}: {_described(of)}; backend {gw.backend()}, {with_threads}")
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
    return PASSED


def _bench_peers(arguments: Sequence[str]) -> int:
    """Run the benchmarks that are installed with gatewise; the first arguments may be names of peers."""
    if find_spec("gatewise.benchmarks") is None:  # gatewise comes from a source tree
        raise ValueError("--peers: there are no benchmarks in this installation; try: python -m benchmarks")
    harness = import_module("gatewise.benchmarks.__main__")
    has_names = bool(arguments) and not arguments[0].startswith("-")
    status: int = harness.main(["--peers", *arguments] if has_names else list(arguments), "gatewise bench --peers")
    return status


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


COMMANDS: dict[str, Callable[..., int]] = {
    "info": info,
    "convert": convert,
    "verify": verify,
    "run": run,
    "bench": bench,
}
