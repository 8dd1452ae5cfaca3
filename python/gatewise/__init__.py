"""gatewise: fast, small, trustworthy gated recurrent networks. LSTM, GRU and RNN: forward, training, step by step."""

from gatewise import reference
from gatewise.layers import GRU, LSTM, RNN
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

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Gradients",
    "Stream",
    "Tape",
    "backend",
    "backends",
    "get_num_threads",
    "reference",
    "set_num_threads",
    "show_config",
    "use_backend",
]

_start()
