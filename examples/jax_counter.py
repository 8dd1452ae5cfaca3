"""A bidirectional GRU in JAX, trained with optax on lax.scan and on gatewise.jax: the same losses, less time.

    python examples/jax_counter.py  # needs pip install 'gatewise[jax]' optax

The task: say at each step whether the numbers so far have a positive sum. One sequence a call; vmap makes the batch.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import gatewise
import gatewise.jax
import jax
import jax.numpy as jnp
import numpy as np
import optax

LENGTH, SEQUENCES = 100, 32

Parameters = Mapping[str, Any]


def scanned(p: Parameters, x: jax.Array) -> jax.Array:
    """x (T, I) -> (T, 2 * H), as it is written without gatewise."""

    def one_way(suffix: str) -> jax.Array:
        sums = x @ p[f"weight_ih_l0{suffix}"].T + p[f"bias_ih_l0{suffix}"]  # (T, 3 * H)

        def step(h: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_r, x_z, x_n = jnp.split(sums, 3)
            h_r, h_z, h_n = jnp.split(p[f"weight_hh_l0{suffix}"] @ h + p[f"bias_hh_l0{suffix}"], 3)
            z = jax.nn.sigmoid(x_z + h_z)
            h = (1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * h
            return h, h

        zero = jnp.zeros(sums.shape[1] // 3)
        return jax.lax.scan(step, zero, sums, reverse=suffix != "")[1]

    return jnp.concatenate([one_way(""), one_way("_reverse")], -1)


def on_gatewise(p: Parameters, x: jax.Array) -> jax.Array:
    return gatewise.jax.gru(p, x)[0]


def sequences(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (steps, B, T, 1) and answers (steps, B, T)."""
    x = np.random.default_rng(1).standard_normal((steps, SEQUENCES, LENGTH, 1)).astype("float32")
    return x, (np.cumsum(x[..., 0], -1) > 0).astype("float32")


def train(layer: Callable[[Parameters, jax.Array], jax.Array], hidden: int, steps: int) -> tuple[list[float], float]:
    """Losses, and seconds after the first step, which compiles."""
    model = {
        "gru": {name: jnp.asarray(value) for name, value in
                gatewise.GRU(1, hidden, bidirectional=True, seed=0).state_dict().items()},
        "head": jnp.asarray(np.random.default_rng(0).standard_normal(2 * hidden) / hidden, "float32"),
    }  # fmt: skip
    optimizer = optax.adam(1e-3)
    state = optimizer.init(model)

    def loss(model: Any, x: jax.Array, answers: jax.Array) -> jax.Array:
        logits = jax.vmap(lambda x: layer(model["gru"], x) @ model["head"])(x)  # (B, T)
        return optax.sigmoid_binary_cross_entropy(logits, answers).mean()

    @jax.jit
    def step(model: Any, state: Any, x: jax.Array, answers: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(model, x, answers)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(model, updates), state, value

    losses, start = [], 0.0
    for x, answers in zip(*sequences(steps), strict=True):
        model, state, value = step(model, state, x, answers)
        losses.append(float(value))
        start = start or time.perf_counter()
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    curves = {}
    for name, layer in (("lax.scan", scanned), ("gatewise", on_gatewise)):
        losses, seconds = train(layer, options.hidden, options.steps)
        curves[name] = np.array(losses)
        print(f"{name:9}  loss {losses[0]:.4f} -> {losses[-1]:.4f}  {seconds:6.2f} s")
    print(f"largest difference of the two curves: {np.abs(curves['lax.scan'] - curves['gatewise']).max():.1e}")


if __name__ == "__main__":
    main()
