"""What the commands share that load a model and run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gatewise as gw
from gatewise.running.network import Chain


def load_model(path: str) -> gw.Sequential:
    """Load a model; a layer by itself becomes a model of one layer."""
    model = gw.load(path)
    return model if isinstance(model, gw.Sequential) else gw.Sequential([model])


def summary(chain: Chain) -> str:
    """The number of layers, the sizes of input and output, and the dtype."""
    layers = "1 layer" if len(chain.stages) == 1 else f"{len(chain.stages)} layers"
    input_size = "tokens" if chain.vocabulary is not None else chain.sizes[0]
    return f"{layers}, {input_size} to {chain.output_size}, {chain.dtype}"


def streaming_obstacles(chain: Chain) -> str | None:
    """The layers that keep a model from streaming, each with its reason; None if there are none."""
    reasons = [
        f"layers[{i}]: {stage.streaming_obstacle}" for i, stage in enumerate(chain.stages) if stage.streaming_obstacle
    ]
    return "; ".join(reasons) or None


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Set the number of threads; None leaves it as it is."""
    before = gw.get_num_threads()
    if count is not None:
        gw.set_num_threads(count)
    try:
        yield
    finally:
        gw.set_num_threads(before)
