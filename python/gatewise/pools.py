"""Pools: many streams of one layer, each at its own pace, that advance together in one call."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from gatewise import _core
from gatewise.arrays import Array, as_array, describe, exact, floating, output, shaped, whole_number
from gatewise.layouts import Layout, State
from gatewise.parameters import MOST, MOST_BYTES, Architecture, Holder


class Pool(_core.Pool):
    """Room for a number of states, with one copy of the weights that the layer had when the pool was made.

    `step(x, slots, out)` advances just the slots that are named, in one call; the others stay as they are. The bits of
    a slot do not depend on who shares the call: they are those of a stream of its own. It allocates nothing; when the
    call is long, other Python threads run meanwhile, and it uses several itself.

    A pool serves one thread at a time; a second one that comes meanwhile gets a RuntimeError.
    """

    def __init__(self, holder: Holder, architecture: Architecture, capacity: int) -> None:
        if architecture.bidirectional:
            raise ValueError("pool: expected one direction; a bidirectional layer needs the end of the sequence first")
        self._architecture = of = architecture
        self._holder = holder
        # Two copies of each state, and what else a slot needs.
        slot = 2 * of.num_layers * (of.recurrent_size + of.hidden_size) * of.dtype.itemsize + 17
        self._most = min(MOST, MOST_BYTES // slot)
        super().__init__(holder.weights.packed(), whole_number("capacity", capacity, 1, self._most))

    @property
    def slots(self) -> list[int]:
        """The open ones."""
        return self._open_slots

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open_slots)

    def __bool__(self) -> bool:
        return True  # a pool without open slots is not nothing

    def open(self) -> int:
        """Open a slot, with a state of zero, and return its number: the lowest that is free."""
        slot = self._open()
        if slot < 0:
            raise ValueError(f"open: expected a free slot, got {self.capacity} that are all open; grow(n) makes more")
        return slot

    def close(self, slot: int) -> None:
        """Close a slot; its number goes to one that is opened later."""
        self._close(_slot(slot))

    def grow(self, more: int) -> None:
        """Make room for so many more slots."""
        self._grow(whole_number("more", more, 0, MOST), self._most)

    def reset(self, slots: object) -> None:
        """Set the state of a slot, or of several, to zero."""
        array = _slots(slots)
        if array.ndim > 1:
            raise ValueError(f"slots: expected a slot or a list of them, got shape {describe(array.shape)}")
        self._reset(array.reshape(-1).tolist())

    def state(self, slot: int) -> State:
        """A copy of the state of a slot: (h, c) for LSTM, h for the others, (L, H), as that of an unbatched stream."""
        layout = self._layout()
        hidden, cell = layout.new_state()
        self._get_state(_slot(slot), hidden, cell)
        return layout.state_out(hidden, cell)

    def set_state(self, slot: int, state: object) -> None:
        """Copy a state into a slot, in the shapes in which `state` gives it."""
        if state is None:
            raise TypeError("state: expected a state, got None; reset() sets it to zero")
        hidden, cell = self._layout().state_in("state", state)
        assert hidden is not None
        self._set_state(_slot(slot), hidden, cell)

    def refresh(self) -> None:
        """Take the layer's present weights; the states stay."""
        self._use(self._holder.weights.packed())

    def _layout(self) -> Layout:
        return Layout(self._architecture, False, True, 0, 1)

    def _prepare_step(self, x: object, slots: object, out: object) -> tuple[Array, Array, Array]:
        """For the C method `step`: arguments that it cannot use as they are, made fit, or why they cannot be."""
        of = self._architecture
        named = shaped("slots", _slots(slots), ("n",))
        leading = named.shape[0]
        if out is None:
            array = shaped("x", floating("x", x, of.dtype), (leading, of.input_size))
            return (
                np.require(array, requirements=["C", "A"]), named, np.empty((leading, of.output_size), of.dtype),
            )  # fmt: skip
        array = shaped("x", exact("x", x, of.dtype), (leading, of.input_size))
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise ValueError(f"x: expected a C-contiguous array with `out`, got strides {array.strides}")
        return array, named, output("out", out, of.dtype, (leading, of.output_size), ("x", array), ("slots", named))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool cannot be pickled or copied; copy its states with state() and set_state()")

    def __deepcopy__(self, memory: dict[int, Any]) -> NoReturn:
        self.__reduce__()

    __copy__ = __reduce__

    def __repr__(self) -> str:
        of = self._architecture
        sizes = describe((of.input_size, of.hidden_size))
        return f"Pool({of.cell} {sizes}, layers={of.num_layers}, capacity={self.capacity}, {of.dtype})"


def _slots(slots: object) -> Array:
    """As int64, C-contiguous."""
    array = as_array("slots", slots)
    if array.dtype.kind not in "iuO" and array.size:
        raise TypeError(f"slots: expected whole numbers, got {array.dtype}")
    for one in array.flat if array.dtype.kind in "uO" else ():
        if whole_number("slots", one, -(2**80), 2**80) > MOST:
            raise ValueError(f"slots: expected open slots, each once, got {one}, which is unknown")
    # Of NumPy's two types of 64 bits the one that it calls int64.
    return np.require(array.astype(np.int64).view(np.int64), requirements=["C", "A"])


def _slot(slot: object) -> int:
    return whole_number("slot", slot, -(2**62), 2**62)
