"""`gatewise run`: run a model over the sequence in a file.

The sequence goes from file to file in chunks of some steps, so that its length costs no memory:

    x.npy or x.csv -> chunks (T, I) -> model.stream().run -> (T, O) -> a new file, which takes the output's place
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import Array
from gatewise.cli.inputs import SequenceFile, ending_of, open_sequence, time_axis
from gatewise.cli.models import load_model, streaming_obstacles, using_threads
from gatewise.cli.outputs import check_is_other, write_csv, write_npy
from gatewise.formats.errors import at
from gatewise.formats.files import replacing

CHUNK_NUMBERS = 2**20  # in the widest layer of a chunk: a few MB
MAX_CHUNK = 4096  # steps, by default


def run(
    file: str, input: str, output: str, chunk: int | None, window: int | None, whole: bool, threads: int | None
) -> int:
    """Run a model over the sequence in one file, and write its output to another one."""
    check_is_other(output, input, file)
    is_csv = ending_of(output) == ".csv"
    model = load_model(file)
    chain = model._chain
    obstacles = streaming_obstacles(chain)
    if obstacles and not whole and window is None:
        raise ValueError(f"{file}: cannot run in chunks: {obstacles}; try --whole or --window N")
    sequence = open_sequence(input, chain, model.batch_first)
    axes = sequence.axes
    if is_csv and not axes.unbatched:
        raise ValueError(f"{output}: expected a name that ends in .npy, since {input} holds several rows")
    with using_threads(threads), _progress(axes.steps) as advance:
        results = _run_whole(model, sequence) if whole else _run_in_chunks(model, sequence, chunk, window, advance)
        with replacing(output) as temporary:
            if is_csv:
                write_csv(temporary.name, results)
            elif chain.ends_at_last:
                write_npy(temporary.name, (*axes.rows, chain.output_size), chain.dtype, None, results)
            else:
                write_npy(temporary.name, axes.shape(chain.output_size), chain.dtype, time_axis(axes), results)
    return 0


def _run_whole(model: gw.Sequential, sequence: SequenceFile) -> Iterator[Array]:
    chain, axes = model._chain, sequence.axes
    if axes.steps:
        x = next(sequence.chunks(axes.steps))
    else:
        x = np.empty((*axes.leading, *chain.units), chain.dtype if chain.units else np.int64)
    with at(sequence.path):
        y = model(x)
    yield y


def _run_in_chunks(
    model: gw.Sequential, sequence: SequenceFile, size: int | None, window: int | None, advance: Callable[[int], None]
) -> Iterator[Array]:
    """The output of each chunk; of a model that ends at the last step, only the output of that step."""
    chain, axes = model._chain, sequence.axes
    if axes.steps == 0 or axes.batch == 0:  # only the model's call says what a sequence without steps gives
        yield from _run_whole(model, sequence)
        return
    stream = model.stream(None if axes.unbatched else axes.batch, window=window)
    widest = max(*chain.sizes, *(units for _, units in chain.parts), 1) * axes.batch
    axis, start = time_axis(axes), 0
    for x in sequence.chunks(size or min(max(CHUNK_NUMBERS // widest, 1), MAX_CHUNK)):
        steps = x.shape[axis]
        with at(f"{sequence.path}: steps {start} to {start + steps - 1}"):
            y = stream.run(x)
        if not chain.ends_at_last:
            yield y
        start += steps
        advance(steps)
    if chain.ends_at_last:
        yield y[(slice(None),) * axis + (-1,)]


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if that is a terminal and Rich is installed; the function moves it on by some steps."""
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
