"""A model while its layers are added one after another: what comes out of the last one, and which steps are masked."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from gatewise.arguments.arrays import Array
from gatewise.formats.keras.config import LayerConfig, as_list
from gatewise.formats.keras.weights import WeightReader
from gatewise.layers.products import Embedding
from gatewise.layers.structure import Masking
from gatewise.weights.module import Module

MAX_REPEATED = 2**20  # numbers of all layers that are copies of a single number in the configuration


class Mask(Enum):
    """What happened to the steps that a layer masks."""

    NONE = "none are masked"
    PENDING = "no layer has looked at them yet"
    USED = "a recurrent layer has left them out"


class Builder:
    """The layers made so far.

    Attributes
    ----------
    rank : int or None
        Axes of the last layer's output, with the batch; None: the file does not tell.
    units : int or None
        The size of the last axis.
    policies : list
        The dtypes that layers compute in, to be compared with that of the weights at the end.
    copies_left : int
        How many more numbers may be copies of a single number in the configuration.
    """

    def __init__(self, weights: WeightReader) -> None:
        self.weights = weights
        self.layers: list[Module] = []
        self.rank: int | None = None
        self.units: int | None = None
        self.mask = Mask.NONE
        self.policies: list[tuple[LayerConfig, object]] = []
        self.copies_left = MAX_REPEATED

    def add(self, layer: Module, arrays: Mapping[str, object] | None = None, units: int | None = None) -> None:
        if arrays is not None:
            layer.load_state_dict(arrays)
        self.layers.append(layer)
        self.units = self.units if units is None else units

    def read(self, layer: LayerConfig, key: str, *shape: int | None) -> Array:
        return self.weights.read(layer, key, *shape)

    def start(self, layer: LayerConfig) -> None:
        """Note a layer's dtype, and if it is the first one, the shape of the model's input."""
        self.policies.append((layer, layer.policy()))
        shape = as_list(layer.config.get("batch_shape", layer.config.get("batch_input_shape")))
        if shape is None or self.layers or self.rank is not None:
            return
        if len(shape) not in (1, 2, 3):
            raise layer.error("batch_shape", "sequences (batch, steps, units)", list(shape))
        self.rank = len(shape)
        self.units = shape[-1] if isinstance(shape[-1], int) and shape[-1] > 0 else None

    def expect_sequences(self, layer: LayerConfig) -> None:
        """Note that a layer needs sequences."""
        if self.rank not in (None, 3):
            raise layer.refusal(f"expected sequences (batch, steps, units) before it, got {self.rank} axes")
        self.rank = 3

    def use_mask(self, layer: LayerConfig) -> None:
        """Note that a recurrent layer leaves out the masked steps."""
        if self.mask is Mask.NONE and layer.takes_mask:
            raise layer.error("mask", "None in its call, since a layer before it ends the mask", layer.takes_mask)
        if self.mask is Mask.PENDING:
            self.mask = Mask.USED

    def end_mask(self, layer: LayerConfig) -> None:
        """Note that a layer looks at all steps: in Keras nothing is masked after it."""
        if self.mask is Mask.USED:
            raise layer.refusal("expected no masked steps before it, since their outputs differ in Keras")
        if self.mask is Mask.PENDING and not self.drop_mask():
            raise layer.refusal("expected a Masking of mask_value=0 before it, at which the mask ends")

    def drop_mask(self) -> bool:
        """Remove a mask that no recurrent layer looks at; whether the model is still the same.

        A Masking sets the masked steps to zero, which changes nothing only where they are zero already.
        """
        self.mask = Mask.NONE
        first = self.layers[0]
        if isinstance(first, Embedding):
            weight = first.parameters["weight"]
            self.layers[0] = plain = Embedding(first.num_embeddings, first.embedding_dim, dtype=weight.dtype, seed=0)
            plain.load_state_dict({"weight": weight})
            return True
        del self.layers[0]
        return isinstance(first, Masking) and first.mask_value == 0
