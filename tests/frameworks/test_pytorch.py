"""The core against torch.nn with the same weights: outputs, states and every gradient, on every backend."""

import numpy as np
import pytest
from conftest import (
    assert_results_close,
    assert_same_bits,
    by_name,
    make_data,
    make_layer,
    map_state,
    random,
    run_core,
)
from tolerances import TIMES_PYTORCH_ERROR, assert_close, mean_error

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("backend", "one_thread_in_torch")


def torch_module(layer, dtype=None):
    """The torch.nn module of the same kind, options and weights."""
    options = {name: getattr(layer, name) for name in ("bias", "bidirectional", "batch_first")}
    kind = getattr(torch.nn, type(layer).__name__)
    special = {torch.nn.LSTM: ["proj_size"], torch.nn.RNN: ["nonlinearity"]}.get(kind, [])
    options |= {name: getattr(layer, name) for name in special}
    module = kind(layer.input_size, layer.hidden_size, layer.num_layers, **options).to(torch.float64)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    return module.to(getattr(torch, dtype or str(layer.dtype)))


def run_torch(module, x, state, grad_output, grad_state):
    """As conftest.run_core."""
    dtype = next(module.parameters()).dtype

    def leaf(array):
        return torch.tensor(array, dtype=dtype, requires_grad=True)

    def members(state):
        return state if isinstance(state, tuple) else (state,)

    x, before = leaf(x), tuple(map(leaf, members(state)))
    output, after = module(x, before if isinstance(state, tuple) else before[0])
    grads = tuple(torch.tensor(grad, dtype=dtype) for grad in (grad_output, *members(grad_state)))
    torch.autograd.backward((output, *members(after)), grads)

    def arrays(tensors):
        values = tuple(tensor.detach().numpy() for tensor in tensors)
        return values if isinstance(state, tuple) else values[0]

    return by_name(
        output=output.detach().numpy(),
        state=arrays(members(after)),
        grad_input=x.grad.numpy(),
        grad_state=arrays(tensor.grad for tensor in before),
        grad={name: value.grad.numpy() for name, value in module.named_parameters()},
    )


SHAPES = pytest.mark.parametrize(
    ("steps", "batch", "inputs", "hidden", "options"),
    [
        (1, 1, 3, 5, {}),
        (20, 1, 16, 33, {}),
        (12, 7, 5, 64, {}),
        (5, 25, 40, 100, {}),
        (50, 16, 100, 100, {}),
        (60, 4, 10, 16, {}),
        (6, 3, 5, 17, {"bias": False}),
        (6, 3, 5, 17, {"bidirectional": True}),
        (6, 5, 5, 33, {"num_layers": 3}),
        (6, 5, 5, 31, {"num_layers": 2, "bidirectional": True}),
    ],
    ids=str,
)
PROJECTIONS = pytest.mark.parametrize(
    ("steps", "batch", "inputs", "hidden", "options"),
    [
        (6, 3, 5, 17, {"proj_size": 4}),
        (6, 3, 5, 33, {"proj_size": 17, "num_layers": 2, "bidirectional": True}),
    ],
    ids=str,
)


def check_double(cell, steps, batch, inputs, hidden, options):
    layer = make_layer(cell, inputs, hidden, dtype="float64", **options)
    data = make_data(layer, steps, batch)
    assert_results_close(run_core(layer, *data), run_torch(torch_module(layer), *data), "torch_")


def check_single(cell, steps, batch, inputs, hidden, options):
    """Close to PyTorch, and against the same weights and data in float64 hardly less accurate than it is."""
    layer = make_layer(cell, inputs, hidden, dtype="float32", **options)
    data = make_data(layer, steps, batch)
    ours, theirs = run_core(layer, *data), run_torch(torch_module(layer), *data)
    truth = run_torch(torch_module(layer, "float64"), *data)
    assert_results_close(ours, theirs, "torch_")
    for name, value in truth.items():
        allowed = TIMES_PYTORCH_ERROR * max(mean_error(theirs[name], value), np.finfo("float32").eps / 4)
        assert mean_error(ours[name], value) <= allowed, name


@SHAPES
def test_float64(cell, steps, batch, inputs, hidden, options):
    check_double(cell, steps, batch, inputs, hidden, options)


@SHAPES
def test_float32(cell, steps, batch, inputs, hidden, options):
    check_single(cell, steps, batch, inputs, hidden, options)


@PROJECTIONS
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # PyTorch: not by oneDNN
def test_projection_float64(steps, batch, inputs, hidden, options):
    check_double("lstm", steps, batch, inputs, hidden, options)


@PROJECTIONS
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # PyTorch: not by oneDNN
def test_projection_float32(steps, batch, inputs, hidden, options):
    check_single("lstm", steps, batch, inputs, hidden, options)


@pytest.mark.parametrize("shape", [(6, 3, 5), (6, 5)], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_shapes(cell, shape, batch_first):
    """The same axes as PyTorch, without a state given."""
    layer = make_layer(cell, 5, 7, 2, bidirectional=True, batch_first=batch_first, dtype="float64")
    x = random(shape, "float64")
    y, state = layer(x)
    with torch.no_grad():
        expected, after = torch_module(layer)(torch.from_numpy(x))
    assert_close(y, expected.numpy(), "torch_float64")
    assert_close(state, map_state(torch.Tensor.numpy, after), "torch_float64")


def test_weights_come_back(cell, dtype):
    """PyTorch's state_dict has our names in our order, and loads into a layer."""
    layer, other = (make_layer(cell, 5, 7, 2, bidirectional=True, dtype=dtype, seed=seed) for seed in (1, 2))
    weights = {name: 2 * value.numpy() for name, value in torch_module(layer).state_dict().items()}
    assert list(weights) == list(layer.state_dict())
    other.load_state_dict(weights)
    assert_same_bits(other.state_dict(), weights)


# -----------------------------------------------------------------------------------------------------------
# Rows of different lengths: PyTorch's packed sequences


@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 9, 1, 1, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_packed_sequences(cell, dtype, lengths, options):
    """Outputs, final states and all gradients."""
    layer = make_layer(cell, 5, 33, dtype=dtype, **options)
    steps = max(lengths)
    data = make_data(layer, steps, len(lengths))
    module = torch_module(layer)

    class Packed(torch.nn.Module):
        """The same module on padded input and output."""

        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, state):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, after = self.module(packed, state)
            return torch.nn.utils.rnn.pad_packed_sequence(output)[0], after

    theirs = run_torch(Packed(), *data)
    theirs = {name.replace("grad module.", "grad "): value for name, value in theirs.items()}
    assert_results_close(run_core(layer, *data, lengths=lengths), theirs, "torch_")
