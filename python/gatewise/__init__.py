"""gatewise: fast, small, trustworthy gated recurrent networks. LSTM, GRU and RNN: forward, training, step by step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise import startup  # noqa: F401  # comes before all that takes time or needs the core
from gatewise.arguments.sequences import pad, unpad
from gatewise.layers import GRU, LSTM, RNN
from gatewise.pools import Pool
from gatewise.settings import (
    _start,
    backend,
    backends,
    get_num_threads,
    release_memory,
    set_num_threads,
    show_config,
    use_backend,
)
from gatewise.streams import Stream
from gatewise.tapes import Gradients, Tape
from gatewise.traces import GRUTrace, LSTMTrace, RNNTrace, Trace

if TYPE_CHECKING:
    from gatewise import jax as jax
    from gatewise import plot as plot
    from gatewise import reference
    from gatewise import torch as torch
    from gatewise.blocks import (
        Activation,
        BatchNorm,
        Bidirectional,
        Conv1D,
        Dense,
        Dropout,
        Embedding,
        Last,
        LayerNorm,
        Masking,
        Normalization,
        Reverse,
        TimeDistributed,
    )
    from gatewise.formats import FormatError, Verification, load, save, verify
    from gatewise.sequential import Sequential

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Activation",
    "BatchNorm",
    "Bidirectional",
    "Conv1D",
    "Dense",
    "Dropout",
    "Embedding",
    "FormatError",
    "GRUTrace",
    "Gradients",
    "LSTMTrace",
    "Last",
    "LayerNorm",
    "Masking",
    "Normalization",
    "Pool",
    "RNNTrace",
    "Reverse",
    "Sequential",
    "Stream",
    "Tape",
    "TimeDistributed",
    "Trace",
    "Verification",
    "backend",
    "backends",
    "get_num_threads",
    "load",
    "pad",
    "reference",
    "release_memory",
    "save",
    "set_num_threads",
    "show_config",
    "unpad",
    "use_backend",
    "verify",
]

# What a program with a layer alone does not need is imported when it is asked for: that halves the time of the import.
_LATER = {
    **dict.fromkeys(
        (
            "Activation", "BatchNorm", "Bidirectional", "Conv1D", "Dense", "Dropout", "Embedding", "Last", "LayerNorm",
            "Masking", "Normalization", "Reverse", "TimeDistributed",
        ),
        "blocks",
    ),
    **dict.fromkeys(("FormatError", "Verification", "load", "save", "verify"), "formats"),
    "Sequential": "sequential",
}  # fmt: skip
_MODULES = ("jax", "plot", "reference", "torch")  # these may need packages that are not installed


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gatewise.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"gatewise.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    # Without _MODULES: help(gatewise) asks for each name, and would import PyTorch, or fail where it is missing.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


_start()
