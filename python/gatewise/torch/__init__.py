"""LSTM, GRU, RNN and their cells for PyTorch: on gatewise where possible, otherwise on PyTorch's own code.

    import gatewise.torch

    gatewise.torch.accelerate(model)  # every torch.nn.LSTM, GRU, RNN and cell inside, in place

The classes are subclasses of torch.nn's, with the same constructor, parameters, initial numbers, state_dict and errors.
A call that gatewise does not support (another device or dtype, autocast, transforms of torch.func, forward-mode
derivatives, ...) goes to PyTorch's implementation; docs/pytorch.md has the table.
"""

try:
    from gatewise.torch.models import accelerate, accelerated, freeze, repack, restore, thaw
    from gatewise.torch.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "torch":
        raise
    raise ModuleNotFoundError("gatewise.torch needs PyTorch: pip install 'gatewise[torch]'") from error

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "accelerate",
    "accelerated",
    "freeze",
    "repack",
    "restore",
    "thaw",
]

# Pickles name the place where users find a class or a function, not the file that defines it.
for _name in __all__:
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
