"""LSTM, GRU and RNN as functions for JAX: run by gatewise's core on a CPU, and by XLA on other devices.

    import gatewise.jax

    parameters = gatewise.LSTM(64, 128).state_dict()  # or any mapping of these names to arrays
    y, (h, c) = gatewise.jax.lstm(parameters, x)

They work inside jit, grad, vmap, scan, checkpoint and each other, in forward and reverse mode, to any order.

Each call is a primitive of JAX with its own rules, not a custom_vjp. Under grad(vmap(f)) a custom_vjp would run
backward once for each example; with our own rules both forward and backward run once for the whole batch.

    recurrent  the call itself: output and state after
    recorded   the same with a tape, where a derivative follows
    tangent    the derivative, linear in the tangents; reverse mode transposes it into
    backward   the gradients, from the tape

Their operands are flat: x, h (and c), lengths and resets if there are any, weights in PyTorch's order.
"""

try:
    import jax.ffi  # noqa: F401  # the newest of the modules that the others need
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gatewise.jax needs JAX: pip install 'gatewise[jax]'") from error

from gatewise.jax import batching as batching  # registers the rules for vmap
from gatewise.jax.functions import gru, lstm, rnn

__all__ = ["gru", "lstm", "rnn"]
