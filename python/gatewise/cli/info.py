"""`gatewise info`: say what this installation is, or a model in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import gatewise as gw
from gatewise.arguments.arrays import describe
from gatewise.cli.models import load_model, streaming_obstacles, summary
from gatewise.cli.tables import print_table
from gatewise.layers.activation import Activation
from gatewise.layers.layer import Layer
from gatewise.layers.structure import Bidirectional
from gatewise.running.network import Chain

HEADER = ("layer", "input", "output", "parameters", "multiply-adds", "state bytes", "streams")


def info(file: str | None) -> int:
    """Print the model in a file; without a file, this installation."""
    if file is None:
        gw.show_config()
        return 0
    model = load_model(file)
    chain = model._chain
    print(f"{file}: {summary(chain)}, {'batch' if model.batch_first else 'time'} first\n")
    total = ("together", "", "", *_counts(model.layers, chain.dtype), _yes_or_no(chain.streaming_obstacle))
    print_table(HEADER, [*_layer_lines(model), total])
    print()
    _print_shapes(chain, model.batch_first)
    obstacles = streaming_obstacles(chain)
    if obstacles is None:
        print("stream  yes: step by step, with the bits of a whole sequence")
    else:
        print(f"stream  no: {obstacles}")
        print("        stream(window=k) gives at each step what a call on the last k inputs gives")
    print("multiply-adds: of one step of one row, in matrix products; state: of one row")
    return 0


def _print_shapes(chain: Chain, batch_first: bool) -> None:
    leading = ["B", "T"] if batch_first else ["T", "B"]
    numbers = "floating numbers" if chain.vocabulary is None else f"whole numbers from 0 to {chain.vocabulary - 1}"
    print(f"input   {describe([*leading, *chain.units])} or {describe(['T', *chain.units])}, {numbers}")
    size = chain.output_size
    if chain.ends_at_last:
        print(f"output  {describe(['B', size])} or {describe([size])}: of the last step")
    else:
        print(f"output  {describe([*leading, size])} or {describe(['T', size])}")


def _layer_lines(model: gw.Sequential) -> Iterator[tuple[str, ...]]:
    chain = model._chain
    for i, layer in enumerate(model):
        stage = layer._stage
        input_size = "token" if stage.vocabulary is not None else str(chain.sizes[i])
        counts = _counts([layer], chain.dtype)
        yield f"{i} {_name(layer)}", input_size, str(chain.sizes[i + 1]), *counts, _yes_or_no(stage.streaming_obstacle)


def _name(layer: Any) -> str:
    """The kind of a layer and its options, but not its sizes, which have columns of their own."""
    if isinstance(layer, (Layer, Bidirectional)):
        return repr(layer)
    options = layer._options()
    parts = [f"{name}={options[name]!r}" for name in ("kernel_size", "dilation", "padding") if name in options]
    function = layer if isinstance(layer, Activation) else options.get("activation")
    if function is not None and function.name != "linear":
        parts.append(function.name)
    return f"{type(layer).__name__}({', '.join(parts)})"


def _yes_or_no(obstacle: str | None) -> str:
    return "yes" if obstacle is None else "no"


def _counts(layers: Iterable[Any], dtype: np.dtype[Any]) -> tuple[str, str, str]:
    """Parameters, multiply-adds and bytes of state of some layers together."""
    num_parameters = multiply_adds = state_bytes = 0
    for layer in layers:
        stage, arrays = layer._stage, layer._slot.weights.arrays.values()
        num_parameters += layer.num_parameters
        if stage.vocabulary is None:  # an embedding looks its rows up
            multiply_adds += sum(array.size for array in arrays if array.ndim > 1)  # each entry of a matrix once a step
        if stage.state is not None:
            state_bytes += sum(count * units for count, units in stage.state.parts()) * dtype.itemsize
    return f"{num_parameters:,}", f"{multiply_adds:,}", f"{state_bytes:,}"
