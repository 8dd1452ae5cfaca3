"""What is done to whole models: their modules are put on gatewise and back, and their packed weights are controlled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gatewise.torch.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RecurrentModule, RNNCell
from gatewise.torch.packing import forget, frozen_modules

GATEWISE_CLASSES = {getattr(torch.nn, kind.__name__): kind for kind in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}
TORCH_CLASSES = {kind: original for original, kind in GATEWISE_CLASSES.items()}


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Put every torch.nn LSTM, GRU, RNN and cell inside `model`, however deep, on gatewise, in place.

    The modules stay the same objects with the same parameters, hooks and attributes: only their class changes.
    Optimizers, state_dict, deepcopy and parametrizations go on working. Subclasses of these classes with code of their
    own stay as they are. Doing it twice does no harm; `restore` undoes it.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same model; `accelerated(model)` names what was replaced.
    """
    for module in _modules(model):
        _change_class(module, GATEWISE_CLASSES)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `accelerate`: every class in `model` is torch.nn's again, even if it was gatewise's from the beginning."""
    for module in _modules(model):
        _change_class(module, TORCH_CLASSES)
        frozen_modules.discard(module)
        forget(module)
    return model


def accelerated(model: torch.nn.Module) -> list[str]:
    """The names of the modules inside `model` that are on gatewise; "" is the model itself."""
    _modules(model)
    return [name for name, module in model.named_modules() if isinstance(module, RecurrentModule)]


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Stop comparing all weights inside `model` at each call, on the promise that PyTorch counts all writes to them.

    A call without gradients uses packed weights. Before it does, it reads all weights of the module to see whether they
    are still the ones that were packed. If the module is frozen, it looks at PyTorch's counters instead, which takes
    the same time for weights of any size. Changes by in-place operations, `load_state_dict`, `.to()`, and assignment of
    another Parameter or of `.data` are still seen.

    Writes that PyTorch does not count may go unseen until `thaw` or `repack`: through `.data`, `detach().numpy()`,
    DLPack or a storage, by fused optimizers, by `torch.distributed` or another process, and all writes to parameters
    that were made under `inference_mode`. So do not freeze a module, or repack it after each write, where single
    numbers are changed like this, as in ablation, evolution and finite differences.

    Gradients are computed as before, with the current weights. Copies and unpickled modules are not frozen, and
    `restore` thaws.

    Parameters
    ----------
    model : torch.nn.Module
        With modules of gatewise.torch inside, made as such or by `accelerate`.

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    modules = [module for module in _modules(model) if isinstance(module, RecurrentModule)]
    if not modules:
        raise ValueError(f"model: expected modules of gatewise.torch inside, got {type(model).__name__} without any")
    for module in modules:
        frozen_modules.add(module)
        forget(module)
    return model


def thaw(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `freeze`: calls without gradients compare all weights inside `model` again.

    Parameters
    ----------
    model : torch.nn.Module
        A model that is not frozen stays as it is.

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    for module in _modules(model):
        frozen_modules.discard(module)
        forget(module)
    return model


def repack(model: torch.nn.Module) -> None:
    """Forget all packed weights inside `model`, so that the next call packs them anew.

    Frozen modules need it after writes that PyTorch does not count, and stay frozen; others see such writes themselves.
    """
    for module in _modules(model):
        forget(module)


def _modules(model: object) -> list[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())


def _change_class(module: torch.nn.Module, classes: Mapping[Any, Any]) -> None:
    kind = type(module)
    if kind in classes:
        module.__class__ = classes[kind]
        return
    is_parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    if is_parametrized and len(kind.__bases__) == 1 and kind.__bases__[0] in classes:
        # Parametrizations have made a class for this module only, with the parameters as properties.
        names = {
            name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", "__doc__")
        }
        module.__class__ = type(kind.__name__, (classes[kind.__bases__[0]],), names)
