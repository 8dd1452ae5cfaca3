"""What several commands do with a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gatewise as gw
from gatewise.running.network import Chain


def load(path: str) -> gw.Sequential:
    """The model in a file; a layer alone is a model of one."""
    made = gw.load(path)
    return made if isinstance(made, gw.Sequential) else gw.Sequential([made])


def described(of: Chain) -> str:
    layers = "1 layer" if len(of.stages) == 1 else f"{len(of.stages)} layers"
    return f"{layers}, {'tokens' if of.vocabulary is not None else of.sizes[0]} to {of.output_size}, {of.dtype}"


def why_not_in_pieces(of: Chain) -> str | None:
    """The layers that keep a model from streaming, and why; None if nothing does."""
    reasons = [f"layers[{i}]: {stage.looks_ahead}" for i, stage in enumerate(of.stages) if stage.looks_ahead]
    return "; ".join(reasons) or None


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    before = gw.get_num_threads()
    if count is not None:
        gw.set_num_threads(count)
    try:
        yield
    finally:
        gw.set_num_threads(before)
