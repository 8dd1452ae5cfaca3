"""Models: recurrent layers and other layers, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array, as_array, empty, flag, output, rows
from gatewise.arguments.axes import Axes
from gatewise.arguments.sequences import schedule_of, whole_lengths, zero_tail
from gatewise.layers.block import Block
from gatewise.layers.layer import Layer
from gatewise.running.network import Chain
from gatewise.running.pools import Streamable
from gatewise.running.streams import sequence_input
from gatewise.weights.module import Module
from gatewise.weights.parameters import swap_lock


class Sequential(Module, Streamable):
    """Layers one after the other, for inference: over whole sequences, step by step, in streams and pools.

        model = gw.Sequential([gw.Embedding(1000, 64), gw.LSTM(64, 128), gw.Dense(128, 10, activation="softmax")])
        y = model(tokens)

    Parameters
    ----------
    layers : iterable of layers
        LSTM, GRU, RNN, Bidirectional; Dense, Activation, Embedding, Conv1D, LayerNorm, BatchNorm, Normalization,
        Dropout, TimeDistributed, Masking, Reverse, Last. All have one dtype. The model has these layers, not copies.
    batch_first : bool, optional
        Whether sequences are (B, T, ...) instead of (T, B, ...). The default is what the recurrent layers have, which
        must agree, or False if there are none.
    """

    def __init__(self, layers: Iterable[Module], *, batch_first: bool | None = None) -> None:
        try:
            unchecked = tuple(layers)
        except TypeError:
            raise TypeError(f"layers: expected several layers, got {type(layers).__name__}") from None
        if not unchecked:
            raise ValueError("layers: expected at least one layer, got an empty sequence")
        for i, layer in enumerate(unchecked):
            if not isinstance(layer, (Layer, Block)):
                raise TypeError(f"layers[{i}]: expected a layer, got {type(layer).__name__}")
        _check_distinct(unchecked)
        self._layers: tuple[Layer | Block, ...] = unchecked  # type: ignore[assignment]  # as was just checked
        self._batch_first = _batch_first(self._layers, batch_first)
        stages, slots = [layer._stage for layer in self._layers], [layer._slot for layer in self._layers]
        self._own_chain = Chain(stages, slots, is_model=True)  # caches its networks

    @property
    def _chain(self) -> Chain:
        return self._own_chain

    @property
    def layers(self) -> tuple[Any, ...]:
        return self._layers

    @property
    def batch_first(self) -> bool:
        return self._batch_first

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._chain.dtype

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int | slice) -> Any:
        """A layer; for a slice, a model of the same layers."""
        if isinstance(index, slice):
            return Sequential(self._layers[index], batch_first=self._batch_first)
        return self._layers[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __repr__(self) -> str:
        lines = "".join(f"  ({i}): {layer!r}\n" for i, layer in enumerate(self._layers))
        return f"Sequential(\n{lines})"

    # -- weights ------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, Array]:
        return {f"{i}.{name}": array for i, layer in enumerate(self._layers) for name, array in layer._arrays().items()}

    def _swap(self, changes: Mapping[str, object]) -> None:
        changes_of_layer: dict[int, dict[str, object]] = {}
        known = self._arrays()
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}")
            index, _, name_in_layer = name.partition(".")
            changes_of_layer.setdefault(int(index), {})[name_in_layer] = value
        copies = []
        for i, layer_changes in changes_of_layer.items():
            slot = self._layers[i]._slot
            try:
                copies.append((slot, slot.weights.checked(layer_changes)))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{i}.{error}") from None
        with swap_lock():  # all of them fit, and no other thread sees only some of them
            for slot, checked in copies:
                slot.put(checked)

    # -- calls --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: object,
        state: object = None,
        *,
        lengths: object = None,
        resets: object = None,
        out: Array | None = None,
        return_state: bool = False,
    ) -> Any:
        """Run over a whole sequence.

        Parameters
        ----------
        x : array_like
            (T, B, I), with batch_first (B, T, I), or unbatched (T, I), of any real floating dtype; whole numbers
            without the last axis if the first layer is an Embedding.
        state : tuple, optional
            One entry for each layer that has a state, in their order, as `return_state` gives them: what a recurrent
            layer takes, (h, c) or h; the last inputs of a causal Conv1D, ((kernel_size - 1) * dilation, B, channels).
            None is zero.
        lengths : array_like of integers, optional
            (B,), unbatched (): how many steps each row has. What x holds after a row's end does not matter, and the
            output there is zero.
        resets : array_like of bools or of numbers that are 0 or 1, optional
            (T, B) in the order of x's axes, unbatched (T,): where all state is set to zero before the step. A model in
            which a layer leaves steps out or changes their order takes no resets.
        out : ndarray, optional
            Where to write the output: C-contiguous, writable, of the model's dtype and memory of its own. x must then
            have exactly the model's dtype, unless it consists of tokens.
        return_state : bool
            Whether to return the states after the last step, too.

        Returns
        -------
        output : ndarray
            (T, B, O) in the order of x's axes; (B, O), unbatched (O,), if there is a Last among the layers.
        state : tuple
            Only with `return_state`.
        """
        chain = self._chain
        returns_state = flag("return_state", return_state)
        array = self._input(x, lengths, out is not None)
        axes = Axes.of(chain.units, self._batch_first, "x", array)
        before = [None] * len(chain.parts) if state is None else chain.state_in("state", state, axes.rows)
        shape = (*axes.rows, chain.output_size) if chain.ends_at_last else axes.shape(chain.output_size)
        if out is None:
            y = empty(shape, chain.dtype)
        else:
            states = zip(chain.part_names("state"), before, strict=True)
            y = output("out", out, chain.dtype, shape, ("x", array), *states)
        if resets is not None and chain.refuses_resets:
            raise ValueError(chain.refuses_resets)
        schedule, steps = schedule_of(axes, lengths, resets)
        steps_in = axes.to_time_major(array)[:steps]
        if chain.ends_at_last:
            steps_out = y.reshape(1, axes.batch, chain.output_size)
        else:
            steps_out = zero_tail(axes.to_time_major(y), steps)
        after = chain.new_parts((axes.batch,))
        network = chain.network(chain.weights(), "call")
        x_rows = rows(steps_in) if chain.units else np.ascontiguousarray(steps_in)
        network.forward(x_rows, before, steps_out, after, schedule)
        if not returns_state:
            return y
        return y, chain.state_out(after if axes.rows else [part[:, 0] for part in after])

    def _input(self, x: object, lengths: object, is_exact: bool) -> Array:
        """x as the core takes it. After a row's end it may hold anything, also numbers that are not tokens."""
        chain = self._chain
        if chain.vocabulary is None or lengths is None:
            return sequence_input(chain, x, is_exact)
        array = as_array("x", x)
        if array.dtype.kind not in "iu":
            return sequence_input(chain, array, is_exact)
        axes = Axes.of((), self._batch_first, "x", array)
        row_lengths = whole_lengths(lengths, axes.rows, axes.steps).reshape(axes.batch)
        array = array.copy()
        axes.to_time_major(array)[np.arange(axes.steps)[:, None] >= row_lengths] = 0
        return sequence_input(chain, array, is_exact)

    def __copy__(self) -> Sequential:
        return Sequential([copy(layer) for layer in self._layers], batch_first=self._batch_first)


def _check_distinct(layers: Iterable[Module]) -> None:
    """A layer in two places would have its weights under two names, and one of them would prevail."""
    seen: dict[int, int] = {}
    for i, layer in enumerate(layers):
        first = seen.setdefault(id(layer._slot), i)
        if first != i and layer._arrays():
            raise ValueError(f"layers[{i}]: expected another layer, got layers[{first}] again; copy.copy makes one")


def _batch_first(layers: Iterable[Layer | Block], argument: bool | None) -> bool:
    """The argument, or what the recurrent layers have, which must agree."""
    expected, source = argument if argument is None else flag("batch_first", argument), "passed to Sequential"
    for i, outer in enumerate(layers):
        layer = getattr(outer, "layer", outer)  # inside Bidirectional
        if not isinstance(layer, Layer):
            continue
        if expected is not None and layer.batch_first != expected:
            raise ValueError(f"layers[{i}]: expected batch_first={expected}, as {source}, got {layer!r}")
        expected, source = layer.batch_first, f"layers[{i}] has it"
    return bool(expected)
