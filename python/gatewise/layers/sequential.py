"""Models: recurrent layers and what stands around them, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array, as_array, empty, flag, output, rows
from gatewise.arguments.axes import Axes
from gatewise.arguments.sequences import plan, whole_lengths
from gatewise.layers.activation import Block
from gatewise.layers.recurrent import Layer
from gatewise.running.network import Chain
from gatewise.running.pools import Live
from gatewise.running.streams import sequence_input
from gatewise.weights.module import Module, checked_names
from gatewise.weights.parameters import Parameters, one_at_a_time


class Sequential(Live):
    """Layers one after the other, for inference: over whole sequences, step by step, in streams and pools.

        model = gw.Sequential([gw.Embedding(1000, 64), gw.LSTM(64, 128), gw.Dense(128, 10, activation="softmax")])
        y = model(tokens)

    Parameters
    ----------
    layers : iterable of layers
        LSTM, GRU, RNN, Bidirectional; Dense, Activation, Embedding, Conv1D, LayerNorm, BatchNorm, Normalization,
        Dropout, TimeDistributed, Masking, Reverse, Last. All of one dtype. They are kept, not copied.
    batch_first : bool, optional
        Whether sequences are (B, T, ...) instead of (T, B, ...). By default as the recurrent layers have it, which must
        agree; False where there are none.
    """

    def __init__(self, layers: Iterable[Module], *, batch_first: bool | None = None) -> None:
        try:
            given = tuple(layers)
        except TypeError:
            raise TypeError(f"layers: expected several layers, got {type(layers).__name__}") from None
        if not given:
            raise ValueError("layers: expected one layer at least, got none")
        for i, layer in enumerate(given):
            if not isinstance(layer, (Layer, Block)):
                raise TypeError(f"layers[{i}]: expected a layer, got {type(layer).__name__}")
        _check_once(given)
        self._layers: tuple[Layer | Block, ...] = given  # type: ignore[assignment]  # as was just asked
        self._batch_first = _batch_first(self._layers, batch_first)
        stages, holders = [one._stage for one in self._layers], [one._holder for one in self._layers]
        self._whole = Chain(stages, holders, alone=False)  # with the networks that were made of it

    @property
    def _chain(self) -> Chain:
        return self._whole

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
        """A layer; of a slice, a model of the same layers."""
        if isinstance(index, slice):
            return Sequential(self._layers[index], batch_first=self._batch_first)
        return self._layers[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def __repr__(self) -> str:
        inside = "".join(f"  ({i}): {layer!r}\n" for i, layer in enumerate(self._layers))
        return f"Sequential(\n{inside})"

    # -- its weights --------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> Parameters:
        """The weights of all layers, as PyTorch names them: "0.weight_ih_l0". Assign to change them."""
        return Parameters(self._arrays, self._swap)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights of all layers are."""
        return sum(layer.num_parameters for layer in self._layers)

    def _arrays(self) -> dict[str, Array]:
        return {
            f"{i}.{name}": array
            for i, layer in enumerate(self._layers)
            for name, array in layer._holder.weights.arrays.items()
        }

    def _swap(self, changes: Mapping[str, object]) -> None:
        of_layer: dict[int, dict[str, object]] = {}
        known = self._arrays()
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}")
            index, _, own = name.partition(".")
            of_layer.setdefault(int(index), {})[own] = value
        copies = []
        for i, its_own in of_layer.items():
            holder = self._layers[i]._holder
            try:
                copies.append((holder, holder.weights.checked(its_own)))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{i}.{error}") from None
        with one_at_a_time():  # all of them fit; nobody sees some of them alone
            for holder, checked in copies:
                holder.take(checked)

    @contextmanager
    def edit(self) -> Iterator[dict[str, Array]]:
        """Writable copies of all weights, swapped in at the end; on an exception nothing changes."""
        copies = self.state_dict()
        yield copies
        self.load_state_dict(copies)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights by name, in the order of the layers."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state_dict(self, mapping: Mapping[str, object]) -> None:
        """Take all weights from a mapping of name to array (or tensor): all of them, or on an error none."""
        self._swap(checked_names(mapping, self._arrays()))

    # -- its work -----------------------------------------------------------------------------------------------

    def __call__(
        self, x: object, state: object = None, *, lengths: object = None, resets: object = None,
        out: Array | None = None, return_state: bool = False,
    ) -> Any:  # fmt: skip
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
            (B,), unbatched (): how many steps each row has. What x holds behind a row's end does not matter, and the
            output there is zero.
        resets : array_like of bools or of numbers that are 0 or 1, optional
            (T, B) in the order of x's axes, unbatched (T,): where all state is set to zero before the step. Not where
            a layer leaves steps out or changes their order.
        out : ndarray, optional
            Where to write the output: C-contiguous, writable, of the model's dtype and memory of its own. x must then
            have exactly the model's dtype, if it is no tokens.
        return_state : bool
            Whether to return the states after the last step, too.

        Returns
        -------
        output : ndarray
            (T, B, O) in the order of x's axes; (B, O), unbatched (O,), if there is a Last among the layers.
        state : tuple
            Only with `return_state`.
        """
        of = self._chain
        returns = flag("return_state", return_state)
        array = self._input(x, lengths, out is not None)
        axes = Axes.of(of.units, self._batch_first, "x", array)
        before = [None] * len(of.parts) if state is None else of.state_in("state", state, axes.rows)
        shape = (*axes.rows, of.output_size) if of.ends_at_last else axes.shape(of.output_size)
        if out is None:
            y = empty(shape, of.dtype)
        else:
            states = zip(of.part_names("state"), before, strict=True)
            y = output("out", out, of.dtype, shape, ("x", array), *states)
        if resets is not None and of.refuses_resets:
            raise ValueError(of.refuses_resets)
        timetable, steps = plan(axes, lengths, resets)
        given = axes.to_time_major(array)[:steps]
        if of.ends_at_last:
            written = y.reshape(1, axes.batch, of.output_size)
        else:
            whole = axes.to_time_major(y)
            whole[steps:] = 0
            written = whole[:steps]
        after = of.new_parts((axes.batch,))
        network = of.network(of.weights(), "call")
        network.forward(rows(given) if of.units else np.ascontiguousarray(given), before, written, after, timetable)
        if not returns:
            return y
        return y, of.state_out(after if axes.rows else [part[:, 0] for part in after])

    def _input(self, x: object, lengths: object, is_exact: bool) -> Array:
        """x as the core takes it. What it holds behind a row's end does not matter, even if it is no token."""
        of = self._chain
        if of.vocabulary is None or lengths is None:
            return sequence_input(of, x, is_exact)
        array = as_array("x", x)
        if array.dtype.kind not in "iu":
            return sequence_input(of, array, is_exact)
        axes = Axes.of((), self._batch_first, "x", array)
        ends = whole_lengths(lengths, axes.rows, axes.steps).reshape(axes.batch)
        behind = np.arange(axes.steps)[:, None] >= ends
        array = array.copy()
        axes.to_time_major(array)[behind] = 0
        return sequence_input(of, array, is_exact)

    def __copy__(self) -> Sequential:
        return Sequential([copy(layer) for layer in self._layers], batch_first=self._batch_first)


def _check_once(layers: Iterable[Module]) -> None:
    """One layer in two places would have its weights under two names, one of which would prevail."""
    seen: dict[int, int] = {}
    for i, layer in enumerate(layers):
        first = seen.setdefault(id(layer._holder), i)
        if first != i and layer._holder.weights.arrays:
            raise ValueError(
                f"layers[{i}]: expected a layer of its own, got layers[{first}] again; copy.copy makes one"
            )


def _batch_first(layers: Iterable[Layer | Block], wanted: bool | None) -> bool:
    found, whose = wanted if wanted is None else flag("batch_first", wanted), "given"
    for i, one in enumerate(layers):
        layer = getattr(one, "layer", one)  # of Bidirectional
        if not isinstance(layer, Layer):
            continue
        if found is not None and layer.batch_first != found:
            raise ValueError(f"layers[{i}]: expected batch_first={found}, as {whose}, got {layer!r}")
        found, whose = layer.batch_first, f"layers[{i}] has it"
    return bool(found)
