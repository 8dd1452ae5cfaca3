"""`gatewise info`: what this installation is, or a model in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import describe
from gatewise.cli.models import described, load, why_not_in_pieces
from gatewise.cli.tables import print_table
from gatewise.layers.activation import Activation
from gatewise.layers.blocks import Bidirectional
from gatewise.layers.recurrent import Layer
from gatewise.running.network import Chain


def info(file: str | None) -> int:
    """Print what a file holds; without one, what this installation is."""
    if file is None:
        gw.show_config()
        return 0
    model = load(file)
    of = model._chain
    print(f"{file}: {described(of)}, {'batch' if model.batch_first else 'time'} first\n")
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
    return 0


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
