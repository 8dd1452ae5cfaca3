"""Pools: many streams of one layer, each at its own pace, that advance together in one call."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import MAX_BYTES, MAX_SIZE, Array, as_array, describe, output, shaped, whole_number
from gatewise.running.network import Chain
from gatewise.running.streams import Stream, refuse_two_bases, step_input


class Pool(_core.Pool):
    """Room for a number of states, with one copy of the weights that its layer or model had when the pool was made.

    `step(x, slots, out)` advances only the slots that are named, in one call; the others stay as they are. The bits of
    a slot do not depend on which slots share the call: they are those of a separate stream. A step allocates nothing.
    During a long step other Python threads run, and the step uses several threads itself.

    A pool serves one thread at a time; a second one that comes meanwhile gets a RuntimeError. So does the child of a
    process that forked during a step in another thread, until it has reset the slots of that step.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_two_bases(cls)

    def __init__(self, chain: Chain, capacity: int) -> None:
        if chain.streaming_obstacle:
            raise ValueError(f"pool: {chain.streaming_obstacle}")
        self._chain = chain
        # A slot has two copies of its state, and 25 bytes besides.
        self._most = min(MAX_SIZE, 2 * MAX_BYTES // (2 * chain.state_bytes + 25))
        network = chain.network(chain.weights(), "steps")
        super().__init__(network, whole_number("capacity", capacity, 1, self._most))

    @property
    def slots(self) -> list[int]:
        """The numbers of the open slots."""
        return self._open_slots

    def __len__(self) -> int:
        """How many slots are open."""
        return len(self._open_slots)

    def __bool__(self) -> bool:
        return True  # also without open slots

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
        """Make room for `more` slots besides those that there are."""
        self._grow(whole_number("more", more, 0, MAX_SIZE), self._most)

    def reset(self, slots: object) -> None:
        """Set the state of a slot, or of several, to zero."""
        array = _slots(slots)
        if array.ndim > 1:
            raise ValueError(f"slots: expected a slot or a list of them, got shape {describe(array.shape)}")
        self._reset(array.reshape(-1).tolist())

    def state(self, slot: int) -> Any:
        """A copy of the state of a slot: (h, c) for LSTM, h for the others, (L, H), as that of an unbatched stream."""
        parts = self._chain.new_parts(())
        self._get_state(_slot(slot), parts)
        return self._chain.state_out(parts)

    def set_state(self, slot: int, state: object) -> None:
        """Copy a state into a slot, in the shapes in which `state` gives it."""
        if state is None:
            raise TypeError("state: expected a state, got None; reset() sets it to zero")
        parts = self._chain.state_in("state", state, ())
        self._set_state(_slot(slot), parts)

    def refresh(self) -> None:
        """Take the present weights of its layer or model; the states stay."""
        self._use(self._chain.network(self._chain.weights(), "steps"))

    def _prepare_step(self, x: object, slots: object, out: object) -> tuple[Array, Array, Array]:
        """Convert arguments that the C method `step` cannot use as they are, or say what is wrong with them."""
        chain = self._chain
        numbers = shaped("slots", _slots(slots), ("n",))
        array = step_input(chain, x, numbers.shape, out is not None)
        shape = (*numbers.shape, chain.output_size)
        if out is None:
            return array, numbers, np.empty(shape, chain.dtype)
        return array, numbers, output("out", out, chain.dtype, shape, ("x", array), ("slots", numbers))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pool cannot be pickled or copied; copy its states with state() and set_state()")

    def __deepcopy__(self, memory: dict[int, Any]) -> NoReturn:
        self.__reduce__()

    __copy__ = __reduce__

    def __repr__(self) -> str:
        return f"Pool({self._chain.describe()}, capacity={self.capacity})"


class Streamable:
    """A recurrent layer or a model: it makes streams and pools."""

    @property
    def _chain(self) -> Chain:
        """The layers that streams and pools run."""
        raise NotImplementedError

    @property
    def batch_first(self) -> bool:
        raise NotImplementedError

    def stream(self, batch_size: int | None = None, *, window: int | None = None) -> Stream:
        """Start a state of zero that advances step by step.

        Parameters
        ----------
        batch_size : int, optional
            Rows of a step; None: steps are unbatched.
        window : int, optional
            A step returns the last output of a call on the last `window` inputs, with a state of zero before them,
            instead of a state that depends on all inputs. This also works for bidirectional layers. A step takes as
            long as that call, except for the first layer's input products, which are kept.
        """
        return Stream(self._chain, self.batch_first, batch_size, window)

    def pool(self, capacity: int) -> Pool:
        """Make room for `capacity` streams, any of which advance together in one call, each at its own pace."""
        return Pool(self._chain, capacity)


def _slots(slots: object) -> Array:
    """`slots` as a C-contiguous array of int64."""
    array = as_array("slots", slots)
    if array.dtype.kind not in "iuO" and array.size:
        raise TypeError(f"slots: expected whole numbers, got {array.dtype}")
    for slot in array.flat if array.dtype.kind in "uO" else ():
        if whole_number("slots", slot, -(2**80), 2**80) > MAX_SIZE:
            raise ValueError(f"slots: expected open slots, each once, got {slot}, which is unknown")
    # NumPy has two types of 64 bits: the view makes it the one called int64.
    return np.require(array.astype(np.int64).view(np.int64), requirements=["C", "A"])


def _slot(slot: object) -> int:
    return whole_number("slot", slot, -(2**62), 2**62)
