"""Results as tables: on the terminal, in the README, and against earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from rich.table import Table

from .peers import PEERS
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
    Target,
    Workload,
    target_of,
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
# So many of the other peers fit into a line of 140 columns; the results hold them all.
NEXT = 3
# The few names that are longer are folded.
NAME_WIDTH = 24
CAPTION = (
    "ratio: a peer's time / ours, median of pairs in turns (and its quartiles); above 1 gatewise is faster. "
    "peak, cache: share of what these processors reach at that moment with multiply-adds, or with reads, alone. "
    "target: the ratio, and with it the share of the peak, that is aimed at; !: not reached yet. "
    "ort, tf: ONNX Runtime, TensorFlow; plain: ours without lengths, resets, checkpoints, pool, a block step by step, "
    "or a network's recurrent layers alone"
)


# ---- what a row says


def best_peer(row: Row) -> tuple[str, dict[str, float]] | None:
    """The fastest peer of a row but gatewise itself, None where there was none."""
    others = (item for item in row["peers"].items() if item[0] != PLAIN)
    return min(others, key=lambda item: float(item[1]["ratio"]), default=None)


def known(document: Document) -> Iterator[tuple[Row, Workload, Target]]:
    """Rows whose workload still exists, with it and its target."""
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
        where, best = f"{row['name']}, {threads_of(row)}", best_peer(row)
        if best and misses_ratio(row, target):
            lines.append(f"{where}: ratio to {best[0]} {best[1]['ratio']:.2f}, target {target.ratio:g}")
        for name, least in target.others.items():
            if row["peers"].get(name, {}).get("ratio", least) < least:
                lines.append(f"{where}: ratio to {name} {row['peers'][name]['ratio']:.2f}, target {least:.2f}")
        if misses_share(row, target):
            lines.append(f"{where}: {row['share']:.0%} of the peak, target {target.share:.0%}")
    return lines


def failed(document: Document) -> list[str]:
    """A line for each measurement that failed; earlier results also hold failures of what peers refuse today."""
    lines = []
    for row, workload, _ in known(document):
        for name, reason in row["failed"].items():
            if name == "gatewise" or (name in PEERS and not PEERS[name].refusal(workload)):
                lines.append(f"{row['name']}, {threads_of(row)}: {name}: {reason}")
    return lines


def against(document: Document, old: Document) -> list[str]:
    """A line for each row that became slower, by ratio to its peers and not by absolute time; the worst first.

    That is where the median over the peers in both of new ratio / old ratio fell by more than 5 %, and for one peer at
    least the quartiles do not overlap.
    """
    before = {(row["name"], row["threads"]): row["peers"] for row in old["rows"]}
    found = []
    for row in document["rows"]:
        then = before.get((row["name"], row["threads"]), {})
        common = {name: (then[name], now) for name, now in row["peers"].items() if name in then}
        if not common:
            continue
        change = median(now["ratio"] / was["ratio"] for was, now in common.values())
        if change < 0.95 and any(now["high"] < was["low"] for was, now in common.values()):
            ratios = ", ".join(f"{n} {was['ratio']:.2f} -> {now['ratio']:.2f}" for n, (was, now) in common.items())
            found.append((change, f"{row['name']}, {threads_of(row)}: {change:.2f} of before ({ratios})"))
    return [line for _, line in sorted(found)]


# ---- numbers as text


def threads_of(row: Row) -> str:
    return threads_text(row["threads"])


def three_digits(number: float) -> str:
    """Three digits that count, more before the point where there are more, and never an exponent."""
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
    """Of single calls in microseconds, the clock's two readings included; of an empty call in brackets."""
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
    rows, found = list(known(document)), []
    for threads in sorted({row["threads"] for row, _, _ in rows}):
        for mode in TITLES:
            of_mode = [each for each in rows if each[0]["threads"] == threads and each[1].mode == mode]
            if of_mode:
                found.append(ratio_table(mode, of_mode))
    if found:
        found[-1].caption, found[-1].caption_justify = CAPTION, "left"
    if with_memory := [row for row, _, _ in rows if row["memory"]]:
        found.append(memory_table(with_memory))
    if with_latency := [row for row, _, _ in rows if row["latency"]]:
        found.append(latency_table(with_latency))
    if document["cold"]:
        found.append(cold_table(document["cold"]))
    return found


# ---- the README's table


def markdown(document: Document) -> str:
    """Ratios to the best peer, a line for each workload: on one thread, and on two where that was measured."""
    of = {(row["name"], row["threads"]): row for row, _, _ in known(document)}
    names = list(dict.fromkeys(name for name, _ in of))
    several = any(threads == 2 for _, threads in of)
    lines = ["| T x B x H | time | peak | best peer | ratio |" + (" 2 threads |" if several else "")]
    lines.append("|---" * (6 if several else 5) + "|")
    for name in names:
        row = of.get((name, 1))
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
            on_two = of.get((name, 2))
            best_on_two = best_peer(on_two) if on_two else None
            cells.append(f"{best_on_two[1]['ratio']:.2f} ({best_on_two[0]})" if best_on_two else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
