"""Models of every layer, and changes to the files that hold them."""

import json

import gatewise as gw
import numpy as np
from conftest import make_layer

LAYERS = [
    ("lstm", {}),
    ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 3, "dropout": 0.25, "batch_first": True}),
    ("gru", {"bias": False, "seed": 2**64 - 1}),
    ("gru", {"reset_after": False}),
    ("rnn_tanh", {"num_layers": 3}),
    ("rnn_relu", {"bidirectional": True}),
]

MODELS = {
    "tagger": lambda dtype: [
        gw.Embedding(11, 6, dtype=dtype),
        gw.Bidirectional(make_layer("lstm", 6, 5, bidirectional=True, dtype=dtype), "ave"),
        gw.Dropout(0.1),
        gw.TimeDistributed(gw.Dense(5, 4, activation="softmax", dtype=dtype)),
    ],
    "classifier": lambda dtype: [
        gw.Dropout(1),
        gw.Conv1D(3, 6, 2, dilation=3, activation=gw.Activation("leaky_relu", 0.3), dtype=dtype),
        gw.Conv1D(6, 6, 3, padding="same", bias=False, dtype=dtype),
        gw.BatchNorm(6, eps=1e-3, dtype=dtype),
        make_layer("gru", 6, 7, 2, dropout=0.25, seed=2**64 - 1, dtype=dtype),
        gw.Last(),
        gw.LayerNorm(7, eps=0.125, bias=False, dtype=dtype),
        gw.Dense(7, 2, bias=False, activation=gw.Activation("elu", 1 / 3), dtype=dtype),
        gw.Activation("softmax"),
    ],
    "projected": lambda dtype: [
        gw.Normalization(4, dtype=dtype),
        make_layer("lstm", 4, 9, 2, bidirectional=True, proj_size=3, dtype=dtype),
        make_layer("rnn_relu", 6, 5, dtype=dtype),
        make_layer("rnn_tanh", 5, 5, dtype=dtype),
        make_layer("gru", 5, 5, reset_after=False, dtype=dtype),
        gw.LayerNorm(5, elementwise_affine=False, dtype=dtype),
        gw.BatchNorm(5, affine=False, dtype=dtype),
        gw.Activation("elu"),
        gw.TimeDistributed(gw.TimeDistributed(gw.Activation("leaky_relu", -2.5))),
    ],
    "batch first": lambda dtype: [
        gw.Bidirectional(make_layer("gru", 3, 4, bidirectional=True, batch_first=True, dtype=dtype), "mul")
    ],
    **{
        merge: lambda dtype, merge=merge: [
            gw.Bidirectional(make_layer("rnn_relu", 3, 4, bidirectional=True, dtype=dtype), merge)
        ]
        for merge in ("concat", "sum")
    },
}


def make_model(layers, **options):
    """A model of these layers, none of whose weights is as it was drawn; variances stay positive."""
    model = gw.Sequential(layers, **options)
    with model.edit() as weights:
        for i, value in enumerate(weights.values()):
            value[...] = np.random.default_rng(i).uniform(0.1, 1, value.shape)
    for i, layer in enumerate(model):
        layer = getattr(layer, "layer", layer)
        if hasattr(layer, "call_count"):
            layer.call_count = 2**64 - 1 - i
    return model


def parts(path):
    """The header and the numbers of a file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write(path, header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


def change_model(**changes):
    def change(header):
        model = {**json.loads(header["__metadata__"]["model"]), **changes}
        model = {name: value for name, value in model.items() if value is not ...}
        header["__metadata__"]["model"] = json.dumps(model)

    return change


def change_metadata(**changes):
    return lambda header: header["__metadata__"].update(changes)


def change_tensor(**changes):
    return lambda header: header["weight_hh_l0"].update(changes)


def without(name):
    return lambda header: header.pop(name)


DENSE = {
    "kind": "Dense",
    "in_features": 3,
    "out_features": 2,
    "bias": True,
    "dtype": "float32",
    "activation": {"kind": "Activation", "name": "elu", "alpha": 0.5},
}


def change_activation(**changes):
    activation = {**DENSE["activation"], **changes}
    return {"activation": {name: value for name, value in activation.items() if value is not ...}}


def write_model(path, layers, header=None, numbers=b"", **changes):
    """Write a file that describes a model of these layers."""
    description = {"kind": "Sequential", "batch_first": False, "layers": layers, **changes}
    description = {name: value for name, value in description.items() if value is not ...}
    tensors = {name: entry for name, entry in (header or {}).items() if name != "__metadata__"}
    return write(path, {"__metadata__": {"gatewise": "1", "model": json.dumps(description)}, **tensors}, numbers)
