"""Reasons why a peer takes no part in a workload. Each function returns one, or None if it does not apply."""

from __future__ import annotations

from ..workloads import HOMES, NETWORK, RESETS, RUN, TRAIN, Workload


def other_framework(workload: Workload, framework: str = "") -> str | None:
    """For all but the framework in which a workload takes place."""
    home = HOMES.get(workload.mode, framework)
    return None if home == framework else f"measured in {home} only"


def training(workload: Workload) -> str | None:
    return "inference only" if workload.mode == TRAIN else None


def float64(workload: Workload) -> str | None:
    return "computes in float32 only" if workload.dtype == "float64" else None


def uneven_rows(workload: Workload) -> str | None:
    is_even = workload.lengths is None and workload.resets is None
    return None if is_even else "measured without lengths and resets"


def resets(workload: Workload) -> str | None:
    return "has no resets within a sequence" if workload.rows == RESETS else None


def blocks_of_steps(workload: Workload) -> str | None:
    return "measured without blocks of a stream" if workload.mode == RUN else None


def networks(workload: Workload) -> str | None:
    return "measured with single layers only" if workload.mode == NETWORK else None
