"""Packed weights, and how long those of an earlier call are current."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

import gatewise._core as _core
from gatewise.torch.architectures import weights_by_sequence
from gatewise.torch.tensors import DTYPES, dense, tensor_library
from gatewise.weights.architecture import Architecture


class Cache(NamedTuple):
    """Weights that were packed for a module, and the module itself, whose end is the end of the cache."""

    module: ref[torch.nn.Module]
    architecture: Architecture
    weights: _core.TensorWeights


# The keys are id(module): a lookup in a WeakKeyDictionary takes half a microsecond, a third of a cell's step.
caches: dict[int, Cache] = {}
packing_now: dict[int, object] = {}  # a token for each module whose weights are being packed

frozen_modules: WeakSet[torch.nn.Module] = WeakSet()


def pack(architecture: Architecture, weights: Sequence[Tensor]) -> _core.Packed:
    """Pack weights that come in PyTorch's order: layer by layer, direction by direction."""
    arrays = [tensor_library.array(dense(weight.detach())) for weight in weights]
    return _core.Packed(
        architecture.cell,
        DTYPES[weights[0].dtype],
        architecture.input_size,
        architecture.hidden_size,
        architecture.proj_size,
        architecture.num_layers,
        architecture.directions,
        [[*group, None] for group in weights_by_sequence(architecture, arrays)],
    )


def packed_weights(
    module: torch.nn.Module, architecture: Architecture, names: Sequence[str], weights: tuple[Tensor, ...]
) -> _core.TensorWeights:
    """Packed weights for a call without gradients, from an earlier call if they are still current."""
    cache = caches.get(id(module))
    if cache is not None and cache.architecture == architecture and cache.weights.hold(weights):
        return cache.weights
    token = packing_now[id(module)] = object()
    packed = _core.TensorWeights(
        tensor_library, tuple(names), weights, partial(pack, architecture), module in frozen_modules
    )
    if packed.is_cacheable:
        _remember(module, architecture, packed)
    if packing_now.pop(id(module), None) is not token:  # `forget` was called meanwhile
        caches.pop(id(module), None)
    return packed


def _remember(module: torch.nn.Module, architecture: Architecture, weights: _core.TensorWeights) -> None:
    def drop(_: object, key: int = id(module), caches: dict[int, Cache] = caches) -> None:
        caches.pop(key, None)

    caches[id(module)] = Cache(ref(module, drop), architecture, weights)


def forget(module: torch.nn.Module) -> None:
    """Forget a module's packed weights, including those that another thread is packing at the moment."""
    packing_now.pop(id(module), None)
    caches.pop(id(module), None)
