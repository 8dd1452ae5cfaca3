"""`gatewise run`: a model over the sequence in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import Array
from gatewise.arguments.axes import Axes
from gatewise.cli.inputs import Input, ending_of, open_input, time_axis
from gatewise.cli.models import load, threads_set, why_not_in_pieces
from gatewise.cli.outputs import check_other, replacing, write_csv, write_npy
from gatewise.formats.errors import at

PIECE = 2**20  # numbers in the widest place of a piece: a few MB


def run(
    file: str, input: str, output: str, chunk: int | None, window: int | None, whole: bool, threads: int | None
) -> int:
    """Run a model over the sequence in one file, and write what it gives to another one."""
    check_other(output, input, file)
    is_csv = ending_of(output) == ".csv"
    model = load(file)
    of = model._chain
    reason = why_not_in_pieces(of)
    if reason and not whole and window is None:
        raise ValueError(f"{file}: cannot run in pieces: {reason}; try --whole or --window N")
    given = open_input(input, of, model.batch_first)
    if is_csv and given.batch is not None:
        raise ValueError(f"{output}: expected a name that ends in .npy, since {input} holds several rows")
    with threads_set(threads), _progress(given.steps) as advance:
        results = _whole(model, given) if whole else _in_pieces(model, given, chunk, window, advance)
        with replacing(output) as temporary:
            if is_csv:
                write_csv(temporary, results)
            else:
                rows = () if given.batch is None else (given.batch,)
                axes = Axes(
                    model.batch_first, given.batch is None, given.steps, 1 if given.batch is None else given.batch
                )
                shape = (*rows, of.output_size) if of.ends_at_last else axes.shape(of.output_size)
                axis = None if of.ends_at_last else time_axis(model.batch_first, axes.unbatched)
                write_npy(temporary, shape, of.dtype, axis, results)
    return 0


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
    axis, first = time_axis(model.batch_first, given.batch is None), 0
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
