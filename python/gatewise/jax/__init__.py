"""LSTM, GRU and RNN as functions for JAX: on a CPU by gatewise's core, on other devices by XLA.

    import gatewise.jax

    parameters = gatewise.LSTM(64, 128).state_dict()  # or any mapping of these names to arrays
    y, (h, c) = gatewise.jax.lstm(parameters, x)

They work inside jit, grad, vmap, scan, checkpoint and each other, forward and reverse mode, to any order.

Each call is a primitive of JAX with rules of its own, not a custom_vjp: that would take the derivative first and put
the batch of a vmap through backward example by example, where grad(vmap(f)) can have one batch, forward and backward.

    recurrent  what is called: output and state after
    recorded   the same with a tape, where a derivative is to follow
    tangent    the derivative, linear in the tangents; reverse mode turns it round into
    backward   the gradients, from the tape

Their operands are flat: x, h (and c), lengths and resets where there are any, weights in PyTorch's order.
"""

try:
    import jax.ffi  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gatewise.jax needs JAX: pip install 'gatewise[jax]'") from error

from gatewise.jax import batching as batching  # which gives the primitives their rules of vmap
from gatewise.jax.functions import gru, lstm, rnn

__all__ = ["gru", "lstm", "rnn"]
