"""PyTorch: the layers, cells and modules of torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from ..cases import Case, Party, numpy_copy
from ..workloads import CELL, CELLS, DENSE, EMBEDDING, FORWARD, HOMES, LAYER, NETWORK, ONE_STEP, PACKED, RUN, Workload
from . import refusals


def make(case: Case) -> Party:
    """torch.nn.LSTM or GRU under inference_mode; autograd.grad of the module; LSTMCell or GRUCell for a step. For a
    block the layer, with the state of the block before.

    Rows of different lengths as packed sequences; packing and padding again are timed with it, except where a module
    in PyTorch is given a packed sequence and returns one. A network is a module of cells, torch.nn.Linear and
    torch.nn.Embedding.
    """
    if case.workload.mode in HOMES:
        return make_module_party(case, lambda module: module)
    if case.workload.mode == NETWORK:
        return _make_network(case)
    return _make_layer_party(case, is_packed=case.workload.lengths is not None)


def make_padded(case: Case) -> Party:
    """The same without packing: all steps of the longest row are computed, and what follows the end of a row is left
    out."""
    return _make_layer_party(case, is_packed=False)


def refusal(workload: Workload) -> str | None:
    return refusals.other_framework(workload, "PyTorch") or refusals.resets(workload)


def padded_refusal(workload: Workload) -> str | None:
    if workload.mode not in HOMES and workload.lengths is None:
        return "the same as PyTorch"
    if workload.directions == 2:
        return "the reverse direction would begin in the padding"
    return refusals.other_framework(workload)


def _parameters(case: Case) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in case.parameters.items()}


def _make_layer(case: Case, convert: Callable[[Any], Any] = lambda module: module) -> Any:
    import torch

    workload = case.workload
    module = convert(
        getattr(torch.nn, workload.cell)(
            workload.input,
            workload.hidden,
            workload.layers,
            bidirectional=workload.directions == 2,
            dtype=getattr(torch, workload.dtype),
        )
    )
    module.load_state_dict(_parameters(case))
    return module


def _make_cell(case: Case, convert: Callable[[Any], Any] = lambda module: module) -> Any:
    import torch

    workload = case.workload
    kind = getattr(torch.nn, f"{workload.cell}Cell")
    cell = convert(kind(workload.input, workload.hidden, dtype=getattr(torch, workload.dtype)))
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in _parameters(case).items()})
    return cell.eval()


def _zero_state(case: Case) -> Any:
    import torch

    zero = torch.zeros(case.workload.batch, case.workload.hidden, dtype=getattr(torch, case.workload.dtype))
    return (zero, zero) if case.workload.cell == "LSTM" else zero


# ---- layers and cells, as their documentation calls fastest


def _make_layer_party(case: Case, *, is_packed: bool) -> Party:
    import torch

    workload = case.workload
    torch.set_num_threads(case.threads)
    if workload.mode in ONE_STEP:
        return _make_step(case)
    module = _make_layer(case)
    if workload.mode == RUN:
        return _make_block_of_steps(case, module)

    def compute_output(x: Any) -> Any:
        if not is_packed:
            return module(x)[0]
        lengths = torch.from_numpy(workload.lengths)
        sequences = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(sequences)[0])[0]

    if workload.mode == FORWARD:
        return _make_forward(case, module, compute_output)
    return _make_gradients(case, module, compute_output)


def _make_step(case: Case) -> Party:
    import torch

    cell, x, state = _make_cell(case), torch.from_numpy(case.x), _zero_state(case)
    is_lstm = case.workload.cell == "LSTM"

    def step() -> Any:
        nonlocal state
        with torch.inference_mode():
            state = cell(x[0], state)
        return state[0] if is_lstm else state

    return Party(step, lambda h: {"output": numpy_copy(h)[None]})


def _make_block_of_steps(case: Case, module: Any) -> Party:
    import torch

    x, state = torch.from_numpy(case.x), None

    def run() -> Any:
        nonlocal state
        with torch.inference_mode():
            y, state = module(x, state)
        return y

    return Party(run, lambda y: {"output": numpy_copy(y)})


def _make_forward(case: Case, module: Any, compute_output: Callable[[Any], Any]) -> Party:
    import torch

    x = torch.from_numpy(case.x)
    module.eval()

    def forward() -> Any:
        with torch.inference_mode():
            return compute_output(x)

    return Party(forward, lambda y: {"output": numpy_copy(y)})


def _make_gradients(case: Case, module: Any, compute_output: Callable[[Any], Any]) -> Party:
    import torch

    x, grad_output = torch.from_numpy(case.x).requires_grad_(), torch.from_numpy(case.grad_output)
    names = ["input", *(name for name, _ in module.named_parameters())]
    leaves = [x, *module.parameters()]

    def train() -> Any:
        y = compute_output(x)
        return y, torch.autograd.grad(y, leaves, grad_output)

    def collect(result: Any) -> dict[str, Any]:
        y, gradients = result
        return {"output": numpy_copy(y.detach()), **dict(zip(names, map(numpy_copy, gradients), strict=True))}

    return Party(train, collect)


# ---- modules in a program of PyTorch, which gatewise may accelerate


def make_module_party(case: Case, convert: Callable[[Any], Any]) -> Party:
    """A converted module of torch.nn: zero_grad, forward and backward, or one step under no_grad."""
    import torch

    torch.set_num_threads(case.threads)
    if case.workload.mode == CELL:
        return _make_cell_step(case, _make_cell(case, convert))
    module = _make_layer(case, convert)
    return _make_layer_step(case, module.eval()) if case.workload.mode == LAYER else _make_training(case, module)


def _make_cell_step(case: Case, cell: Any) -> Party:
    import torch

    x, state = torch.from_numpy(case.x)[0], _zero_state(case)
    is_lstm = case.workload.cell == "LSTM"

    def step() -> Any:
        nonlocal state
        with torch.no_grad():
            state = cell(x, state)
        return state[0] if is_lstm else state

    return Party(step, lambda h: {"output": numpy_copy(h)[None]})


def _make_layer_step(case: Case, module: Any) -> Party:
    import torch

    x, state = torch.from_numpy(case.x), None

    def step() -> Any:
        nonlocal state
        with torch.no_grad():
            y, state = module(x, state)
        return y

    return Party(step, lambda y: {"output": numpy_copy(y)})


def _make_training(case: Case, module: Any) -> Party:
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    x, grad_output, lengths = torch.from_numpy(case.x), torch.from_numpy(case.grad_output), case.workload.lengths

    def pack(rows: Any) -> Any:
        return pack_padded_sequence(rows, torch.from_numpy(lengths), enforce_sorted=False)

    def pad(rows: Any) -> Any:
        return pad_packed_sequence(rows)[0]

    is_packed = case.workload.rows == PACKED
    if is_packed:
        sequences, grad_output = pack(x), pack(grad_output).data
        x = sequences.data

    def forward() -> Any:
        if is_packed:
            return module(sequences)[0].data
        return module(x)[0] if lengths is None else pad(module(pack(x))[0])

    def pad_if_packed(rows: Any) -> Any:
        return pad(sequences._replace(data=rows)) if is_packed else rows

    x.requires_grad_()

    def train() -> Any:
        module.zero_grad()
        x.grad = None
        y = forward()
        y.backward(grad_output)
        return y

    return Party(
        train,
        lambda y: {
            "output": numpy_copy(pad_if_packed(y.detach())),
            "input": numpy_copy(pad_if_packed(x.grad)),
            **{name: numpy_copy(parameter.grad) for name, parameter in module.named_parameters()},
        },
    )


# ---- networks


def make_network_module(case: Case, *, is_eager: bool) -> Any:
    """A module from x and the states before a step, in the order of the layers, to y and the states after it.

    For eager calls it holds cells and takes x (1, I): these take half the time of layers. For an export it holds layers
    and takes x (1, 1, I): each of these becomes one operator.
    """
    import torch

    blocks = case.workload.blocks
    suffix = "Cell" if is_eager else ""
    names = {DENSE: "Linear", EMBEDDING: "Embedding", **{cell: f"{cell}{suffix}" for cell in CELLS}}

    class Network(torch.nn.ModuleList):  # type: ignore[misc]  # its base is Any, since mypy does not look at PyTorch
        def forward(self, x: Any, *states: Any) -> Any:
            states_before, states_after = iter(states), []
            for block, layer in zip(blocks, self, strict=True):
                if block.is_recurrent:
                    is_lstm = block.kind == "LSTM"
                    before = (next(states_before), next(states_before)) if is_lstm else next(states_before)
                    result = layer(x, before)
                    after = result if is_eager else result[1]
                    states_after += list(after) if is_lstm else [after]
                    x = after[0] if is_lstm else after  # h is the output of the only step
                else:
                    # With three axes ONNX Runtime would put a Reshape before and after each product: 2 to 4 %.
                    x = layer(x.squeeze(0) if block.kind == DENSE and x.dim() == 3 else x)
                    x = x if block.activation == "linear" else getattr(torch, block.activation)(x)
            return (x, *states_after)

    dtype = getattr(torch, case.workload.dtype)
    module = Network(
        getattr(torch.nn, names[kind])(inputs, outputs, dtype=dtype) for kind, inputs, outputs, _ in blocks
    )
    parameters = _parameters(case)
    module.load_state_dict(
        {name.removesuffix("_l0") if is_eager else name: value for name, value in parameters.items()}
    )
    return module.eval()


def _make_network(case: Case) -> Party:
    import torch

    torch.set_num_threads(case.threads)
    module = make_network_module(case, is_eager=True)
    states = [torch.from_numpy(value[0]) for value in case.zero_states().values()]
    inputs = cycle(list(torch.from_numpy(case.x)))

    def step() -> Any:
        nonlocal states
        with torch.inference_mode():
            y, *states = module(next(inputs), *states)
        return y

    return Party(step, lambda y: {"output": numpy_copy(y)[None]})
