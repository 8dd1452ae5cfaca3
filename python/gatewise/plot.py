"""Figures of the inside of a layer: gates, cells, saturation, memory. `pip install 'gatewise[plot]'`.

    trace = lstm.trace(x)
    gatewise.plot.gates(trace, "l0", row=0).savefig("gates.png")

Each function returns a new matplotlib Figure, which pyplot's global state does not know.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gatewise.plot needs matplotlib: pip install 'gatewise[plot]'") from error

from gatewise.arguments.arrays import Array, as_array, describe, flag, floating, number, whole_number
from gatewise.running.traces import LayerTrace, Trace

# Okabe and Ito's colours, which people who cannot tell red from green can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#222222")
CLOSED, OPEN = 0.05, 0.95  # beyond these a gate is saturated: it passes almost no gradient
DPI = 100


def gates(
    trace: Trace, layer: str = "l0", row: int = 0, *, limits: tuple[float, float] | Literal["data"] | None = None
) -> Figure:
    """Every gate and the candidate of one layer and direction as heat maps: time across, unit down.

    Parameters
    ----------
    trace : Trace
    layer : str
        "l0", "l0_reverse", "l1", ...
    row : int
        The row of the batch.
    limits : (float, float) or "data", optional
        The values of the gates that get the first and the last colour. None is 0 and 1, so that pictures can be
        compared. "data" is the least and the largest value of each gate: it shows the gates of a layer that hardly
        move, for example before it has learned. The colours of the candidate then span its largest magnitude on both
        sides of 0, otherwise -1 to 1.
    """
    shown = {name: _row(trace, array, row) for name, array in _arrays(_layer(trace, layer)).items() if _is_gate(name)}
    if not shown:
        raise ValueError(f"trace: expected a layer with gates, got {type(_layer(trace, layer)).__name__}")
    if not next(iter(shown.values())).size:
        raise ValueError(f"row: expected a row with steps, got {row}, which has none")
    shown_limits = _limits(limits)
    figure = _figure(1.7 * len(shown) + 0.6)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        signed = name == "candidate"
        low, high = _range(values, signed, shown_limits)
        image = axes.imshow(
            values.T, aspect="auto", interpolation="nearest", origin="upper",
            cmap="RdBu_r" if signed else "viridis", vmin=low, vmax=high,
            extent=(-0.5, len(values) - 0.5, values.shape[1] - 0.5, -0.5),
        )  # fmt: skip
        axes.set_title(_words(name), loc="left", fontsize=10)
        axes.set_ylabel("unit")
        _whole_numbers(axes.yaxis, values.shape[1])
        figure.colorbar(image, ax=axes, pad=0.01, label="value" if signed else "open (0 to 1)")
    panels[-1].set_xlabel("time step")
    _whole_numbers(panels[-1].xaxis, len(next(iter(shown.values()))))
    return _titled(figure, f"Gates of {layer}, row {row}")


def _limits(limits: object) -> tuple[float, float] | Literal["data"]:
    if limits is None:
        return 0.0, 1.0
    if isinstance(limits, str) and limits == "data":
        return "data"
    if not isinstance(limits, (tuple, list)) or len(limits) != 2:
        raise TypeError(f"limits: expected two numbers, 'data' or None, got {limits!r}")
    low, high = (number(f"limits[{i}]", value) for i, value in enumerate(limits))
    if low >= high:
        raise ValueError(f"limits: expected a smaller number before a larger one, got {limits!r}")
    return low, high


def _range(values: Array, signed: bool, limits: tuple[float, float] | Literal["data"]) -> tuple[float, float]:
    """The values that get the first and the last colour; for a candidate they are symmetric around 0."""
    if limits != "data":
        return (-1.0, 1.0) if signed else limits
    finite = values[np.isfinite(values)]
    if signed:
        largest = float(np.abs(finite).max(initial=0))
        return -largest, largest
    return float(finite.min(initial=1)), float(finite.max(initial=0))


def cells(trace: Trace, layer: str = "l0", row: int = 0, units: object = None) -> Figure:
    """The cell state of an LSTM layer over time, or h of the other layers: some units as lines, all of them as a band.

    Parameters
    ----------
    trace, layer, row
        As in `gates`.
    units : array_like of integers, optional
        The units to draw as lines; None: the eight that change most.
    """
    arrays = _arrays(_layer(trace, layer))
    name = "cell" if "cell" in arrays else "hidden"
    values = _row(trace, arrays[name], row)  # [T, H]
    if units is None:
        order = np.argsort(-np.ptp(values, axis=0), kind="stable") if len(values) else np.arange(values.shape[1])
        chosen = np.sort(order[: len(COLOURS)])
    else:
        chosen = np.atleast_1d(as_array("units", units))
        if chosen.dtype.kind not in "iu" or chosen.ndim != 1:
            raise TypeError(f"units: expected whole numbers, got {chosen.dtype} of shape {describe(chosen.shape)}")
        for unit in chosen:
            whole_number("units", unit, 0, values.shape[1] - 1)
    figure = _figure(4.5)
    axes = figure.subplots()
    times = np.arange(len(values))
    if len(values):
        low, high = np.percentile(values, [5, 95], axis=1)
        axes.fill_between(times, low, high, color="#dddddd", lw=0, label="90 % of all units")
    for index, unit in enumerate(chosen):
        style = "-" if index < len(COLOURS) else "--"
        axes.plot(times, values[:, unit], style, color=COLOURS[index % len(COLOURS)], lw=1.4, label=f"unit {unit}")
    axes.axhline(0, color="#999999", lw=0.7, zorder=0)
    _quiet(axes)
    axes.set_xlabel("time step")
    axes.set_ylabel("cell state c" if name == "cell" else "hidden state h")
    _whole_numbers(axes.xaxis, len(values))
    axes.margins(x=0.01)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return _titled(figure, f"{'Cell states' if name == 'cell' else 'Hidden states'} of {layer}, row {row}")


def saturation(trace: Trace, layer: str = "l0") -> Figure:
    """How far the gates of a layer are open, over all rows, steps and units: a histogram for each gate.

    A gate that is nearly always closed or open (the shaded ends) has almost no gradient.

    Parameters
    ----------
    trace, layer
        As in `gates`.
    """
    arrays = {name: array for name, array in _arrays(_layer(trace, layer)).items() if name.endswith("_gate")}
    if not arrays:
        raise ValueError(f"trace: expected a layer with gates, got {type(_layer(trace, layer)).__name__}")
    figure = _figure(3.4)
    panels = figure.subplots(1, len(arrays), sharey=True, squeeze=False)[0]
    for axes, (name, array) in zip(panels, arrays.items(), strict=True):
        values = _steps_only(trace, array).ravel()
        count = max(1, values.size)
        axes.axvspan(0, CLOSED, color="#eeeeee", lw=0)
        axes.axvspan(OPEN, 1, color="#eeeeee", lw=0)
        axes.hist(
            values, bins=np.linspace(0, 1, 41).tolist(), weights=np.full(values.size, 100 / count), color=COLOURS[0]
        )
        closed, opened = (values < CLOSED).sum() / count, (values > OPEN).sum() / count
        axes.set_title(f"{_words(name)}\nclosed {closed:.0%}, open {opened:.0%}", loc="left", fontsize=10)
        axes.set_xlabel("activation")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        _quiet(axes)
    panels[0].set_ylabel("share of all values, %")
    return _titled(figure, f"Saturation of {layer} (below {CLOSED}, above {OPEN})")


def memory(gradient: object, step: int, *, row: int = 0, batch_first: bool = False) -> Figure:
    """How far back a layer remembers: the size of `layer.input_gradient(x, step)` at each step of the input.

    Parameters
    ----------
    gradient : array_like
        What `input_gradient` returned: (T, B, I), with batch_first (B, T, I), or (T, I).
    step : int
        The step that `input_gradient` was called with.
    row : int
        The row of the batch.
    batch_first : bool
        Whether the layer has batch_first.
    """
    array = as_array("gradient", gradient)
    if array.ndim not in (2, 3):
        raise ValueError(f"gradient: expected shape (T, B, I) or (T, I), got {describe(array.shape)}")
    rows = array[None] if array.ndim == 2 else array if flag("batch_first", batch_first) else array.swapaxes(0, 1)
    array = rows[whole_number("row", row, 0, len(rows) - 1)]
    output_step = whole_number("step", step, -len(array), len(array) - 1) % len(array)
    array = np.abs(floating("gradient", array, np.dtype(np.float64)))
    largest = array.max(axis=1, initial=0)  # [T], so that no square overflows
    with np.errstate(invalid="ignore"):
        scaled = np.divide(array, largest[:, None], out=np.zeros_like(array), where=largest[:, None] > 0)
        size = largest * np.sqrt((scaled**2).sum(axis=1))
    size[~np.isfinite(size)] = 0  # exploded: not drawn
    figure = _figure(4.0)
    axes = figure.subplots()
    times = np.arange(len(size))
    axes.plot(times, np.where(size > 0, size, np.nan), color=COLOURS[0], lw=1.4, marker="o", ms=3)
    axes.axvline(output_step, color=COLOURS[1], lw=1, label=f"the output's step, {output_step}")
    if (size > 0).any():
        axes.set_yscale("log")
    total = size.sum()
    if total > 0:
        # The steps from which nine tenths of it come, the nearest steps first.
        nonzero = times[size > 0]
        nearest = nonzero[np.argsort(np.abs(nonzero - output_step), kind="stable")]
        reach = nearest[: int(np.searchsorted(np.cumsum(size[nearest]), 0.9 * total)) + 1]
        label = f"90 % of it: {len(reach)} steps"
        axes.axvspan(reach.min() - 0.5, reach.max() + 0.5, color="#eeeeee", lw=0, zorder=0, label=label)
    axes.set_xlabel("time step of the input")
    axes.set_ylabel("norm of the gradient")
    _whole_numbers(axes.xaxis, len(size))
    axes.set_xlim(-0.5, len(size) - 0.5)
    axes.legend(loc="best", frameon=False, fontsize=9)
    _quiet(axes)
    return _titled(figure, f"What the output at step {output_step} remembers of the input")


def _layer(trace: Trace, layer: str) -> LayerTrace:
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace, got {type(trace).__name__}")
    if not isinstance(layer, str) or layer not in trace:
        raise ValueError(f"layer: expected one of {', '.join(trace)}, got {layer!r}")
    return trace[layer]


def _arrays(layer: LayerTrace) -> dict[str, Array]:
    return {field.name: getattr(layer, field.name) for field in fields(layer)}


def _is_gate(name: str) -> bool:
    return name.endswith("_gate") or name == "candidate"


def _row(trace: Trace, array: Array, row: int) -> Array:
    """The steps of one row up to its end, (T, H)."""
    if trace.unbatched:
        whole_number("row", row, 0, 0)
        return array[: None if trace.lengths is None else int(trace.lengths)]
    rows = array if trace.batch_first else array.swapaxes(0, 1)
    index = whole_number("row", row, 0, len(rows) - 1)
    values: Array = rows[index]
    return values if trace.lengths is None else values[: int(trace.lengths[index])]


def _steps_only(trace: Trace, array: Array) -> Array:
    """All values except those after the ends of rows, (N, H)."""
    if trace.lengths is None or not array.size:
        return array.reshape(-1, array.shape[-1])
    rows = 1 if trace.unbatched else array.shape[0 if trace.batch_first else 1]
    return np.concatenate([_row(trace, array, row) for row in range(rows)])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(height: float) -> Figure:
    return Figure(figsize=(8, height), dpi=DPI, layout="constrained")


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axis: Any, count: int) -> None:
    axis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1 if count < 2 else 2))
