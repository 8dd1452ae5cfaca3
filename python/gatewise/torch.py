"""LSTM, GRU, RNN and their cells for PyTorch, on gatewise where they can be, on PyTorch's own code where not.

    import gatewise.torch

    gatewise.torch.accelerate(model)  # every torch.nn.LSTM, GRU, RNN and cell inside, in place

The classes are subclasses of torch.nn's: the same constructor, parameters, initial numbers, state_dict, errors. A call
that gatewise has no road for (another device or dtype, autocast, functorch transforms, forward-mode derivatives, ...)
goes to PyTorch's implementation; docs/pytorch.md has the table.

The data goes one way: module -> `_Call` (sizes, packed weights, schedule) -> core, by address.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import numpy as np

try:
    import torch
    from torch import Tensor, library
    from torch.autograd import forward_ad as _forward_ad
    from torch.nn.utils.rnn import PackedSequence
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("gatewise.torch needs PyTorch: pip install 'gatewise[torch]'") from error

import gatewise._core as _core
from gatewise.arguments.arrays import whole_number
from gatewise.arguments.sequences import plan as make_plan
from gatewise.running.layout import Layout
from gatewise.weights.architecture import Architecture

__all__ = [
    "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "accelerate", "accelerated", "freeze", "repack", "restore",
    "thaw",
]  # fmt: skip

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
WITHOUT_BIASES = ("weight_ih", "weight_hh")
WITH_BIASES = (*WITHOUT_BIASES, "bias_ih", "bias_hh")
WRONG = "something that PyTorch refuses"


# ---- packed weights


def _pack(cell: str, of: Any, weights: Sequence[Tensor], bias: bool, layers: int, directions: int) -> _core.Packed:
    """`weights` as PyTorch lists them: layer by layer, direction by direction."""
    projection = getattr(of, "proj_size", 0)
    count = 2 + 2 * bias + (projection > 0)
    arrays = [_tensors.array(_aligned(weight.detach().contiguous())) for weight in weights]
    grouped = []
    for first in range(0, len(arrays), count):
        own = arrays[first : first + count]
        biases = own[2:4] if bias else [None, None]
        grouped.append([own[0], own[1], *biases, own[-1] if projection else None, None])
    dtype = DTYPES[weights[0].dtype]
    return _core.Packed(cell, dtype, of.input_size, of.hidden_size, projection, layers, directions, grouped)


def _aligned(tensor: Tensor) -> Tensor:
    """Weights of a file that was mapped into memory may lie anywhere."""
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


# What a step of a cell in the core asks PyTorch, and what keeps it from being made there.
_tensors = _core.TensorLibrary(
    Tensor.__dlpack_c_exchange_api__, Tensor, torch.nn.Parameter, Tensor.is_neg, torch.get_num_threads,
    (
        torch._C._is_any_autocast_enabled, torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state,
        torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack,
    ),
)  # fmt: skip


class _Cache(NamedTuple):
    module: ref[torch.nn.Module]
    weights: _core.TensorWeights


# By id(module); an entry goes with its module. A WeakKeyDictionary would take half a microsecond to look at.
_caches: dict[int, _Cache] = {}


def _remember(module: torch.nn.Module, weights: _core.TensorWeights) -> None:
    def forget(_: object, place: int = id(module), caches: dict[int, _Cache] = _caches) -> None:
        caches.pop(place, None)

    _caches[id(module)] = _Cache(ref(module, forget), weights)


# By id(module) while its weights are being packed.
_packing: dict[int, object] = {}


def _forget(module: torch.nn.Module) -> None:
    """Forget packed weights, also those that another thread is just making."""
    _packing.pop(id(module), None)
    _caches.pop(id(module), None)


def _packed(module: Any, weights: tuple[Tensor, ...]) -> _core.TensorWeights:
    """Packed weights for a call without gradients, from an earlier one if possible."""
    cache = _caches.get(id(module))
    if cache is not None and cache.weights.hold(weights):
        return cache.weights
    own = _packing[id(module)] = object()
    packed = _core.TensorWeights(
        _tensors, module._gatewise_names(), weights, module._gatewise_pack, module in _frozen_modules
    )
    if packed.is_cacheable:
        _remember(module, packed)
    if _packing.pop(id(module), None) is not own:
        _caches.pop(id(module), None)
    return packed


_frozen_modules: WeakSet[torch.nn.Module] = WeakSet()


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    """Do without comparing weights inside `model` at each call, on the promise that PyTorch counts all writes to them.

    A call without gradients uses packed weights. Before it does, it reads all weights of the module to see whether they
    are still the ones that were packed. If the module is frozen, it looks at what PyTorch counts instead, which takes
    the same time for weights of any size. Changes by in-place operations, `load_state_dict`, `.to()`, and assignment of
    another Parameter or of `.data` are then seen as before.

    Writes that PyTorch does not count may go unseen until `thaw` or `repack`: through `.data`, `detach().numpy()`,
    DLPack or a storage, by fused optimizers, by `torch.distributed` or another process, and all writes to parameters
    that were made under `inference_mode`. So do not freeze a module, or repack it after each write, where single
    numbers are changed like this, as in ablation, evolution and finite differences.

    Gradients are computed as before, with the weights that are there. Copies and unpickled modules are not frozen, and
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
    modules = [module for module in _modules(model) if isinstance(module, _Module)]
    if not modules:
        raise ValueError(f"model: expected modules of gatewise.torch inside, got {type(model).__name__} without any")
    for module in modules:
        _frozen_modules.add(module)
        _forget(module)
    return model


def thaw(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `freeze`: calls without gradients compare all weights inside `model` again.

    Parameters
    ----------
    model : torch.nn.Module
        One that is not frozen stays as it is.

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    for module in _modules(model):
        _frozen_modules.discard(module)
        _forget(module)
    return model


def repack(model: torch.nn.Module) -> None:
    """Forget all packed weights inside `model`, so that the next call packs them anew.

    Frozen modules need it after writes that PyTorch does not count, and stay frozen; others see such writes themselves.
    """
    for module in _modules(model):
        _forget(module)


# ---- one call on tensors


@dataclass(frozen=True)
class _Call:
    """What a call is beside its tensors."""

    architecture: Architecture
    batch_first: bool
    steps: int  # of the tensors
    taken: int  # of the longest row
    batch: int
    plan: _core.Schedule | None
    checkpoint_every: int
    dropout: float
    seed: int
    packed_rows: int | None = None  # sequences are [packed_rows, units], the rows of each step after those of the last

    def foreign(self, packed: _core.Packed) -> _core.Foreign:
        return _core.Foreign(
            packed, self.taken, self.batch, self.plan, self.checkpoint_every, self.dropout, self.seed,
            torch.get_num_threads(),
        )  # fmt: skip

    def new(self, units: int, dtype: torch.dtype) -> Tensor:
        """[T, B, units] in the caller's order of axes, zero behind the longest row; or packed."""
        if self.packed_rows is not None:
            return _empty((self.packed_rows, units), dtype)
        shape = (self.batch, self.steps, units) if self.batch_first else (self.steps, self.batch, units)
        tensor = _empty(shape, dtype)
        if self.taken < self.steps:
            tensor.narrow(1 if self.batch_first else 0, self.taken, self.steps - self.taken).zero_()
        return tensor

    def new_state(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        of = self.architecture
        sequences = of.num_layers * of.directions
        hidden = _empty((sequences, self.batch, of.recurrent_size), dtype)
        return hidden, _empty((sequences, self.batch, of.hidden_size), dtype) if of.has_cell_state else None

    def rows(self, tensor: Tensor | None) -> tuple[int, int, int]:
        """Address, step and row of a tensor [T, B, units] whose units are next to each other; or of a packed one."""
        if tensor is None:
            return 0, 0, 0
        if self.packed_rows is not None:
            return tensor.data_ptr(), 0, tensor.stride(0)
        first, second, _ = tensor.stride()
        return (tensor.data_ptr(), second, first) if self.batch_first else (tensor.data_ptr(), first, second)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory of the core, which uses large blocks again."""
    tensor: Tensor = _tensors.empty(shape, dtype.itemsize)
    return tensor


def _walkable(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense and its memory is aligned, else a copy."""
    return _aligned(tensor if tensor.stride(-1) == 1 or tensor.size(-1) <= 1 else tensor.contiguous())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(
    call: _Call, packed: _core.Packed, x: Tensor, h: Tensor | None, c: Tensor | None, *, record: bool
) -> tuple[Tensor, Tensor, Tensor | None, _core.Foreign, Tensor | None]:
    """Output, state after, and what backward needs: the foreign call and the tape."""
    y = call.new(call.architecture.output_size, x.dtype)
    h_after, c_after = call.new_state(x.dtype)
    foreign = call.foreign(packed)
    memory = _empty((foreign.tape_bytes,), torch.uint8) if record else None
    address = _address(memory)
    foreign.forward(call.rows(x), _address(h), _address(c), call.rows(y), _address(h_after), _address(c_after), address)
    return y, h_after, c_after, foreign, memory


def _kept(cell: str, y: Tensor) -> Tensor:
    """What backward reads for y. The caller may change the output of a GRU or RNN in place, as that of torch.nn's.

    That of an LSTM is y itself: torch.nn's in float32, too, refuses to go back after such a change.
    """
    return y if cell == "lstm" else y.clone()


def _by_torch(
    call: _Call, inputs: Sequence[Tensor | None], wanted: Sequence[bool], grads: Sequence[Any], create_graph: bool
) -> tuple[Any, ...]:
    """Backward by PyTorch's own operations, which have derivatives themselves and take tensors of any kind."""
    if call.dropout or call.plan is not None:
        raise RuntimeError(
            "backward with create_graph, or of gradients that are not plain tensors: expected a call without dropout, "
            "lengths, resets or uneven packed rows"
        )
    # Views, so that what one input was made of, perhaps another one, is not gone through twice.
    views = [
        None if one is None else one.detach().requires_grad_() if not create_graph else one.view_as(one)
        for one in inputs
    ]
    with torch.enable_grad():
        outputs = _steps_of_torch(call, *views)
    places = [
        place for place, (one, need) in enumerate(zip(views, wanted[2:], strict=True)) if need and one is not None
    ]
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=False) if grad is not None]
    found = torch.autograd.grad(
        [output for output, _ in pairs], [views[place] for place in places], [grad for _, grad in pairs],
        create_graph=create_graph, allow_unused=True,
    ) if pairs else [None] * len(places)  # fmt: skip
    results: list[Any] = [None] * len(inputs)
    for place, grad in zip(places, found, strict=True):
        results[place] = grad
    return None, None, *results


def _lstm_step(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any) -> Any:
    sums = torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(h, w_hh, b_hh)
    i, f, g, o = sums.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _steps_of_torch(call: _Call, x: Tensor, h: Any, c: Any, *weights: Tensor) -> tuple[Any, ...]:
    """Output and state after, step by step: oneDNN's LSTM, which PyTorch would take, has no second derivative."""
    of = call.architecture
    x = x.transpose(0, 1) if call.batch_first else x
    sequences, count = of.num_layers * of.directions, len(weights) // (of.num_layers * of.directions)
    hs = [x.new_zeros((x.size(1), of.recurrent_size))] * sequences if h is None else h.unbind(0)
    cs = [x.new_zeros((x.size(1), of.hidden_size))] * sequences if c is None else c.unbind(0)
    hs_after, cs_after = [], []
    for layer in range(of.num_layers):
        outputs = []
        for direction in range(of.directions):
            place = layer * of.directions + direction
            own, h, c = weights[place * count : (place + 1) * count], hs[place], cs[place]
            gates = [*own[: 4 if of.bias else 2], None, None][:4]
            steps: list[Any] = [None] * x.size(0)
            for t in range(x.size(0))[:: -1 if direction else 1]:
                if of.has_cell_state:
                    h, c = _lstm_step(x[t], h, c, *gates)
                    h = h @ own[-1].T if of.proj_size else h
                else:
                    h = getattr(torch, f"{of.cell}_cell")(x[t], h, *gates)
                steps[t] = h
            outputs.append(torch.stack(steps))
            hs_after.append(h)
            cs_after.append(c)
        x = torch.cat(outputs, -1)
    y = x.transpose(0, 1) if call.batch_first else x
    return y, torch.stack(hs_after), torch.stack(cs_after) if of.has_cell_state else None


def _backward(
    call: _Call, foreign: _core.Foreign, tape: Tensor, x: Tensor, h: Tensor | None, y: Tensor,
    grads: Sequence[Tensor | None], wants_x: bool, wanted: Sequence[bool], weights: Sequence[Tensor],
) -> tuple[Tensor | None, Tensor, Tensor | None, list[Any]]:  # fmt: skip
    """Gradients of x, h and c before, and of the weights that are wanted."""
    of = call.architecture
    grad_y = None if grads[0] is None else _walkable(grads[0])
    grad_h, grad_c = (None if grad is None else _aligned(grad.contiguous()) for grad in grads[1:])
    grad_x = call.new(of.input_size, x.dtype) if wants_x else None
    grad_h_before, grad_c_before = call.new_state(x.dtype)
    gradients: list[Any] = []
    addresses = []
    count = len(weights) // (of.num_layers * of.directions)
    for first in range(0, len(weights), count):
        own: list[Any] = [None] * count
        if any(wanted[first : first + count]):
            own = [_empty(weight.shape, x.dtype) for weight in weights[first : first + count]]
        biases = own[2:4] if of.bias else [None, None]
        addresses.append([_address(one) for one in (own[0], own[1], *biases, own[-1] if of.proj_size else None)])
        gradients += own
    foreign.backward(
        call.rows(x), _address(h), call.rows(y), tape.data_ptr(), call.rows(grad_y), _address(grad_h), _address(grad_c),
        call.rows(grad_x), _address(grad_h_before), _address(grad_c_before), addresses,
    )  # fmt: skip
    gradients = [grad if need else None for grad, need in zip(gradients, wanted, strict=True)]
    return grad_x, grad_h_before, grad_c_before, gradients


class _Walk(torch.autograd.Function):  # type: ignore[misc]
    """Forward and backpropagation through time as one node of PyTorch's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, packed: _core.Packed, x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor | None, ...]:
        y, h_after, c_after, foreign, tape = _forward(call, packed, x, h, c, record=True)
        ctx.save_for_backward(x, h, c, _kept(call.architecture.cell, y), tape, *weights)
        ctx.call, ctx.foreign = call, foreign
        ctx.set_materialize_grads(False)
        return y, h_after, c_after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, h, c, y, tape, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or not all(grad is None or _plain(grad) for grad in grads):
            return _by_torch(ctx.call, (x, h, c, *weights), wanted, grads, torch.is_grad_enabled())
        grad_x, grad_h_before, grad_c_before, gradients = _backward(
            ctx.call, ctx.foreign, tape, x, h, y, grads, wanted[2], wanted[5:], weights
        )
        return (
            None,
            None,
            grad_x,
            grad_h_before if wanted[3] else None,
            grad_c_before if wanted[4] else None,
            *gradients,
        )


def _counts(packed: Any) -> Any:
    """The rows of each step, (T,), of a PackedSequence that is one; else None. A copy: the core relies on it."""
    sizes = packed.batch_sizes
    if not _plain(sizes) or sizes.dtype is not torch.int64 or sizes.dim() != 1 or sizes.numel() == 0:
        return None
    counts, rows = sizes.numpy().copy(), packed.data.size(0)
    if counts[-1] < 1 or counts[0] > rows or (counts[1:] > counts[:-1]).any() or counts.sum() != rows:
        return None
    for order in (packed.sorted_indices, packed.unsorted_indices):
        if order is not None and tuple(order.shape) != (int(counts[0]),):
            return None
    return counts


def _data_of(input: Any) -> Any:
    return input.data if isinstance(input, PackedSequence) else input


def _plain(tensor: Any) -> bool:
    """Whether it is a dense tensor in this process's memory, and nothing that only behaves like one."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and _has_memory(tensor)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Not one of many gradients at once (is_grads_batched), which has none of its own."""
    try:
        return bool(tensor.numel() == 0 or tensor.data_ptr() != 0)
    except RuntimeError:
        return False


def _off_the_road() -> str | None:
    """What PyTorch is doing at the moment that gatewise has no road for; None: nothing."""
    if torch._C._is_any_autocast_enabled():
        return "autocast"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if _in_forward_mode():
        return "forward-mode derivatives"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler"
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and not _only_a_default_device()):
        return "a mode that watches PyTorch's operations"
    return None


def _in_forward_mode() -> bool:
    return bool(_forward_ad._current_level >= 0)


def _only_a_default_device() -> bool:
    """torch.set_default_device is a mode, too; ours are on the CPU by name."""
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return all(type(mode).__name__ == "DeviceContext" for mode in modes)


@lru_cache(maxsize=1024)
def _architecture(
    cell: str, input_size: int, hidden_size: int, layers: int, bias: bool, bidirectional: bool, projection: int,
    dtype: torch.dtype,
) -> Architecture:  # fmt: skip
    return Architecture(cell, input_size, hidden_size, layers, bias, bidirectional, projection, DTYPES[dtype])


@lru_cache(maxsize=1024)
def _weight_shapes(architecture: Architecture) -> list[tuple[int, ...]]:
    return list(architecture.shapes().values())


def _needs_gradients(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ---- the operator: what torch.compile and torch.export see of a layer, one node with a shape


_library = library.Library("gatewise", "DEF")
# sizes: input_size, hidden_size, num_layers, proj_size, checkpoint_every; flags: bias, bidirectional, batch_first.
# The tape is bytes, none where nothing is recorded. c and what belongs to it is empty where there is no cell state.
_OPTIONS = "str cell, int[] sizes, bool[] flags, Tensor? lengths, Tensor? resets, float dropout, Tensor? seed"
_library.define(
    f"recurrent(Tensor x, Tensor? h, Tensor? c, Tensor[] weights, {_OPTIONS}, bool record)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "recurrent_backward(Tensor x, Tensor? h, Tensor[] weights, Tensor y, Tensor tape, Tensor? grad_y, Tensor? grad_h, "
    f"Tensor? grad_c, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor[])"
)


class _Node(NamedTuple):
    """The options of the operator."""

    cell: str
    sizes: Sequence[int]
    flags: Sequence[bool]
    lengths: Tensor | None
    resets: Tensor | None
    dropout: float
    seed: Tensor | None

    def architecture(self, dtype: torch.dtype) -> Architecture:
        input_size, hidden_size, layers, projection, _ = self.sizes
        bias, bidirectional, _ = self.flags
        return _architecture(self.cell, input_size, hidden_size, layers, bias, bidirectional, projection, dtype)

    def extent(self, x: Tensor) -> tuple[Any, Any]:
        """Steps and rows of x, be they symbols."""
        return (x.shape[1], x.shape[0]) if self.flags[2] else (x.shape[0], x.shape[1])

    def call(self, x: Tensor) -> _Call:
        of = self.architecture(x.dtype)
        steps, batch = self.extent(x)
        plan, taken = None, steps
        if self.lengths is not None or self.resets is not None:
            plan, taken = make_plan(Layout(of, self.flags[2], False, steps, batch), self.lengths, self.resets)
        seed = int(self.seed) if self.seed is not None else 0
        return _Call(of, self.flags[2], steps, taken, batch, plan, min(self.sizes[4], taken), self.dropout, seed)

    def pack(self, weights: Sequence[Tensor], dtype: torch.dtype) -> _core.Packed:
        of = self.architecture(dtype)
        return _pack(self.cell, of, weights, of.bias, of.num_layers, of.directions)

    def tape_bytes(self, x: Tensor) -> Any:
        """What a tape needs if all rows have all steps, from sizes that may be symbols."""
        of, (steps, batch) = self.architecture(x.dtype), self.extent(x)
        lanes, item = _core.lanes()[of.dtype == np.float64], of.dtype.itemsize
        kept, carried = {"lstm": (4, 1), "gru": (4, 1)}.get(self.cell, (1, 0))
        every = self.sizes[4]
        states = -(-steps // every) * batch if every else steps * batch
        units = -(-of.hidden_size // lanes) * lanes

        def lines(count: Any) -> Any:
            return -(-count * item // 64) * 64

        of_direction = lines(states * units) * carried + (0 if every else lines(states * units * kept))
        between = lines(steps * batch * of.output_size) * (of.num_layers - 1)
        return of_direction * of.num_layers * of.directions + between


def _check_operator(node: _Node, x: Tensor, h: Any, c: Any, weights: Sequence[Tensor]) -> None:
    """What the core takes for granted; the operator is open to anyone. Sizes may be symbols."""
    if x.dtype not in DTYPES or x.dim() != 3 or x.shape[2] != node.sizes[0]:
        raise ValueError(
            f"gatewise::recurrent: x: expected float32 or float64 (., ., {node.sizes[0]}), got {x.dtype}, {x.shape}"
        )
    of, (_, batch) = node.architecture(x.dtype), node.extent(x)
    sequences = of.num_layers * of.directions
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = []
    if h is not None:
        wanted.append(("h", h, (sequences, batch, of.recurrent_size)))
    if c is not None:
        wanted.append(("c", c, (sequences, batch, of.hidden_size)))
    shapes = list(of.shapes().values())
    if len(shapes) != len(weights) or (c is not None and not of.has_cell_state):
        raise ValueError(
            f"gatewise::recurrent: expected {len(shapes)} weights, and c for LSTM only, got {len(weights)}"
        )
    wanted += [(f"weights[{i}]", weight, shape) for i, (weight, shape) in enumerate(zip(weights, shapes, strict=True))]
    for name, tensor, shape in wanted:
        if (
            tensor.dtype != x.dtype
            or tensor.dim() != len(shape)
            or any(a != b for a, b in zip(tensor.shape, shape, strict=True))
        ):
            raise ValueError(
                f"gatewise::recurrent: {name}: expected {x.dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )


# At the end of a tape: by which backend it was written.
_MARK = 64


def _mark() -> Tensor:
    name = _core.backend().encode()[:_MARK].ljust(_MARK)
    return torch.frombuffer(bytearray(name), dtype=torch.uint8)


def _recurrent(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    node, record = _Node(*options[:-1]), options[-1]
    _check_operator(node, x, h, c, weights)
    call, x = node.call(x), _walkable(x)
    h, c = (None if part is None else _aligned(part.contiguous()) for part in (h, c))
    y = call.new(call.architecture.output_size, x.dtype)
    h_after, c_after = call.new_state(x.dtype)
    # Zero, since what lies between its pieces is never written, and an operator's outputs are compared.
    tape = torch.zeros(node.tape_bytes(x) + _MARK if record else 0, dtype=torch.uint8, device="cpu")
    if record:
        tape[-_MARK:] = _mark()
    call.foreign(node.pack(weights, x.dtype)).forward(
        call.rows(x), _address(h), _address(c), call.rows(y), _address(h_after), _address(c_after),
        tape.data_ptr() if record else 0,
    )  # fmt: skip
    return y, h_after, x.new_empty(0) if c_after is None else c_after, tape


def _recurrent_fake(
    x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():  # of an ExportedProgram; a module is exported as torch.nn's
        raise RuntimeError(
            "gatewise::recurrent has no function in ONNX: expected the module itself in torch.onnx.export, or "
            "gatewise.torch.restore(model) before torch.export.export"
        )
    node, record = _Node(*options[:-1]), options[-1]
    _check_operator(node, x, h, c, weights)
    of, (_, batch) = node.architecture(x.dtype), node.extent(x)
    sequences = of.num_layers * of.directions
    return (
        x.new_empty((*x.shape[:2], of.output_size)),
        x.new_empty((sequences, batch, of.recurrent_size)),
        x.new_empty((sequences, batch, of.hidden_size) if of.has_cell_state else 0),
        x.new_empty(node.tape_bytes(x) + _MARK if record else 0, dtype=torch.uint8),
    )


def _recurrent_backward(
    x: Tensor, h: Tensor | None, weights: Sequence[Tensor], y: Tensor, tape: Tensor, grad_y: Tensor | None,
    grad_h: Tensor | None, grad_c: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    node = _Node(*options)
    _check_operator(node, x, h, None, weights)
    if tape.dtype != torch.uint8 or tape.numel() < _MARK:
        raise RuntimeError("gatewise::recurrent: backward without a tape: forward ran, or was exported, under no_grad")
    if not torch.equal(tape[-_MARK:], _mark()) or tape.numel() != node.tape_bytes(x) + _MARK:
        raise RuntimeError("gatewise::recurrent: backward on another backend or of other sizes than forward")
    of, (_, batch) = node.architecture(x.dtype), node.extent(x)
    sequences = of.num_layers * of.directions
    shapes = [(*x.shape[:2], of.output_size), (sequences, batch, of.recurrent_size), (sequences, batch, of.hidden_size)]
    for one, shape in zip((y, grad_y, grad_h, grad_c), (shapes[0], *shapes), strict=True):
        if one is not None and (one.dtype != x.dtype or tuple(one.shape) != shape):
            raise ValueError(
                f"gatewise::recurrent: expected a gradient {x.dtype} {shape}, got {one.dtype} {tuple(one.shape)}"
            )
    call, x = node.call(x), _walkable(x)
    h = None if h is None else _aligned(h.contiguous())
    foreign = call.foreign(node.pack(weights, x.dtype))
    wanted = [True] * len(weights)
    grads = [None if grad is None else grad.resolve_neg() for grad in (grad_y, grad_h, grad_c)]
    grad_x, grad_h_before, grad_c_before, gradients = _backward(
        call, foreign, tape, x, h, y.contiguous(), grads, True, wanted, weights
    )
    assert grad_x is not None
    return grad_x, grad_h_before, x.new_empty(0) if grad_c_before is None else grad_c_before, gradients


def _recurrent_backward_fake(
    x: Tensor, h: Tensor | None, weights: Sequence[Tensor], y: Tensor, tape: Tensor, grad_y: Tensor | None,
    grad_h: Tensor | None, grad_c: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    node = _Node(*options)
    of, (_, batch) = node.architecture(x.dtype), node.extent(x)
    sequences = of.num_layers * of.directions
    return (
        x.new_empty(x.shape),
        x.new_empty((sequences, batch, of.recurrent_size)),
        x.new_empty((sequences, batch, of.hidden_size) if of.has_cell_state else 0),
        [weight.new_empty(weight.shape) for weight in weights],
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, _, weights, *options = inputs
    ctx.save_for_backward(x, h, _kept(options[0], output[0]), output[3], *weights)
    ctx.options, ctx.has_state = options[:-1], (inputs[1] is not None, inputs[2] is not None)
    ctx.set_materialize_grads(False)


def _node_backward(
    ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, _: Any
) -> tuple[Any, ...]:
    x, h, y, tape, *weights = ctx.saved_tensors
    has_cell_state = ctx.options[0] == "lstm"
    grad_x, grad_h_before, grad_c_before, gradients = torch.ops.gatewise.recurrent_backward(
        x, h, weights, y, tape, grad_y, grad_h, grad_c if has_cell_state else None, *ctx.options
    )
    has_h, has_c = ctx.has_state
    nothing = [None] * (len(ctx.options) + 1)
    return grad_x, grad_h_before if has_h else None, grad_c_before if has_c else None, gradients, *nothing


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("gatewise::recurrent: a compiled or exported layer has no second derivative")


_library.impl("recurrent", _recurrent, "CPU")
_library.impl("recurrent_backward", _recurrent_backward, "CPU")
library.register_fake("gatewise::recurrent", _recurrent_fake, lib=_library)
library.register_fake("gatewise::recurrent_backward", _recurrent_backward_fake, lib=_library)
library.register_autograd("gatewise::recurrent", _node_backward, setup_context=_keep_for_backward, lib=_library)
library.register_autograd("gatewise::recurrent_backward", _no_second_derivative, lib=_library)


# ---- layers


class _Module:
    """What layers and cells share. The attributes are torch.nn's."""

    input_size: int
    hidden_size: int
    bias: bool

    def _gatewise_names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _gatewise_weights(self) -> tuple[Any, ...]:
        """Past the search for attributes where they are plain parameters."""
        own = self._parameters  # type: ignore[attr-defined]
        return tuple([own[name] if name in own else getattr(self, name) for name in self._gatewise_names()])

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        _forget(self)  # torch.nn's forward reads all of them

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        applied = super()._apply(*arguments, **options)  # type: ignore[misc]
        _forget(self)  # on another device, or of another dtype, they are of no use
        return applied


class _Layer(_Module):
    """What LSTM, GRU and RNN share: forward on gatewise, or on the torch.nn class that comes after this one."""

    mode: str
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool
    _flat_weights_names: list[str]

    def forward(
        self, input: Any, hx: Any = None, *, lengths: object = None, resets: object = None,
        checkpoint_every: int | None = None,
    ) -> Any:  # fmt: skip
        """As torch.nn's, and with what it lacks.

        Parameters
        ----------
        input, hx
            As torch.nn's: a batch, a single sequence or a PackedSequence; the state before, by default zero.
        lengths : Tensor, array or list of integers, optional
            (B,): how many steps each row has; see gatewise.LSTM. Not with a PackedSequence, which says it itself.
        resets : Tensor, array or list of bools, optional
            (T, B), with batch_first (B, T): where the state is set to zero before the step.
        checkpoint_every : int, optional
            In training, keep only the state of every so many steps and make the gates between them again.
        """
        if torch.compiler.is_compiling():
            return self._gatewise_traced(input, hx, lengths, resets, checkpoint_every)
        is_plain = lengths is None and resets is None and checkpoint_every is None
        try:
            cache = _caches.get(id(self))
            if is_plain and cache and not (torch.is_grad_enabled() or self._gatewise_drops() or _in_forward_mode()):
                result = cache.weights.walk(self._parameters, input, hx, self.batch_first)  # type: ignore[attr-defined]
                if result is not None:
                    return result
            return self._gatewise_forward(input, hx, lengths, resets, checkpoint_every)
        except (AttributeError, TypeError):
            if isinstance(self, _Module):
                raise
        # Another thread has restored torch.nn's class meanwhile, which knows nothing of what is ours.
        if not is_plain:
            raise NotImplementedError("lengths, resets, checkpoint_every: expected no restore during the call")
        return self.forward(input, hx)

    def _gatewise_forward(
        self, input: Any, hx: Any, lengths: object, resets: object, checkpoint_every: int | None
    ) -> Any:
        """The same of all calls but the plain ones without gradients."""
        weights: tuple[Any, ...] = ()
        why_not = _off_the_road() or self._gatewise_refuses(input, hx)
        if why_not is None:
            # Asked for once: a parametrization may change with each look.
            weights = self._gatewise_weights()
            dtype = _data_of(input).dtype
            if not all(_plain(weight) and weight.dtype is dtype for weight in weights):
                why_not = "weights that are not plain tensors of the input's dtype"
            elif [tuple(weight.shape) for weight in weights] != _weight_shapes(self._gatewise_architecture(dtype)):
                why_not = WRONG
        if why_not is not None:
            if (lengths is not None or resets is not None or checkpoint_every is not None) and why_not != WRONG:
                raise NotImplementedError(
                    f"lengths, resets, checkpoint_every: expected a call on gatewise, got {why_not}"
                )
            return super().forward(input, hx)  # type: ignore[misc]
        state = (hx,) if isinstance(hx, Tensor) else hx
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                raise TypeError("lengths, resets: expected none with a PackedSequence")
            y, after = self._gatewise_packed(input, state, weights, checkpoint_every)
            return y, after if len(after) > 1 else after[0]
        batched = input.dim() == 3
        x = input if batched else input[:, None]
        if not batched and state is not None:
            state = tuple(part[:, None] for part in state)
        y, after = self._gatewise_run(
            x, state, weights, batch_first=self.batch_first and batched, unbatched=not batched, lengths=lengths,
            resets=resets, checkpoint_every=checkpoint_every,
        )  # fmt: skip
        if not batched:
            y, after = y[:, 0], tuple(part[:, 0] for part in after)
        return y, after if len(after) > 1 else after[0]

    def _gatewise_names(self) -> tuple[str, ...]:
        return tuple(self._flat_weights_names)

    def _gatewise_drops(self) -> float:
        return self.dropout if self.training and self.num_layers > 1 else 0.0

    def _gatewise_refuses(self, input: Any, hx: Any) -> str | None:
        """Why PyTorch's own code must take this call, be it to say what is wrong with it; None: gatewise can."""
        x = _data_of(input)
        state = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
        if hx is not None and isinstance(hx, Tensor) is (self.mode == "LSTM"):
            return WRONG
        if not isinstance(state, tuple) or not _plain(x) or not all(map(_plain, state)):
            return "tensors that are not plain ones on the CPU"
        dtype = x.dtype
        if dtype not in DTYPES or any(one.dtype is not dtype for one in state):
            return "a dtype other than float32 or float64, or several"
        of = self._gatewise_architecture(dtype)
        if x.dim() < 2 or x.size(-1) != of.input_size:
            return WRONG
        batch: tuple[int, ...] = ()
        steps = 0
        if isinstance(input, PackedSequence):
            counts = _counts(input)
            if counts is None or x.dim() != 2:
                return WRONG
            batch, steps = (int(counts[0]),), len(counts)
        elif x.dim() == 3:
            batch, steps = (x.size(0 if self.batch_first else 1),), x.size(1 if self.batch_first else 0)
        elif x.dim() == 2:
            steps = x.size(0)
        if steps == 0:
            return WRONG
        if hx is None:
            return None
        sequences = of.num_layers * of.directions
        shapes = [(sequences, *batch, of.recurrent_size), (sequences, *batch, of.hidden_size)][: 1 + of.has_cell_state]
        return None if [tuple(part.shape) for part in state] == shapes else WRONG

    def _gatewise_refuses_to_trace(self, input: Any, hx: Any, dtype: torch.dtype) -> str | None:
        """As `_gatewise_refuses`, of what a compiler can see."""
        if not isinstance(input, Tensor):
            return "a PackedSequence in a compiler"
        if torch.is_autocast_enabled("cpu") or _in_forward_mode():
            return "autocast or forward-mode derivatives in a compiler"
        lstm, batched = self.mode == "LSTM", input.dim() == 3
        if hx is not None and isinstance(hx, Tensor) is lstm:
            return WRONG
        state = () if hx is None else tuple(hx) if lstm else (hx,)
        for one in (input, *state):
            if one.device.type != "cpu" or one.dtype != dtype or dtype not in DTYPES:
                return "another device, another dtype or several"
        if input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            return WRONG
        steps = input.size(1 if self.batch_first and batched else 0)
        batch = [input.size(0 if self.batch_first else 1)] if batched else []
        sequences = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if lstm else 1]
        if steps == 0 or (hx is not None and len(state) != len(sizes)):
            return WRONG
        for part, size in zip(state, sizes, strict=False):
            if list(part.shape) != [sequences, *batch, size]:
                return WRONG
        return None

    def _gatewise_traced(self, input: Any, hx: Any, lengths: Any, resets: Any, checkpoint_every: int | None) -> Any:
        """For torch.compile and torch.export: the operator, where it can be."""
        weights = [getattr(self, name) for name in self._flat_weights_names]
        why_not = self._gatewise_refuses_to_trace(input, hx, weights[0].dtype)
        if why_not is None and torch.onnx.is_in_onnx_export():
            why_not = "an export to ONNX"
        if why_not is not None:
            if (lengths is not None or resets is not None or checkpoint_every is not None) and why_not != WRONG:
                raise NotImplementedError(
                    f"lengths, resets, checkpoint_every: expected a call on gatewise, got {why_not}"
                )
            return super().forward(input, hx)  # type: ignore[misc]
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        state = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if not batched:
            state = tuple(part.unsqueeze(1) for part in state)
            lengths = None if lengths is None else torch.as_tensor(lengths).reshape(1)
            resets = None if resets is None else torch.as_tensor(resets).unsqueeze(1)
        h, c = (*state, None, None)[:2]
        dropout = self._gatewise_drops()
        record = dropout > 0 or (
            torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, h, c, *weights))
        )
        y, *after, _ = torch.ops.gatewise.recurrent(
            x, h, c, weights, CELLS[self.mode],
            [self.input_size, self.hidden_size, self.num_layers, self.proj_size, checkpoint_every or 0],
            [self.bias, self.bidirectional, self.batch_first and batched],
            None if lengths is None else torch.as_tensor(lengths), None if resets is None else torch.as_tensor(resets),
            dropout, torch.randint(0, 2**62, ()) if dropout else None, record,
        )  # fmt: skip
        after = after[: 2 if self.mode == "LSTM" else 1]
        if not batched:
            y, after = y.squeeze(1), [part.squeeze(1) for part in after]
        return y, tuple(after) if len(after) > 1 else after[0]

    def _gatewise_architecture(self, dtype: torch.dtype) -> Architecture:
        return _architecture(
            CELLS[self.mode], self.input_size, self.hidden_size, self.num_layers, self.bias, self.bidirectional,
            self.proj_size, dtype,
        )  # fmt: skip

    def _gatewise_pack(self, weights: Sequence[Tensor]) -> _core.Packed:
        return _pack(CELLS[self.mode], self, weights, self.bias, self.num_layers, 1 + self.bidirectional)

    def _gatewise_run(
        self, x: Tensor, state: tuple[Tensor, ...] | None, weights: tuple[Any, ...], *, batch_first: bool,
        unbatched: bool, lengths: object, resets: object, checkpoint_every: int | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """x [T, B, I] or [B, T, I]; state [L*D, B, .] each."""
        of = self._gatewise_architecture(x.dtype)
        batch, steps = (x.size(0), x.size(1)) if batch_first else (x.size(1), x.size(0))
        plan, taken = None, steps
        if lengths is not None or resets is not None:
            layout = Layout(of, self.batch_first, unbatched, steps, batch)
            plan, taken = make_plan(layout, lengths, resets)
        return self._gatewise_call(x, state, weights, batch_first, steps, taken, batch, plan, checkpoint_every)

    def _gatewise_call(
        self, x: Tensor, state: tuple[Tensor, ...] | None, weights: tuple[Any, ...], batch_first: bool, steps: int,
        taken: int, batch: int, plan: _core.Schedule | None, checkpoint_every: int | None,
        packed_rows: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        of = self._gatewise_architecture(x.dtype)
        every = 0 if checkpoint_every is None else whole_number("checkpoint_every", checkpoint_every, 1, 2**62)
        dropout = self._gatewise_drops()
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout else 0
        call = _Call(of, batch_first, steps, taken, batch, plan, min(every, taken), dropout, seed, packed_rows)
        x = _walkable(x)
        h, c = (None if part is None else _aligned(part.contiguous()) for part in (*(state or ()), None, None)[:2])
        if _needs_gradients((x, h, c, *weights)):
            _forget(self)  # what trains will change; of a frozen module not every optimizer says so
            y, *after = _Walk.apply(call, self._gatewise_pack(weights), x, h, c, *weights)
        else:
            packed = _packed(self, weights).packed
            y, *after = _forward(call, packed, x, h, c, record=dropout > 0)[:3]
        return y, tuple(part for part in after if part is not None)

    def _gatewise_packed(
        self, input: Any, state: tuple[Tensor, ...] | None, weights: tuple[Any, ...], checkpoint_every: int | None
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """The core walks over packed rows as they lie. Their states are sorted as they are."""
        counts = _counts(input)
        if counts is None:  # someone has changed it since it was looked at
            raise RuntimeError("PackedSequence: expected batch_sizes that stay as they are")
        steps, batch = len(counts), int(counts[0])
        x, plan, packed_rows = input.data, None, None
        if counts[-1] == batch:
            x = x.reshape(steps, batch, -1)
        else:
            lengths = steps - np.searchsorted(counts[::-1], np.arange(batch), side="right")
            plan, packed_rows = _core.Schedule(steps, batch, lengths, None, packed=True), x.size(0)
        if state is not None and input.sorted_indices is not None:
            state = tuple(part.index_select(1, input.sorted_indices) for part in state)
        if state is not None and any(part.size(1) != batch for part in state):
            raise RuntimeError(f"hx: expected states of {batch} rows")
        y, after = self._gatewise_call(
            x, state, weights, False, steps, steps, batch, plan, checkpoint_every, packed_rows
        )  # fmt: skip
        if input.unsorted_indices is not None:
            after = tuple(part.index_select(1, input.unsorted_indices) for part in after)
        y = y.flatten(0, -2)
        return PackedSequence(y, input.batch_sizes, input.sorted_indices, input.unsorted_indices), after


class LSTM(_Layer, torch.nn.LSTM):  # type: ignore[misc]
    """torch.nn.LSTM on gatewise."""


class GRU(_Layer, torch.nn.GRU):  # type: ignore[misc]
    """torch.nn.GRU on gatewise."""


class RNN(_Layer, torch.nn.RNN):  # type: ignore[misc]
    """torch.nn.RNN on gatewise."""


# ---- cells


class _Cell(_Module):
    """What LSTMCell, GRUCell and RNNCell share: steps without gradients on gatewise.

    With gradients PyTorch's own cells are used: a step's gradients of the weights are products of a few rows, which no
    packing pays for. A loop over time that is trained is a layer.
    """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch.nn's."""
        if torch.compiler.is_compiling():
            return super().forward(input, hx)  # type: ignore[misc]
        try:
            if torch.is_grad_enabled() or _in_forward_mode():
                _forget(self)  # what trains will change; of a frozen module not every optimizer says so
                return super().forward(input, hx)  # type: ignore[misc]
            cache = _caches.get(id(self))
            after = cache.weights.step(self._parameters, input, hx) if cache else None  # type: ignore[attr-defined]
            if after is None:
                after = self._gatewise_step(input, hx)
            return super().forward(input, hx) if after is None else after  # type: ignore[misc]
        except (AttributeError, TypeError):
            if isinstance(self, _Module):
                raise
        return self.forward(input, hx)  # another thread has restored torch.nn's class meanwhile

    def _gatewise_step(self, input: Any, hx: Any) -> Any:
        """What `forward` gives in a case that is less plain, or the first; None: PyTorch must."""
        if _off_the_road() is not None:
            return None
        is_pair = isinstance(self, LSTMCell)
        state = () if hx is None else tuple(hx) if is_pair and isinstance(hx, (tuple, list)) else (hx,)
        weights = self._gatewise_weights()
        if (hx is not None and len(state) != 1 + is_pair) or self._gatewise_refuses(input, state, weights):
            return None
        packed = _packed(self, weights)
        state = tuple(_aligned(part.contiguous()) for part in state)
        return packed.step(None, _walkable(input), None if not state else state if is_pair else state[0])

    def _gatewise_names(self) -> tuple[str, ...]:
        return WITH_BIASES if self.bias else WITHOUT_BIASES

    def _gatewise_refuses(self, x: Any, state: tuple[Any, ...], weights: tuple[Any, ...]) -> bool:
        if not all(map(_plain, (x, *state, *weights))) or x.dtype not in DTYPES:
            return True
        if not 1 <= x.dim() <= 2 or x.size(-1) != self.input_size or not (x.numel() and self.hidden_size):
            return True
        if any(one.dtype is not x.dtype for one in (*state, *weights)):
            return True
        if self._gatewise_kind() not in KINDS:
            return True
        of = _architecture(self._gatewise_kind(), self.input_size, self.hidden_size, 1, self.bias, False, 0, x.dtype)
        if [tuple(weight.shape) for weight in weights] != _weight_shapes(of):
            return True
        return any(part.shape != (*x.shape[:-1], self.hidden_size) for part in state)

    def _gatewise_kind(self) -> str:
        if isinstance(self, RNNCell):
            return f"rnn_{self.nonlinearity}"
        return "lstm" if isinstance(self, LSTMCell) else "gru"

    def _gatewise_pack(self, weights: Sequence[Tensor]) -> _core.Packed:
        return _pack(self._gatewise_kind(), self, weights, self.bias, 1, 1)


class LSTMCell(_Cell, torch.nn.LSTMCell):  # type: ignore[misc]
    """torch.nn.LSTMCell on gatewise."""


class GRUCell(_Cell, torch.nn.GRUCell):  # type: ignore[misc]
    """torch.nn.GRUCell on gatewise."""


class RNNCell(_Cell, torch.nn.RNNCell):  # type: ignore[misc]
    """torch.nn.RNNCell on gatewise."""


# ---- whole models

TWINS = {getattr(torch.nn, own.__name__): own for own in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)}


def accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """Put every torch.nn LSTM, GRU, RNN and cell inside `model`, however deep, on gatewise, in place.

    The modules stay the same objects with the same parameters, hooks and attributes: only their class changes.
    Optimizers, state_dict, deepcopy and parametrizations go on working. Subclasses of these classes with code of their
    own are left alone. Doing it twice does no harm; `restore` undoes it.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same model; `accelerated(model)` names what was replaced.
    """
    for module in _modules(model):
        _change(module, TWINS)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `accelerate`: every class in `model` is torch.nn's again. Also of modules that were made as gatewise's."""
    for module in _modules(model):
        _change(module, {own: theirs for theirs, own in TWINS.items()})
        _frozen_modules.discard(module)
        _forget(module)
    return model


def accelerated(model: torch.nn.Module) -> list[str]:
    """The names of the modules inside `model` that are on gatewise; "" is the model itself."""
    _modules(model)
    return [name for name, module in model.named_modules() if isinstance(module, (_Layer, _Cell))]


def _modules(model: object) -> list[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.modules())


def _change(module: torch.nn.Module, twins: Mapping[Any, Any]) -> None:
    kind = type(module)
    if kind in twins:
        module.__class__ = twins[kind]
    elif torch.nn.utils.parametrize.is_parametrized(module) and len(kind.__bases__) == 1 and kind.__bases__[0] in twins:
        # Parametrizations have made a class for this one module, with the parameters as properties.
        names = {
            name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", "__doc__")
        }
        module.__class__ = type(kind.__name__, (twins[kind.__bases__[0]],), names)
