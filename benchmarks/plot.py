"""Results as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .report import Document, Row, best_peer, known, threads_of
from .targets import Target
from .workloads import CELLS, FORWARD, STEP, TRAIN, Workload

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

# Okabe and Ito's colours, which are also distinct for those who cannot tell red from green.
COLOURS = {
    "PyTorch": "#d55e00",
    "ONNX Runtime": "#0072b2",
    "ONNX Runtime bound": "#56b4e9",
    "OpenVINO": "#cc79a7",
    "JAX": "#009e73",
    "TensorFlow": "#e69f00",
}
GREY, INK = "#9a9a9a", "#222222"
STYLE = {
    "figure.dpi": 160,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
DIAMOND = {"marker": "D", "ls": "", "ms": 5, "mec": "white", "mew": 0.9}
MODES = (FORWARD, TRAIN, STEP)
# The ticks of an axis of ratios: far from 1, and near it.
COARSE = (0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50)
FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.2)


def ratios(document: Document) -> Any:
    """Bars from 1 to the best peer's time over ours, on the fewest threads; diamonds: the most, strokes: targets."""
    rows = [row for row in known(document) if best_peer(row[0]) and row[1].mode in MODES]
    if not rows:
        return None
    fewest, most = (bound((row for row, _, _ in rows), key=lambda row: int(row["threads"])) for bound in (min, max))
    bars = {
        mode: [row for row in rows if row[0]["threads"] == fewest["threads"] and row[1].mode == mode] for mode in MODES
    }
    on_most = {row["name"]: row for row, _, _ in rows if row["threads"] == most["threads"] > fewest["threads"]}
    modes = [mode for mode in MODES if bars[mode]]
    heights = [len(bars[mode]) + 3 for mode in modes]
    figure, panels = plt.subplots(
        len(modes), 1, figsize=(10, 0.19 * sum(heights) + 0.6), squeeze=False, height_ratios=heights
    )
    for axes, mode in zip(panels[:, 0], modes, strict=True):
        _draw_ratio_panel(axes, bars[mode], on_most)
        axes.set_yticks(range(len(bars[mode])), [row["name"].replace(f" {mode} ", " ") for row, _, _ in bars[mode]])
        axes.set_title(f"{mode}: best peer's time / gatewise's, {threads_of(fewest)}")
    names = {fastest[0] for row, _, _ in rows if (fastest := best_peer(row))}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=name) for name in COLOURS if name in names]
    handles.append(plt.Line2D([], [], color=INK, lw=1.6, marker="|", ls="", ms=8, mew=1.6, label="target"))
    if on_most:
        handles.append(plt.Line2D([], [], color=INK, label=threads_of(most), **DIAMOND))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def _draw_ratio_panel(axes: Any, bars: list[tuple[Row, Workload, Target]], on_most: dict[str, Row]) -> None:
    for y, (row, _, target) in enumerate(bars):
        name, best = best_peer(row) or ("", {})
        axes.barh(y, best["ratio"] - 1, left=1, height=0.72, color=COLOURS.get(name, GREY))
        axes.plot([best["low"], best["high"]], [y, y], color=INK, lw=0.8)
        axes.plot([target.ratio] * 2, [y - 0.42, y + 0.42], color=INK, lw=1.6)
        best_on_most = best_peer(on_most[row["name"]]) if row["name"] in on_most else None
        if best_on_most:
            axes.plot(best_on_most[1]["ratio"], y, color=COLOURS.get(best_on_most[0], GREY), **DIAMOND)
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_xscale("log")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (FINE if high < 2.5 * low else COARSE) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


# Ranges of B: the name of each, and its largest B.
BATCH_RANGES = {"B 1": 1, "B 2 to 8": 8, "B 9 to 32": 32, "B 33 or more": 9999}
Points = dict[str, list[tuple[int, float]]]  # a range of B -> H and the share of the peak


def peak(document: Document) -> Any:
    """Share of the FMA peak over H, a line for each range of B; float32, one layer, even rows, whole tapes, one thread.

    A range can hold several workloads with the same H: each is a marker, and the line goes through their mean.
    """
    panels_of_points = _peak_points(document)
    if not panels_of_points:
        return None
    modes = [mode for mode in MODES if any(key[0] == mode for key in panels_of_points)]
    cells = sorted({cell for _, cell in panels_of_points}, reverse=True)
    figure, panels = plt.subplots(
        len(modes), len(cells), figsize=(10, 2.6 * len(modes)), squeeze=False, sharex=True, sharey=True
    )
    for i, mode in enumerate(modes):
        for j, cell in enumerate(cells):
            _draw_peak_panel(panels[i, j], panels_of_points.get((mode, cell), {}))
            panels[i, j].set_title(f"{cell} {mode}")
    for axes in panels[-1]:
        axes.set_xlabel("hidden size H")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the FMA peak")
    handles: dict[str, Any] = {}  # a range looks the same in all panels: one legend
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def _peak_points(document: Document) -> dict[tuple[str, str], Points]:
    """The points of each panel, by mode and cell."""
    panels: dict[tuple[str, str], Points] = {}
    for row, workload, _ in known(document):
        if workload.mode not in (FORWARD, TRAIN) or workload.dtype != "float32" or workload.layers > 1:
            continue
        if workload.rows or workload.checkpoint_every or row["threads"] > 1 or row.get("share") is None:
            continue
        batch = next(name for name, largest in BATCH_RANGES.items() if workload.batch <= largest)
        points = panels.setdefault((workload.mode, workload.cell), {})
        points.setdefault(batch, []).append((workload.hidden, row["share"]))
    return panels


def _draw_peak_panel(axes: Any, points: Points) -> None:
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(BATCH_RANGES)))
    for batch, colour in zip(BATCH_RANGES, colours, strict=True):
        if batch not in points:
            continue
        sizes, shares = np.array(points[batch]).T
        unique_sizes = np.unique(sizes)
        means = [shares[sizes == size].mean() for size in unique_sizes]
        axes.plot(sizes, shares, "o", ms=4, color=colour, label=batch)
        axes.plot(unique_sizes, means, lw=1, color=colour)
    axes.set_xscale("log", base=2)
    ticks = (64, 128, 256, 512, 1024)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, 1)
    axes.set_yticks(np.arange(0, 1.1, 0.2), [f"{tick:.0%}" for tick in np.arange(0, 1.1, 0.2)])
    axes.grid(axis="y", color="#e5e5e5", lw=0.6)


def _exceeded(histogram: list[list[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Microseconds, and for each the share of calls that took at least as long."""
    edges, counts = np.array(histogram, dtype=float).T
    return edges / 1e3, counts[::-1].cumsum()[::-1] / counts.sum()


def latency(document: Document) -> Any:
    """The share of single steps that took longer than a time; dashed: an empty call in the same measurement."""
    rows = [(row, workload) for row, workload, _ in known(document) if row["latency"] and workload.mode == STEP]
    if not rows:
        return None
    cells = [cell for cell in CELLS if any(workload.cell == cell for _, workload in rows)]
    sizes = sorted({workload.hidden for _, workload in rows})
    shades = dict(zip(sizes, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(sizes))), strict=True))
    figure, panels = plt.subplots(1, len(cells), figsize=(10, 3.8), squeeze=False, sharey=True, sharex=True)
    handles = {}  # a size looks the same in all panels: one legend
    for axes, cell in zip(panels[0], cells, strict=True):
        rows_of_cell = [row for row in rows if row[1].cell == cell]
        for row, workload in rows_of_cell:
            label = row["name"].split(" step ")[1]
            style = "-." if workload.dtype != "float32" else ":" if workload.batch > 1 else "-"
            times, shares = _exceeded(row["latency"]["histogram"])
            (handles[label],) = axes.step(times, shares, where="post", lw=1.3, color=shades[workload.hidden], ls=style)
        empty = _exceeded(rows_of_cell[0][0]["latency"]["empty"]["histogram"])
        (empty_call,) = axes.step(*empty, where="post", color=GREY, ls="--", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="microseconds", title=f"{cell} step, single calls from Python")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(lambda share, _: "all" if share >= 1 else f"1 in {1 / share:,.0f}")
        axes.grid(color="#ececec", lw=0.6)
    panels[0, 0].set_ylabel("calls that took longer")
    handles["empty call"] = empty_call
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), title="B x H")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    return figure


def figures(document: Document, folder: Path) -> list[Path]:
    """Write the figures that there is data for into `folder`: ratios.png, peak.png, latency.png. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for draw in (ratios, peak, latency):
        with plt.rc_context(STYLE):
            figure = draw(document)
            if figure:
                path = folder / f"{draw.__name__}.png"
                figure.savefig(path)
                plt.close(figure)
                paths.append(path)
    return paths
