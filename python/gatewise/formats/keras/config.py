"""The configuration of a layer of Keras: its options, read by name, or refused with the layer's and option's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gatewise.arguments.arrays import MAX_SIZE
from gatewise.formats.keras.hdf5 import MAX_NAME

PACKAGES = ("keras", "tf_keras")  # whose classes are Keras's own


class Entry(NamedTuple):
    """A serialised object: its class, its options, and its calls in a graph."""

    name: str
    kind: str  # its class
    config: Mapping[str, Any]
    nodes: Any

    @classmethod
    def of(cls, value: object, where: str) -> Entry:
        if not isinstance(value, Mapping) or not isinstance(value.get("class_name"), str):
            raise ValueError(f"{where}: expected a class and its config, got {value!r}")
        kind, config = value["class_name"], value.get("config")
        if isinstance(config, list):  # a Sequential of Keras 2 before 2.3
            config = {"layers": config}
        if not isinstance(config, Mapping):
            raise ValueError(f"{where}: {kind}: expected a config, got {config!r}")
        name = config.get("name", value.get("name", ""))
        if not isinstance(name, str) or max(len(name), len(kind)) > MAX_NAME:  # errors and paths repeat them
            raise ValueError(f"{where}: {kind[:100]}: expected a name of at most {MAX_NAME} characters")
        # The class of another package may have the name of one of Keras's.
        module = value.get("module", "keras")
        if not isinstance(module, str) or module.split(".")[0] not in PACKAGES:
            raise ValueError(f"layer {name!r} ({kind}): expected a class of Keras, got one of {module!r}")
        return cls(name, kind, config, value.get("inbound_nodes"))


@dataclass(frozen=True)
class LayerConfig:
    """A layer of the model, or one inside another layer, as the configuration describes it."""

    name: str
    kind: str  # its class
    config: Mapping[str, Any]
    group: str = ""  # of its weights in files of Keras 3
    key_prefix: str = ""  # of the keys of its weights, where it is inside another layer
    owner: int = 0  # the top-level layer that it is part of; files of Keras 2 list weights by these
    trains: bool = True
    is_modern: bool | None = True  # of Keras 3; None: the file does not tell
    takes_mask: bool = False  # as an argument of its call, which graphs of Keras 3 show

    def error(self, option: str, expected: str, value: object) -> ValueError:
        return self.refusal(f"{option}: expected {expected}, got {value!r}")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(f"layer {self.name!r} ({self.kind}): {reason}")

    def expect(self, option: str, *allowed: object, default: object = None) -> Any:
        """The value of an option that must be one of some values."""
        value = self.config.get(option, default)
        for candidate in allowed:
            if type(value) is type(candidate) and value == candidate:
                return value
        raise self.error(option, " or ".join(map(repr, allowed)), value)

    def flag(self, option: str, default: bool) -> bool:
        return bool(self.expect(option, True, False, default=default))

    def expect_off(self, *options: str) -> None:
        for option in options:
            self.expect(option, False, None)

    def size(self, option: str) -> int:
        return self.whole_number(option, single(self.config.get(option)))

    def whole_number(self, option: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise self.error(option, f"a whole number from 1 to {MAX_SIZE}", value)
        return value

    def number(self, option: str, default: float) -> float:
        value = self.config.get(option, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e30:
            raise self.error(option, "a number", value)
        return float(value)

    def check_axis(self, rank: int | None) -> None:
        """Refuse any axis but the last one, which holds the units; `rank` counts the axes, if the file tells."""
        value = single(self.config.get("axis", -1))
        if value != -1 and (rank is None or value != rank - 1):
            raise self.error("axis", "-1", self.config.get("axis"))

    def inner(self, option: str) -> LayerConfig:
        """A layer that is an option of this one."""
        entry = Entry.of(self.config.get(option), f"layer {self.name!r} ({self.kind}): {option}")
        inner = replace(self, name=entry.name or self.name, kind=entry.kind, config=entry.config)
        inner.check_options()
        return inner

    def policy(self) -> object:
        """The name of the dtype that the layer computes in."""
        policy = self.config.get("dtype")
        if not isinstance(policy, Mapping):
            return policy
        config = policy.get("config")
        return config.get("name") if isinstance(config, Mapping) else policy

    def check_options(self) -> None:
        """Refuse options that this reader does not know, such as those of later versions of Keras, unless off."""
        known = OPTIONS.get(self.kind)
        if known is None:  # the class is not known, either
            return
        for option, value in self.config.items():
            if option not in known and value not in (None, False) and not option.endswith(ONLY_TRAINING):
                raise self.error(option, "an option that gatewise knows, or None", value)


def single(value: object) -> Any:
    """The member of a list of one, which Keras writes for one dimension; any other value as it is."""
    values = as_list(value)
    return values[0] if values is not None and len(values) == 1 else value


def as_list(value: object) -> Sequence[Any] | None:
    """A list, or a tuple as some versions write it."""
    if isinstance(value, Mapping) and value.get("class_name") == "__tuple__":
        value = value.get("items")
    return value if isinstance(value, (list, tuple)) else None


# The options of each class that the reader computes, or that change nothing in inference.
ONLY_TRAINING = ("_initializer", "_regularizer", "_constraint")
_ALL = "name trainable dtype batch_shape batch_input_shape dynamic seed"
_CELL = "units activation use_bias dropout recurrent_dropout implementation"
_GATED = f"{_CELL} recurrent_activation"
_SEQUENCE = (
    "return_sequences return_state go_backwards stateful unroll time_major zero_output_for_mask input_dim input_length "
    "use_cudnn"
)
OPTIONS = {
    kind: set(f"{_ALL} {options}".split())
    for kind, options in {
        "InputLayer": "",
        "Dropout": "rate noise_shape",
        "SpatialDropout1D": "rate noise_shape",
        "GaussianNoise": "stddev",
        "GaussianDropout": "rate",
        "AlphaDropout": "rate noise_shape",
        "ActivityRegularization": "l1 l2",
        "Activation": "activation",
        "ReLU": "max_value negative_slope threshold",
        "LeakyReLU": "alpha negative_slope",
        "ThresholdedReLU": "theta",
        "ELU": "alpha",
        "Softmax": "axis robust_masking",
        "Masking": "mask_value",
        "Embedding": "input_dim output_dim mask_zero input_length lora_rank lora_alpha",
        "Dense": "units activation use_bias input_dim lora_rank lora_alpha",
        "Conv1D": "filters kernel_size strides padding data_format dilation_rate groups activation use_bias lora_rank "
        "lora_alpha",
        "LayerNormalization": "axis epsilon center scale rms_scaling",
        "BatchNormalization": "axis momentum epsilon center scale renorm renorm_clipping renorm_momentum fused "
        "virtual_batch_size synchronized",
        "Normalization": "axis mean variance invert",
        "TimeDistributed": "layer",
        "Flatten": "data_format",
        "Reshape": "target_shape",
        "LSTM": f"{_GATED} unit_forget_bias {_SEQUENCE}",
        "GRU": f"{_GATED} reset_after {_SEQUENCE}",
        "SimpleRNN": f"{_CELL} {_SEQUENCE}",
        "CuDNNLSTM": f"units unit_forget_bias {_SEQUENCE}",
        "CuDNNGRU": f"units {_SEQUENCE}",
        "LSTMCell": f"{_GATED} unit_forget_bias",
        "GRUCell": f"{_GATED} reset_after",
        "SimpleRNNCell": _CELL,
        "StackedRNNCells": "cells reverse_state_order",
        "RNN": f"cell {_SEQUENCE}",
        "Bidirectional": "layer backward_layer merge_mode",
    }.items()
}
