"""Results as tables for the terminal and the README, and compared with earlier results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from rich.table import Table

from .peers import PEERS
from .targets import Target, target_of
from .workloads import (
    CELL,
    FORWARD,
    LAYER,
    MODULE,
    NETWORK,
    PLAIN,
    POOL,
    PROGRAM,
    RUN,
    STEP,
    TRAIN,
    WORKLOADS,
    Workload,
    threads_text,
)

Document = dict[str, Any]
Row = dict[str, Any]

SHORT = {
    PLAIN: "plain",
    "PyTorch": "torch",
    "PyTorch padded": "torch padded",
    "ONNX Runtime": "ort",
    "ONNX Runtime bound": "ort bound",
    "OpenVINO": "openvino",
    "JAX": "jax",
    "TensorFlow": "tf",
}
TITLES = {
    FORWARD: "forward: a whole sequence, inference",
    TRAIN: "train: change the weights, record, all gradients",
    STEP: "step: one step from Python",
    RUN: "run: a block of steps of a stream in one call from Python",
    POOL: "pool: one tick of many streams",
    NETWORK: "network: one step of several layers from Python",
    MODULE: "module: a training step in PyTorch, torch.nn's module against the same after accelerate",
    PROGRAM: "program: a compiled training step in JAX, lax.scan against gatewise.jax",
    CELL: "cell: one step of a cell in PyTorch, without gradients",
    LAYER: "layer: one step of a layer in PyTorch, without gradients",
}
# The number of slower peers that fit into a line of 140 columns; the JSON has all of them.
NEXT = 3
# Longer names are wrapped.
NAME_WIDTH = 24
CAPTION = (
    "ratio: a peer's time / ours, median of pairs in turns (and its quartiles); above 1 gatewise is faster. "
    "peak, cache: share of what these processors reach at that moment when they only multiply and add, or only read. "
    "target: the ratio to reach, and with it the share of the peak; !: not reached yet. "
    "ort, tf: ONNX Runtime, TensorFlow; plain: ours without lengths, resets and checkpoints, separate streams for a "
    "pool, single steps for a block, only the recurrent layers for a network"
)


# ---- what a row says


def best_peer(row: Row) -> tuple[str, dict[str, float]] | None:
    """The fastest peer of a row, gatewise itself excepted; None if the row has no peer."""
    others = (item for item in row["peers"].items() if item[0] != PLAIN)
    return min(others, key=lambda item: float(item[1]["ratio"]), default=None)


def known(document: Document) -> Iterator[tuple[Row, Workload, Target]]:
    """The rows whose workload still exists, each with its workload and its target."""
    for row in document["rows"]:
        workload = WORKLOADS.get(row["name"])
        if workload:
            yield row, workload, target_of(workload, row["threads"])


def misses_ratio(row: Row, target: Target) -> bool:
    best = best_peer(row)
    return best is not None and best[1]["ratio"] < target.ratio


def misses_share(row: Row, target: Target) -> bool:
    return target.share is not None and row.get("share") is not None and row["share"] < target.share


def missed(document: Document) -> list[str]:
    """A line for each target that is not reached."""
    lines = []
    for row, _, target in known(document):
        title, best = f"{row['name']}, {threads_of(row)}", best_peer(row)
        if best and misses_ratio(row, target):
            lines.append(f"{title}: ratio to {best[0]} {best[1]['ratio']:.2f}, target {target.ratio:g}")
        for name, least in target.others.items():
            if row["peers"].get(name, {}).get("ratio", least) < least:
                lines.append(f"{title}: ratio to {name} {row['peers'][name]['ratio']:.2f}, target {least:.2f}")
        if misses_share(row, target):
            lines.append(f"{title}: {row['share']:.0%} of the peak, target {target.share:.0%}")
    return lines


def failed(document: Document) -> list[str]:
    """A line for each measurement that failed; in earlier results, except for what peers refuse today."""
    lines = []
    for row, workload, _ in known(document):
        for name, reason in row["failed"].items():
            if name == "gatewise" or (name in PEERS and not PEERS[name].refusal(workload)):
                lines.append(f"{row['name']}, {threads_of(row)}: {name}: {reason}")
    return lines


def against(document: Document, earlier: Document) -> list[str]:
    """A line for each row that became slower, by the ratios to its peers and not by absolute time; the worst first.

    A row is slower if new ratio / old ratio, as the median over the peers in both, is below 0.95, and if for at least
    one peer the quartiles do not overlap.
    """
    old_rows = {(row["name"], row["threads"]): row["peers"] for row in earlier["rows"]}
    slower = []
    for row in document["rows"]:
        old_peers = old_rows.get((row["name"], row["threads"]), {})
        pairs = {name: (old_peers[name], new) for name, new in row["peers"].items() if name in old_peers}
        if not pairs:
            continue
        change = median(new["ratio"] / old["ratio"] for old, new in pairs.values())
        if change < 0.95 and any(new["high"] < old["low"] for old, new in pairs.values()):
            ratios = ", ".join(f"{name} {old['ratio']:.2f} -> {new['ratio']:.2f}" for name, (old, new) in pairs.items())
            slower.append((change, f"{row['name']}, {threads_of(row)}: {change:.2f} of before ({ratios})"))
    return [line for _, line in sorted(slower)]


# ---- numbers as text


def threads_of(row: Row) -> str:
    return threads_text(row["threads"])


def three_digits(number: float) -> str:
    """Three significant digits, all digits of a larger whole number, and never an exponent."""
    return f"{number:#.3g}".rstrip(".") if 0.001 <= number < 999.5 else f"{number:.0f}"


def time_text(seconds: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{three_digits(seconds / unit)} {name}"
    return f"{seconds * 1e9:.0f} ns"


def share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


def mark(text: str, bad: bool) -> str:
    return f"[bold red]{text} ![/]" if bad else text


# ---- tables for the terminal


def new_table(title: str, *columns: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index < len(columns) - 1)
    return table


def ratio_table(mode: str, rows: Iterable[tuple[Row, Workload, Target]]) -> Table:
    rows = list(rows)
    title = f"{TITLES[mode]}; {threads_of(rows[0][0])}"
    table = new_table(title, "", "time", "GFLOP/s", "peak", "cache", "best peer", "ratio", "", "target", "the next")
    table.columns[0].max_width, table.columns[0].no_wrap = NAME_WIDTH, False
    table.columns[5].justify = table.columns[9].justify = "left"
    for row, _, target in rows:
        best = best_peer(row)
        others = sorted((peer["ratio"], name) for name, peer in row["peers"].items() if not best or name != best[0])
        share_target = f" {target.share:.0%}" if target.share else ""
        table.add_row(
            row["name"].replace(f" {mode} ", " ").removeprefix(f"{mode} "),
            time_text(row["seconds"]) if "seconds" in row else "failed",
            three_digits(row["gflops"]) if "gflops" in row else "",
            mark(share_text(row.get("share")), misses_share(row, target)),
            share_text(row.get("bandwidth_share")),
            SHORT.get(best[0], best[0]) if best else "",
            mark(f"{best[1]['ratio']:.2f}", misses_ratio(row, target)) if best else "",
            f"{best[1]['low']:.2f}-{best[1]['high']:.2f}" if best else "",
            f"{target.ratio:g}{share_target}",
            ", ".join(f"{SHORT.get(name, name)} {ratio:.1f}" for ratio, name in others[:NEXT]),
        )
    return table


def memory_table(rows: Iterable[Row]) -> Table:
    table = new_table("peak memory of a training step, MB", "", "gatewise", "PyTorch", "ratio")
    for row in rows:
        ours, theirs = row["memory"].get("gatewise"), row["memory"].get("PyTorch")
        table.add_row(
            row["name"],
            megabytes(ours) if ours is not None else "",
            megabytes(theirs) if theirs is not None else "",
            f"{theirs / ours:.2f}" if ours and theirs else "",
        )
    return table


def latency_table(rows: Iterable[Row]) -> Table:
    """Times of single calls in microseconds, with the clock's two readings; in brackets those of an empty call."""
    points = ("p50", "p99", "p99.9", "max")
    table = new_table(
        "single steps, us: the clock's own time included; in brackets an empty call's", "", "calls", *points
    )
    table.columns[0].max_width, table.columns[0].no_wrap = NAME_WIDTH, False
    for row in rows:
        latency = row["latency"]
        texts = (f"{latency[p] / 1e3:.2f} ({latency['empty'][p] / 1e3:.2f})" for p in points)
        table.add_row(row["name"], f"{latency['calls']:,}", *texts)
    return table


def cold_table(starts: Iterable[dict[str, Any]]) -> Table:
    table = new_table("cold start, ms, NumPy imported", "", "import", "to the first result", "the second")
    for start in starts:
        table.add_row(start["who"], *(f"{start[key] * 1e3:.1f}" for key in ("import", "first", "second")))
    return table


def tables(document: Document) -> list[Table]:
    """All results, for rich's console."""
    rows, result = list(known(document)), []
    for threads in sorted({row["threads"] for row, _, _ in rows}):
        for mode in TITLES:
            rows_of_mode = [row for row in rows if row[0]["threads"] == threads and row[1].mode == mode]
            if rows_of_mode:
                result.append(ratio_table(mode, rows_of_mode))
    if result:
        result[-1].caption, result[-1].caption_justify = CAPTION, "left"
    if with_memory := [row for row, _, _ in rows if row["memory"]]:
        result.append(memory_table(with_memory))
    if with_latency := [row for row, _, _ in rows if row["latency"]]:
        result.append(latency_table(with_latency))
    if document["cold"]:
        result.append(cold_table(document["cold"]))
    return result


# ---- the README's table


def markdown(document: Document) -> str:
    """Ratios to the best peer, a line for each workload: on one thread, and on two if that was measured."""
    rows = {(row["name"], row["threads"]): row for row, _, _ in known(document)}
    names = list(dict.fromkeys(name for name, _ in rows))
    several = any(threads == 2 for _, threads in rows)
    lines = ["| T x B x H | time | peak | best peer | ratio |" + (" 2 threads |" if several else "")]
    lines.append("|---" * (6 if several else 5) + "|")
    for name in names:
        row = rows.get((name, 1))
        best = best_peer(row) if row else None
        if not row or not best or "seconds" not in row:
            continue
        cells = [
            name,
            time_text(row["seconds"]),
            share_text(row.get("share")),
            best[0],
            f"{best[1]['ratio']:.2f}",
        ]
        if several:
            on_two = rows.get((name, 2))
            best_on_two = best_peer(on_two) if on_two else None
            cells.append(f"{best_on_two[1]['ratio']:.2f} ({best_on_two[0]})" if best_on_two else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
