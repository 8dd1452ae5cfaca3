"""Makes files as Keras 2 wrote them: `python tests/data/make_keras2.py FOLDER`.

In an environment of its own, as Keras 2 needs an old TensorFlow: pip install 'tensorflow-cpu==2.15.1'.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# One of each kind of file: whole models in both of its formats, and only weights.
COMMITTED = {"keras2_gates": ".h5", "keras2_masks": ".keras", "keras2_chain": ".weights.h5"}


def models() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Models by name, with the shape of an input."""
    import keras
    from keras import layers as of

    def sequence(*layers: Any, shape: tuple[int | None, ...] = (None, 4)) -> Any:
        return keras.Sequential([keras.Input(shape), *layers])

    frozen = sequence(of.Dense(4), of.BatchNormalization(), of.Dense(3))
    frozen.layers[1].trainable = False
    inputs = keras.Input((9, 4))
    chain = keras.Model(inputs, of.Dense(2)(of.RNN([of.LSTMCell(3), of.GRUCell(2)])(of.Dropout(0.1)(frozen(inputs)))))
    return {
        "keras2_gates": (
            sequence(
                of.LSTM(4, return_sequences=True, recurrent_activation="hard_sigmoid"),
                of.GRU(3, return_sequences=True, recurrent_activation="hard_sigmoid", reset_after=False),
                of.SimpleRNN(3, return_sequences=True, activation="relu"),
                of.Bidirectional(of.LSTM(3, activation="softsign"), merge_mode="ave"),
                of.Dense(3, activation="hard_sigmoid"),
            ), (3, 9, 4),
        ),
        "keras2_masks": (
            sequence(
                of.Embedding(20, 6, mask_zero=True), of.Bidirectional(of.GRU(3, return_sequences=True)),
                of.LSTM(3, go_backwards=True), of.Dense(3, activation="swish"), shape=(None,),
            ), (3, 9),
        ),
        "keras2_chain": (chain, (3, 9, 4)),
    }  # fmt: skip


def fill(model: Any, generator: np.random.Generator) -> None:
    """Weights of which none is what an initialiser gives: biases and statistics, too."""
    values = []
    for weight in model.weights:
        value = generator.normal(0, 0.5, weight.shape)
        values.append(np.abs(value) + 0.5 if "variance" in weight.name or "gamma" in weight.name else value)
    model.set_weights(values)


def main() -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = Path(sys.argv[1])
    generator = np.random.default_rng(0)
    for name, (model, shape) in models().items():
        fill(model, generator)
        if len(shape) == 2:
            x = generator.integers(1, 20, shape)
            x[0, 6:] = x[1, :3] = x[1, 5] = x[2] = 0  # masked
        else:
            x = generator.normal(size=shape).astype("float32")
        np.savez(folder / f"{name}.npz", x=x, y=np.asarray(model(x, training=False)))
        if name == "keras2_chain":
            model.save_weights(folder / f"{name}.h5")  # which another ending would write as Keras 3 does
            (folder / f"{name}.h5").rename(folder / f"{name}{COMMITTED[name]}")
            (folder / f"{name}.json").write_text(model.to_json() + "\n")
        else:
            model.save(folder / f"{name}{COMMITTED[name]}")


if __name__ == "__main__":
    main()
