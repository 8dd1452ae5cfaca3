"""Makes the models that test_keras.py reads, with Keras: `python tests/data/make_keras.py FOLDER [--all]`.

Without --all only the files that the repository has, so that tests need no Keras.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# One file of each kind; each of them is a model with much in it.
COMMITTED = {"stack": ".keras", "around": ".h5", "chain": ".weights.h5", "masked_graph": ".keras"}


def models() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Models by name, with the shape of an input."""
    import keras
    from keras import layers as of

    def sequence(*layers: Any, shape: tuple[int | None, ...] = (None, 4), **options: Any) -> Any:
        return keras.Sequential([keras.Input(shape, **options), *layers])

    numbers = 3, 9, 4
    models: dict[str, tuple[Any, tuple[int, ...]]] = {
        "stack": (
            sequence(
                of.Embedding(20, 6), of.LSTM(5, return_sequences=True, name="mine", dropout=0.2), of.Dropout(0.5),
                of.Bidirectional(of.GRU(3, return_sequences=True), merge_mode="sum"), of.SimpleRNN(4),
                of.Dense(3, activation="softmax"), shape=(None,),
            ), (3, 9),
        ),
        "around": (
            sequence(
                of.Normalization(mean=[0.1, 0.2, 0.3, -1], variance=[1, 2, 0.5, 3]), of.Conv1D(5, 3, padding="causal"),
                of.BatchNormalization(), of.ReLU(), of.GRU(4, return_sequences=True, reset_after=False),
                of.LayerNormalization(), of.TimeDistributed(of.Dense(3, activation="elu")),
                of.RNN([of.LSTMCell(3), of.GRUCell(2)]),
            ), numbers,
        ),
        "affine": (
            sequence(
                of.BatchNormalization(scale=False), of.BatchNormalization(center=False, epsilon=0.1),
                of.BatchNormalization(center=False, scale=False), of.LayerNormalization(scale=False),
                of.LayerNormalization(center=False, epsilon=0.1), of.LayerNormalization(center=False, scale=False),
                of.Normalization(mean=1.0, variance=2.0), of.Conv1D(3, 4, padding="same", use_bias=False),
                of.Conv1D(4, 2, padding="causal", dilation_rate=3, activation="tanh"), of.Conv1D(5, 1),
                of.TimeDistributed(of.LayerNormalization()),
            ), numbers,
        ),
        "activations": (
            sequence(
                *(of.Dense(4, activation=name) for name in (
                    "relu", "tanh", "sigmoid", "softmax", "hard_sigmoid", "elu", "leaky_relu", "gelu", "softplus", None,
                )),
                of.Dense(5, activation=of.LeakyReLU(0.4)), of.Activation("tanh"), of.ReLU(negative_slope=0.1),
                of.LeakyReLU(), of.ELU(0.7), of.Softmax(), of.Activation("linear"),
            ), numbers,
        ),
        "plain": (
            sequence(
                of.LSTM(3, use_bias=False, return_sequences=True), of.GRU(4, use_bias=False, return_sequences=True),
                of.SimpleRNN(5, use_bias=False, activation="relu", return_sequences=True),
                of.GRU(4, use_bias=False, reset_after=False),
                of.Flatten(), of.Reshape((4,)), of.BatchNormalization(), of.Dense(2, use_bias=False),
            ), numbers,
        ),
        "cells": (
            sequence(
                of.RNN(of.LSTMCell(3), return_sequences=True), of.RNN(of.GRUCell(4, reset_after=False),
                return_sequences=True), of.RNN(of.SimpleRNNCell(3, activation="relu"), return_sequences=True),
                of.RNN([of.GRUCell(3), of.GRUCell(3), of.LSTMCell(2, use_bias=False)], return_sequences=True),
                of.SpatialDropout1D(0.1), of.GaussianNoise(0.3), of.ActivityRegularization(0.1),
            ), numbers,
        ),
        "masked": (
            sequence(
                of.Masking(-1.0), of.Dropout(0.1), of.LSTM(3, return_sequences=True), of.LayerNormalization(),
                of.Dense(4, activation="tanh"), of.Bidirectional(of.GRU(3, return_sequences=True)),
                of.RNN([of.GRUCell(3), of.LSTMCell(2)], return_sequences=True),
                of.Bidirectional(of.LSTM(3), merge_mode="mul"), of.Dense(3),
            ), numbers,
        ),
        "masked_tokens": (
            sequence(
                of.Embedding(20, 6, mask_zero=True), of.TimeDistributed(of.Dense(5)),
                of.GRU(4, return_sequences=True, recurrent_activation="hard_sigmoid"),
                of.LSTM(3, go_backwards=True), of.Dense(3, activation="softmax"), shape=(None,),
            ), (3, 9),
        ),
        "masks_that_end": (
            sequence(
                of.Embedding(20, 6, mask_zero=True), of.Dense(4), of.Conv1D(5, 3, padding="causal"),
                of.LSTM(3, return_sequences=True), shape=(None,),
            ), (3, 9),
        ),
        "unused_mask": (sequence(of.Masking(), of.Dense(3), of.Conv1D(2, 2, padding="same"), of.Dense(1)), numbers),
        "backwards": (
            sequence(
                of.LSTM(4, go_backwards=True, return_sequences=True), of.GRU(3, return_sequences=True),
                of.RNN(of.SimpleRNNCell(3), go_backwards=True, return_sequences=True), of.GRU(3, go_backwards=True),
                of.Dense(2),
            ), numbers,
        ),
        "functions": (
            sequence(
                *(of.LSTM(3, return_sequences=True, activation=name, recurrent_activation=gate) for name, gate in (
                    ("softsign", "hard_sigmoid"), ("relu", "sigmoid"), ("silu", "softplus"),
                )),
                *(of.GRU(3, return_sequences=True, activation=name, reset_after=after) for name, after in (
                    ("selu", True), ("elu", False), ("linear", True),
                )),
                of.GRU(3, return_sequences=True, recurrent_activation="hard_sigmoid"),
                *(of.SimpleRNN(3, return_sequences=True, activation=name) for name in (
                    "sigmoid", "gelu", "leaky_relu", "linear",
                )),
                *(of.Dense(4, activation=name) for name in ("selu", "softsign", "silu")), of.ReLU(threshold=0.2),
                of.Bidirectional(of.LSTM(3, activation="softsign")),
            ), numbers,
        ),
        "steps": (sequence(of.Dense(3), of.BatchNormalization(), of.Dense(2, activation="tanh"), shape=(4,)), (6, 4)),
    }  # fmt: skip
    for mode in ("concat", "sum", "mul", "ave"):
        both = [of.Bidirectional(cell(3, return_sequences=True), merge_mode=mode) for cell in (of.LSTM, of.GRU)]
        models[f"both_{mode}"] = sequence(*both, of.Bidirectional(of.SimpleRNN(2), merge_mode=mode)), numbers
    frozen = sequence(of.Dense(4), of.BatchNormalization(), of.Dense(3), name="before")
    frozen.layers[1].trainable = False
    inputs = keras.Input((None, 3), name="inside")
    inner = keras.Model(inputs, of.Dense(3)(of.BatchNormalization()(of.LSTM(3, return_sequences=True)(inputs))))
    inputs = keras.Input((9, 4), batch_size=3)
    chain = of.LSTM(3, stateful=True)(of.Dropout(0.1)(inner(frozen(inputs))))
    models["chain"] = keras.Model(inputs, of.Dense(2)(chain)), numbers
    models["masked_graphs"] = masked_graph(of.Embedding(20, 5, mask_zero=True), (None,)), (3, 9)
    models["masked_graph"] = masked_graph(of.Masking(-1.0), (None, 4)), numbers
    adapted = of.Normalization()
    adapted.adapt(np.random.default_rng(1).normal(2, 3, (50, 9, 4)))
    trained = sequence(adapted, of.LSTM(3, return_sequences=True), of.LSTM(2), shape=(9, 4))
    trained.compile("adam", "mse")
    trained.fit(np.ones((2, 9, 4)), np.ones((2, 2)), verbose=0)
    models["trained"] = trained, numbers
    keras.config.set_dtype_policy("float64")
    models["wide"] = sequence(of.LSTM(3, return_sequences=True), of.BatchNormalization(), of.GRU(2)), numbers
    keras.config.set_dtype_policy("float32")
    return models


def masked_graph(first: Any, shape: tuple[int | None, ...]) -> Any:
    """A functional model, in which Keras 3 writes the making of the mask, too."""
    import keras
    from keras import layers as of

    inputs = keras.Input(shape)
    x = of.Bidirectional(of.LSTM(3, return_sequences=True))(of.Dense(4)(first(inputs)))
    return keras.Model(inputs, of.Dense(2)(of.GRU(3)(x)))


def mask(x: Any, value: float) -> None:
    """Steps in front, in the middle and at the end, and a whole row."""
    for place in ((0, slice(6, None)), (1, slice(0, 3)), (1, 5), (2, slice(None))):
        x[place] = value


def fill(model: Any, generator: np.random.Generator) -> None:
    """Weights of which none is what an initialiser gives: biases and statistics, too."""
    values = []
    for weight in model.weights:
        value = generator.normal(0, 0.5, weight.shape)
        is_positive = weight.path.endswith(("moving_variance", "variance", "gamma"))
        values.append(np.abs(value) + 0.5 if is_positive else value)
    model.set_weights(values)


def main() -> None:
    os.environ |= {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = Path(sys.argv[1])
    import keras

    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    for name, (model, shape) in models().items():
        if "--all" not in sys.argv and name not in COMMITTED:
            continue
        if name != "trained":
            fill(model, generator)
        is_text = len(shape) == 2 and name != "steps"
        # Whole numbers for tokens; else what float32 has, which inputs of Keras are whatever the dtype of its layers.
        x = generator.integers(0, 20, shape) if is_text else generator.normal(size=shape).astype("float32")
        if "mask" in name:
            mask(x, 0 if is_text else -1)
        y = np.asarray(model(x, training=False))
        np.savez(folder / f"{name}.npz", x=x, y=y)
        for ending in (".keras", ".h5", ".weights.h5"):
            if "--all" not in sys.argv and COMMITTED[name] != ending:
                continue
            (model.save_weights if ending == ".weights.h5" else model.save)(folder / f"{name}{ending}")
            if ending == ".weights.h5":
                described = json.dumps(json.loads(model.to_json()), indent=1)
                (folder / f"{name}.json").write_text(described + "\n")


if __name__ == "__main__":
    main()
