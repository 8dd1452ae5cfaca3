"""The workloads, as data.

Sizes: T steps, B batch, I input, H hidden. A workload is one call: a whole sequence forward, a training step on it
(forward with a tape, and all gradients, after a change of the weights), a single step of a layer or a network from
Python, or a block of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CELLS = ("LSTM", "GRU")
FORWARD, TRAIN, STEP = "forward", "train", "step"
# In PyTorch: a training step of a module, zero_grad to backward; one step of a cell, or of a layer, without gradients.
MODULE, CELL, LAYER = "module", "cell", "layer"
# In JAX: a compiled training step.
PROGRAM = "program"
# One tick of many streams.
POOL = "pool"
# One step of several layers in a row, not only recurrent ones.
NETWORK = "network"
# Some steps of a stream in one call, as in an audio callback; a call continues where the last one ended.
RUN = "run"
# ONE_STEP: a step of a single layer, outside frameworks. CONTINUES: a call starts from the state of the last one.
TRAINING, STEPPING, ONE_STEP = (TRAIN, MODULE, PROGRAM), (STEP, CELL, LAYER, POOL, NETWORK), (STEP, POOL)
CONTINUES = (*STEPPING, RUN)
# The framework in which gatewise and its peer run, for modes that belong to a framework.
HOMES = {MODULE: "PyTorch", CELL: "PyTorch", LAYER: "PyTorch", PROGRAM: "JAX"}
RAGGED, ONE_LONG, RESETS = "ragged", "one long", "resets"
# RAGGED for a module that takes and returns a PackedSequence; with RAGGED itself, packing and padding are timed too.
PACKED = "packed"
# gatewise with the same sizes, but without lengths, resets and checkpoints; in place of a pool separate streams, in
# place of a block single steps, in place of a network only its recurrent layers.
PLAIN = "gatewise plain"
# The other layers of a network.
DENSE, EMBEDDING = "Dense", "Embedding"


def gate_count(cell: str) -> int:
    from gatewise.weights.architecture import GATES  # only here: a cold start times the first import of gatewise

    return len(GATES[cell.lower()])


class Block(NamedTuple):
    """A layer of a network; the inputs of an embedding are its tokens."""

    kind: str
    inputs: int
    outputs: int
    activation: str = "linear"

    @property
    def is_recurrent(self) -> bool:
        return self.kind in CELLS

    @property
    def name(self) -> str:
        sizes = f"{self.inputs}x{self.outputs}" if self.kind == EMBEDDING else f"{self.outputs}"
        return f"{self.kind} {sizes}" + (f" {self.activation}" if self.activation != "linear" else "")


@dataclass(frozen=True)
class Workload:
    mode: str
    cell: str
    steps: int
    batch: int
    input: int
    hidden: int
    layers: int = 1
    directions: int = 1
    dtype: str = "float32"
    rows: str = ""  # RAGGED: rows of T / 4 to T steps; ONE_LONG: one of T, the others of T / 8; RESETS: at 1 step in 50
    checkpoint_every: int = 0
    frozen: bool = False  # gatewise does not check at each call whether a module in PyTorch has new weights
    blocks: tuple[Block, ...] = ()  # a network's; cell, input and hidden are then those of its first recurrent layer

    @property
    def name(self) -> str:
        """`LSTM train 100x32x128`: T x B x H, then whatever is not the default; `network LSTM 64 + Dense 8`."""
        if self.blocks:
            return f"{self.mode} " + " + ".join(block.name for block in self.blocks)
        sizes = f"{self.batch}x{self.hidden}" if self.mode in STEPPING else f"{self.steps}x{self.batch}x{self.hidden}"
        parts = [self.cell, self.mode, sizes]
        if self.input != self.hidden:
            parts.append(f"I{self.input}")
        if self.layers > 1:
            parts.append(f"{self.layers} layers")
        if self.directions > 1:
            parts.append("both ways")
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.rows:
            parts.append(self.rows)
        if self.checkpoint_every:
            parts.append(f"checkpoint {self.checkpoint_every}")
        if self.frozen:
            parts.append("frozen")
        return " ".join(parts)

    @property
    def sequences(self) -> Iterator[tuple[int, int]]:
        """Input and hidden size of each layer and direction."""
        for layer in range(self.layers):
            for _ in range(self.directions):
                yield (self.input if layer == 0 else self.directions * self.hidden), self.hidden

    @property
    def takes_tokens(self) -> bool:
        return bool(self.blocks) and self.blocks[0].kind == EMBEDDING

    @property
    def network_weights(self) -> int:
        """The weights that a step of a network must multiply.

        The input weights after an embedding are not among them, since their products with each token can be stored.
        """
        count = 0
        for i, block in enumerate(self.blocks):
            inputs = 0 if i and self.blocks[i - 1].kind == EMBEDDING else block.inputs
            if block.is_recurrent:
                count += gate_count(block.kind) * block.outputs * (inputs + block.outputs)
            elif block.kind == DENSE:
                count += block.outputs * inputs
        return count

    @property
    def operations(self) -> int:
        """The multiplications and additions of matrix products; backward has two products for each in forward."""
        if self.blocks:
            return 2 * self.network_weights
        per_step = sum(2 * gate_count(self.cell) * hidden * (inputs + hidden) for inputs, hidden in self.sequences)
        lengths = self.lengths
        steps = self.steps * self.batch if lengths is None else int(lengths.sum())
        return per_step * steps * (3 if self.mode in TRAINING else 1)

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """The steps of each row (B,); the first row has all T."""
        if self.rows not in (RAGGED, PACKED, ONE_LONG):
            return None
        lengths = np.full(self.batch, self.steps // 8)
        if self.rows != ONE_LONG:
            lengths = np.random.default_rng(2).integers(self.steps // 4, self.steps, self.batch, endpoint=True)
        lengths[0] = self.steps
        return lengths

    @property
    def resets(self) -> npt.NDArray[np.bool_] | None:
        """Which steps start from a zero state (T, B)."""
        return np.random.default_rng(3).random((self.steps, self.batch)) < 0.02 if self.rows == RESETS else None

    @property
    def weight_bytes(self) -> int:
        """The bytes that a call with few rows must read: the weights of h at every step, those of x once."""
        bytes_per_weight = 8 if self.dtype == "float64" else 4
        if self.blocks:
            return self.network_weights * bytes_per_weight
        weights = sum(
            gate_count(self.cell) * hidden * (inputs + self.steps * hidden) for inputs, hidden in self.sequences
        )
        return weights * bytes_per_weight


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


# (T, B, I, H)
SINGLE = [(100, 1, size, size) for size in (64, 128, 256, 512)]
BATCHES = [(100, 32, 128, 128), (50, 64, 256, 256), (25, 64, 512, 512), (35, 20, 650, 650)]
DEEP_BENCH = [(25, 16, 512, 512), (25, 32, 512, 512), (50, 32, 1024, 1024)]
ODD = [(100, 3, 50, 50), (60, 7, 96, 96), (50, 20, 200, 200), (35, 1, 650, 650), (2000, 1, 64, 64), (200, 8, 40, 64)]
TRAINED = [(100, 1, 64, 64), *BATCHES, (200, 8, 40, 64), (100, 1, 256, 256), (60, 7, 96, 96), (25, 16, 512, 512)]
STEPS = [16, 64, 128, 256, 512]
BLOCKS = [(64, 1, size, size) for size in (16, 32, 64, 128)]
SCHEDULED = [(100, 32, 128, 128), (100, 32, 256, 256)]
LONG, CHECKPOINTS = (1000, 32, 64, 64), (0, 16, 32)
# A small network; one with both cells and several sizes; a model of a language, or of events, as it writes.
NETWORKS = [
    (Block("LSTM", 64, 64), Block(DENSE, 64, 8)),
    (
        Block("LSTM", 128, 128),
        Block("LSTM", 128, 256),
        Block("GRU", 256, 128),
        Block(DENSE, 128, 64, "relu"),
        Block(DENSE, 64, 1, "sigmoid"),
    ),
    (Block(EMBEDDING, 1000, 128), Block("LSTM", 128, 128), Block(DENSE, 128, 64)),
]

# The workloads of --quick, which take less than a minute.
QUICK = [
    "LSTM forward 100x1x64",
    "LSTM forward 100x32x128",
    "GRU forward 100x32x128",
    "LSTM train 100x32x128",
    "LSTM step 1x64",
]


def network(*blocks: Block) -> Workload:
    """One step of a network for one row."""
    first = next(block for block in blocks if block.is_recurrent)
    return Workload(NETWORK, first.kind, 1, 1, first.inputs, first.outputs, blocks=blocks)


def _all() -> Iterator[Workload]:
    for cell in CELLS:
        for sizes in SINGLE + BATCHES + DEEP_BENCH + ODD:
            yield Workload(FORWARD, cell, *sizes)
        yield Workload(FORWARD, cell, 100, 16, 64, 128, layers=2, directions=2)
        yield Workload(FORWARD, cell, 50, 32, 128, 128, dtype="float64")
    for cell in CELLS:
        for sizes in TRAINED:
            yield Workload(TRAIN, cell, *sizes)
        yield Workload(TRAIN, cell, 100, 16, 64, 128, layers=2, directions=2)
        yield Workload(TRAIN, cell, 50, 32, 128, 128, dtype="float64")
    for cell in CELLS:
        for sizes in SCHEDULED:
            for rows in (RAGGED, ONE_LONG, RESETS):
                for mode in (FORWARD, TRAIN):
                    yield Workload(mode, cell, *sizes, rows=rows)
        for every in CHECKPOINTS:
            yield Workload(TRAIN, cell, *LONG, checkpoint_every=every)
    for cell in CELLS:
        for size in STEPS:
            yield Workload(STEP, cell, 1, 1, size, size)
        yield Workload(STEP, cell, 1, 8, 128, 128)
        yield Workload(STEP, cell, 1, 1, 128, 128, dtype="float64")
    for cell in CELLS:
        for sizes in BLOCKS:
            yield Workload(RUN, cell, *sizes)
    for cell in CELLS:
        for size in (64, 128):
            for streams in (1, 100, 1000):
                yield Workload(POOL, cell, 1, streams, size, size)
    for blocks in NETWORKS:
        yield network(*blocks)


def _in_frameworks() -> Iterator[Workload]:
    for cell in CELLS:
        for sizes in TRAINED:
            yield Workload(MODULE, cell, *sizes)
        for rows in (RAGGED, PACKED, ONE_LONG):
            yield Workload(MODULE, cell, *SCHEDULED[0], rows=rows)
        for size in STEPS:
            for frozen in (False, True):
                yield Workload(CELL, cell, 1, 1, size, size, frozen=frozen)
                yield Workload(LAYER, cell, 1, 1, size, size, frozen=frozen)
        for sizes in TRAINED:
            yield Workload(PROGRAM, cell, *sizes)
        yield Workload(PROGRAM, cell, *SCHEDULED[0], rows=RAGGED)


WORKLOADS = {workload.name: workload for workload in (*_all(), *_in_frameworks())}
