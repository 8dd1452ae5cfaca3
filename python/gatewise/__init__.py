"""gatewise: fast, small, trustworthy gated recurrent networks. LSTM, GRU and RNN: forward, training, step by step."""

from gatewise import reference
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
    Normalization,
    TimeDistributed,
)
from gatewise.formats import FormatError, Verification, load, save, verify
from gatewise.layers import GRU, LSTM, RNN
from gatewise.pools import Pool
from gatewise.sequences import pad, unpad
from gatewise.sequential import Sequential
from gatewise.settings import (
    _start,
    backend,
    backends,
    get_num_threads,
    set_num_threads,
    show_config,
    use_backend,
)
from gatewise.streams import Stream
from gatewise.tapes import Gradients, Tape
from gatewise.traces import GRUTrace, LSTMTrace, RNNTrace, Trace

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
    "Normalization",
    "Pool",
    "RNNTrace",
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
    "save",
    "set_num_threads",
    "show_config",
    "unpad",
    "use_backend",
    "verify",
]

_start()
