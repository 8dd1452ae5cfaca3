"""Makes ONNX files as tf2onnx wrote them: `python tests/data/make_tf2onnx.py FOLDER`.

In an environment of its own, as Keras 2 needs an old TensorFlow:
pip install 'tensorflow-cpu==2.15.1' 'tf2onnx==1.17.0'.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from make_keras2 import fill

Case = tuple[Any, tuple[int, ...], int]  # a model, the shape of an input, the operator set


def models() -> dict[str, Case]:
    """Models by name, which together have what tf2onnx writes in a way of its own."""
    import keras
    from keras import layers as of

    def sequence(*layers: Any, shape: tuple[int | None, ...] = (None, 4)) -> Any:
        return keras.Sequential([keras.Input(shape), *layers])

    def both(layer: Any, mode: str = "concat") -> Any:
        return of.Bidirectional(layer, merge_mode=mode)

    return {
        "tf2onnx_ends": (
            sequence(
                both(of.LSTM(5, return_sequences=True)), of.Dropout(0.1),
                both(of.GRU(4, return_sequences=True), "mul"), both(of.GRU(4)),
                of.Dense(4, activation="hard_sigmoid"), of.Dense(3), of.ReLU(6.0), of.Dense(2),
            ), (3, 9, 4), 17,
        ),
        "tf2onnx_tokens": (
            sequence(
                of.Embedding(20, 6), both(of.GRU(3, return_sequences=True), "sum"),
                of.TimeDistributed(of.Dense(4, activation="gelu")), both(of.LSTM(3), "ave"),
                of.Dense(3, activation="softmax"), shape=(9,),
            ), (3, 9), 13,
        ),
        "tf2onnx_around": (
            sequence(
                of.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="relu"), of.BatchNormalization(),
                of.LSTM(4, return_sequences=True), of.LayerNormalization(), of.Dense(4, activation="swish"),
                of.LayerNormalization(epsilon=1e-6), of.Conv1D(3, 3, padding="same"), of.Dense(3), of.LeakyReLU(),
            ), (3, 9, 4), 17,
        ),
        "tf2onnx_chain": (
            sequence(
                of.LayerNormalization(), of.Dense(5, activation="elu"), of.LSTM(4, return_sequences=True),
                of.BatchNormalization(), of.Dense(3), of.LayerNormalization(epsilon=1e-6, center=False),
                of.LSTM(3), of.Dense(3, activation="tanh"), of.LayerNormalization(epsilon=1e-6, scale=False),
            ), (3, 9, 4), 18,
        ),
    }  # fmt: skip


def main() -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import tensorflow as tf
    import tf2onnx

    folder = Path(sys.argv[1])
    generator = np.random.default_rng(0)
    for name, (model, shape, version) in models().items():
        fill(model, generator)
        tokens = len(shape) == 2
        x = generator.integers(20, size=shape) if tokens else generator.normal(size=shape).astype("float32")
        np.savez(folder / f"{name}.npz", x=x, y=np.asarray(model(x, training=False)))
        signature = tf.TensorSpec(model.input_shape, tf.int32 if tokens else tf.float32, name="x")
        path = os.fspath(folder / f"{name}.onnx")
        tf2onnx.convert.from_keras(model, input_signature=[signature], opset=version, output_path=path)


if __name__ == "__main__":
    main()
