"""Training: what a recorded forward keeps, and the gradients that come out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

import gatewise._core as _core
from gatewise.arguments.arrays import Array, empty, flag, floating, read_only, rows, shaped
from gatewise.arguments.sequences import zero_tail
from gatewise.running.layout import Layout, State


def shapes(value: Any) -> Any:
    """The shapes of arrays, also of those in tuples and dictionaries, for a repr."""
    if isinstance(value, dict):
        return {name: shapes(item) for name, item in value.items()}
    return tuple(map(shapes, value)) if isinstance(value, tuple) else value.shape


@dataclass(frozen=True, repr=False)
class Gradients:
    """Gradients of a loss, each in the shape of the array that it belongs to.

    Attributes
    ----------
    input : ndarray
        The gradient of x.
    state : ndarray or (ndarray, ndarray)
        The gradient of the state before the first step.
    parameters : dict
        The gradient of every parameter, by name.
    """

    input: Array
    state: State
    parameters: dict[str, Array]

    def __repr__(self) -> str:
        state, parameters = shapes(self.state), shapes(self.parameters)
        return f"Gradients(input={self.input.shape}, state={state}, parameters={parameters})"


class Tape:
    """A recorded forward: its results, and all that backward needs.

    Attributes
    ----------
    output, state
        The results of the layer's call, with dropout; read-only.
    call_count : int
        The number of the dropout masks that were drawn.
    """

    def __init__(
        self, layout: Layout, core: _core.Tape, steps: int, output: Array, state: State, call_count: int
    ) -> None:
        self._layout = layout
        self._core: _core.Tape | None = core
        self._steps = steps  # of the longest row
        self.output = output
        self.state = state
        self.call_count = call_count

    @property
    def nbytes(self) -> int:
        """Bytes kept for backward besides input and output; 0 after the tape was used up."""
        core = self._core
        return core.nbytes if core is not None else 0

    def __repr__(self) -> str:
        return f"Tape(output={self.output.shape}, state={shapes(self.state)}, nbytes={self.nbytes})"

    def backward(self, grad_output: object, grad_state: object = None, *, keep: bool = False) -> Gradients:
        """Backpropagation through time.

        Parameters
        ----------
        grad_output : array_like or None
            Gradient of the loss with respect to `output`, in its shape. None is zero.
        grad_state : array_like or (array_like, array_like), optional
            The same for `state`. None, also in a pair, is zero.
        keep : bool
            Whether the tape stays as it is, for another backward. Otherwise it is used up, and its memory is returned.

        Returns
        -------
        Gradients

        Raises
        ------
        RuntimeError
            If the tape is used up.
        ValueError, TypeError
            If a gradient has the wrong shape or dtype; the tape stays usable.
        """
        core = self._usable()
        keep = flag("keep", keep)
        layout, architecture = self._layout, self._layout.architecture
        grad_y = None
        if grad_output is not None:
            grad_y = shaped("grad_output", floating("grad_output", grad_output, architecture.dtype), self.output.shape)
            grad_y = rows(layout.to_time_major(grad_y)[: self._steps])
        grad_h, grad_c = layout.state_in("grad_state", grad_state, allow_none=True)
        grad_x = empty(layout.shape(architecture.input_size), architecture.dtype)
        grad_h0, grad_c0 = layout.new_state()
        parameters = {name: empty(shape, architecture.dtype) for name, shape in architecture.shapes().items()}
        grad_steps = zero_tail(layout.to_time_major(grad_x), self._steps)
        core.backward(grad_y, grad_h, grad_c, grad_steps, grad_h0, grad_c0, architecture.grouped(parameters))
        if not keep:
            self._core = None
        return Gradients(grad_x, layout.state_out(grad_h0, grad_c0), parameters)

    def _usable(self) -> _core.Tape:
        if self._core is None:
            raise RuntimeError("backward: this tape is used up; pass keep=True to use a tape again")
        return self._core


# The probability, the seed and the number of the masks.
Dropout: TypeAlias = tuple[float, int, int]
NO_DROPOUT: Dropout = (0.0, 0, 0)


def record(
    layout: Layout,
    packed: _core.Packed,
    x: Array,
    hidden: Array | None,
    cell: Array | None,
    schedule: _core.Schedule | None,
    steps: int,
    checkpoint_every: int,
    dropout: Dropout,
) -> Tape:
    """Run forward and keep what backward needs. x has the layout's order of axes."""
    # These are copies, since the caller may write to x and to the state before backward.
    x_copy = np.array(layout.to_time_major(x)[:steps], order="C", copy=True)
    hidden_copy = None if hidden is None else hidden.copy()
    output = empty(layout.shape(layout.architecture.output_size), layout.architecture.dtype)
    hidden_after, cell_after = layout.new_state()
    core = _core.Tape(
        packed,
        x_copy,
        hidden_copy,
        cell,
        zero_tail(layout.to_time_major(output), steps),
        hidden_after,
        cell_after,
        schedule,
        min(checkpoint_every, steps),
        *dropout,
    )
    after = [read_only(part) for part in (hidden_after, cell_after) if part is not None]
    return Tape(layout, core, steps, read_only(output), layout.state_out(*after), dropout[2])
