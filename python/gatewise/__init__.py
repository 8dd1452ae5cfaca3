"""gatewise: fast, small, trustworthy gated recurrent networks. LSTM, GRU and RNN: forward, training, step by step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise import startup  # noqa: F401  # comes before all that takes time or needs the core
from gatewise.arguments.sequences import pad, unpad
from gatewise.layers.recurrent import GRU, LSTM, RNN
from gatewise.running.pools import Pool
from gatewise.running.streams import Stream
from gatewise.running.tapes import Gradients, Tape
from gatewise.running.traces import GRUTrace, LSTMTrace, RNNTrace, Trace
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
from gatewise.settings import (
    version as _version,
)

if TYPE_CHECKING:
    from gatewise import jax as jax
    from gatewise import plot as plot
    from gatewise import reference
    from gatewise import torch as torch
    from gatewise.formats import FormatError, Verification, load, save, verify
    from gatewise.layers.activation import Activation
    from gatewise.layers.normalization import BatchNorm, LayerNorm, Normalization
    from gatewise.layers.products import Conv1D, Dense, Embedding
    from gatewise.layers.sequential import Sequential
    from gatewise.layers.structure import Bidirectional, Dropout, Last, Masking, Reverse, TimeDistributed

__version__ = _version()

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

# What a program with only a recurrent layer does not need is imported when it is asked for: that halves the time of the
# import.
_LATER = {
    "formats": ("FormatError", "Verification", "load", "save", "verify"),
    "layers.activation": ("Activation",),
    "layers.normalization": ("BatchNorm", "LayerNorm", "Normalization"),
    "layers.products": ("Conv1D", "Dense", "Embedding"),
    "layers.sequential": ("Sequential",),
    "layers.structure": ("Bidirectional", "Dropout", "Last", "Masking", "Reverse", "TimeDistributed"),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}
_MODULES = ("jax", "plot", "reference", "torch")  # these may need packages that are not installed


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gatewise.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"gatewise.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    # Without _MODULES: help(gatewise) asks for each name, and would import PyTorch, or fail where it is missing.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


_start()
