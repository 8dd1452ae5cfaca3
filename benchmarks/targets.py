"""What the workloads should reach, as data. Many of the targets are not reached yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .workloads import (
    BATCHES,
    CELL,
    FORWARD,
    LAYER,
    MODULE,
    NETWORK,
    PLAIN,
    POOL,
    RESETS,
    RUN,
    SINGLE,
    STEP,
    TRAIN,
    Workload,
)


@dataclass(frozen=True)
class Target:
    """What a row should reach."""

    ratio: float  # the best peer's time / ours
    share: float | None = None  # of the machine's limit; None: no target
    others: Mapping[str, float] = field(default_factory=dict)  # ratios to single peers, PLAIN among them


def _ratio_table() -> dict[tuple[str, str], tuple[dict[int, float], dict[int, float]]]:
    """The ratios for one row (B = 1) by hidden size: on one thread, and on two or more."""
    return {
        (FORWARD, "LSTM"): ({64: 1.9, 128: 1.4, 256: 1.2, 512: 1.15}, {64: 2.5, 128: 2.0, 256: 1.6, 512: 1.2}),
        (FORWARD, "GRU"): ({64: 2.5, 128: 1.7, 256: 1.5, 512: 1.2}, {64: 2.8, 128: 2.0, 256: 1.6, 512: 1.2}),
        (STEP, "LSTM"): ({16: 25, 64: 7, 128: 3.5, 256: 1.9, 512: 1.35}, {}),
        (STEP, "GRU"): ({16: 25, 64: 8, 128: 4}, {}),
    }


_SINGLE_ROW = _ratio_table()
# Each pair: on one thread, and on two or more.
_BATCH_TARGETS = {"LSTM": (Target(1.05, 0.88), Target(1.05, 0.85)), "GRU": (Target(1.15, 0.88), Target(1.05, 0.82))}
_TRAIN_RATIOS = {"LSTM": (1.25, 1.4), "GRU": (1.35, 1.5)}
_TRAIN_SINGLE_RATIOS = {"LSTM": (3.0, 2.5), "GRU": (2.5, 1.5)}
_TRAIN_SHARES = {"LSTM": 0.85, "GRU": 0.82}


def target_of(workload: Workload, threads: int) -> Target:
    """The target of a workload on a number of threads: the tables above, and 1 for everything else."""
    several = int(threads > 1)
    if workload.mode not in (FORWARD, TRAIN, STEP):
        return _target_of_mode(workload, several)
    if workload.rows:
        return _target_of_uneven_rows(workload)
    if workload.checkpoint_every or workload.dtype != "float32" or workload.layers > 1:
        return Target(1.0)
    if workload.mode == TRAIN:
        return _training_target(workload, several)
    sizes = (workload.steps, workload.batch, workload.input, workload.hidden)
    if workload.mode == FORWARD and sizes in BATCHES:
        return _BATCH_TARGETS[workload.cell][several]
    if workload.batch == 1 and (workload.mode == STEP or sizes in SINGLE):
        return Target(_SINGLE_ROW[workload.mode, workload.cell][several].get(workload.hidden, 1.0))
    return Target(1.0)


def _target_of_mode(workload: Workload, several: int) -> Target:
    """The target of a mode other than forward, train and step."""
    if workload.mode in (CELL, LAYER):
        return Target(2.5)
    if workload.mode == MODULE:  # PyTorch's own overhead takes a tenth
        is_large = workload.batch >= 8 and workload.hidden >= 64
        ratio = _TRAIN_RATIOS[workload.cell][several] if is_large else 1.0
        return Target(3.0 if workload.rows else max(1.0, 0.9 * ratio))
    if workload.mode == POOL:
        return Target(1.0, others={PLAIN: 4.0} if (workload.batch, workload.hidden) == (1000, 64) else {})
    if workload.mode == RUN:
        return Target(1.0, others={PLAIN: 1.0})
    if workload.mode == NETWORK and workload.takes_tokens:
        # A step may take 1.3 times as long as its recurrent layer.
        return Target(1.0, others={PLAIN: 1 / 1.3, "ONNX Runtime": 5.0, "ONNX Runtime bound": 5.0})
    return Target(1.0)


def _target_of_uneven_rows(workload: Workload) -> Target:
    if workload.rows == RESETS:
        return Target(1.0, others={PLAIN: 0.97})
    assert workload.lengths is not None
    saving = workload.steps * workload.batch / int(workload.lengths.sum())
    return Target(1.0, others={"PyTorch": 3.0, PLAIN: saving / 1.15})


def _training_target(workload: Workload, several: int) -> Target:
    cell = workload.cell
    if workload.batch == 1:
        return Target(_TRAIN_SINGLE_RATIOS[cell][several])
    return Target(_TRAIN_RATIOS[cell][several], _TRAIN_SHARES[cell] if workload.batch >= 8 and not several else None)
