"""What the tests of gatewise.torch share: twins of torch.nn and gatewise with the same numbers, and comparisons."""

import pathlib

import pytest
from tolerances import TOLERANCES

torch = pytest.importorskip("torch")
import gatewise.torch as gt  # noqa: E402
from gatewise.torch import architectures, eligibility, modules, operator, packing, tensors  # noqa: E402, F401

MARKS = [
    pytest.mark.usefixtures("backend", "one_thread_in_torch"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),  # PyTorch does not run them by oneDNN
    pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning"),
]

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
NN = torch.nn
REPOSITORY = pathlib.Path(__file__).parents[3]


def twins(kind, *sizes, dtype=torch.float64, **options):
    """torch.nn's module and ours with the same numbers, which come from the same seed."""
    pair = []
    for package in (NN, gt):
        torch.manual_seed(3)
        pair.append(getattr(package, kind)(*sizes, dtype=dtype, **options))
    return pair


def members(state):
    """A state, or an output and a state, as a tuple."""
    return state if isinstance(state, tuple) else (state,)


def state_for(module, *batch, seed=5, requires_grad=True):
    """A random state of a layer: [L*D, B, .], or [L*D, .] without a batch."""
    torch.manual_seed(seed)
    dtype = next(module.parameters()).dtype
    sequences = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    state = tuple(torch.randn(sequences, *batch, size, dtype=dtype, requires_grad=requires_grad) for size in sizes)
    return state if len(state) > 1 else state[0]


def data_of(output):
    return output.data if isinstance(output, NN.utils.rnn.PackedSequence) else output


def run(module, x, state=None, **options):
    """Output, state and all gradients of a module, on copies of x and of the state."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x
    before = () if state is None else tuple(part.detach().clone().requires_grad_() for part in members(state))
    output, after = module(x, None if state is None else before if len(before) > 1 else before[0], **options)
    results = [data_of(output), *members(after)]
    torch.manual_seed(9)
    loss = sum((part * torch.randn(part.shape, dtype=part.dtype)).sum() for part in results)
    loss.backward()
    leaves = [x] if isinstance(x, torch.Tensor) else []
    return [*results, *(leaf.grad for leaf in (*leaves, *before, *module.parameters()))]


def assert_equal_results(ours, theirs):
    assert len(ours) == len(theirs)
    for index, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert (actual is None) == (expected is None), index
        if actual is None:
            continue
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), index
        if actual.numel():
            limit = TOLERANCES[f"torch_{str(actual.dtype).removeprefix('torch.')}_gradient"].limit
            scale = max(1.0, float(expected.detach().abs().max()))
            assert float((actual - expected).detach().abs().max()) / scale <= limit, index


def flat(results):
    """All tensors in nested tuples."""
    return [results] if isinstance(results, torch.Tensor) else [part for member in results for part in flat(member)]


def assert_same_outcome(ours, theirs, call):
    """A call on both modules gives equal results, or raises the same error."""
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        try:
            results.append(call(module))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    actual, expected = results
    if isinstance(actual, str) or isinstance(expected, str):
        assert actual == expected
        return
    actual, expected = flat(actual), flat(expected)
    if expected[0].dtype in (torch.float32, torch.float64):
        assert_equal_results(actual, expected)
    else:
        assert [part.dtype for part in actual] == [part.dtype for part in expected]
        assert all(map(torch.equal, actual, expected))


def plain_call(kind, dtype=torch.float64):
    """Input and state of a plain call of torch.nn's `kind` with 9 inputs and 9 units: 3 steps of 4 rows."""
    torch.manual_seed(6)
    is_cell = kind in CELLS
    x = torch.randn(4, 9, dtype=dtype) if is_cell else torch.randn(3, 4, 9, dtype=dtype)
    state = tuple(torch.randn(*([] if is_cell else [1]), 4, 9, dtype=dtype) for _ in range(1 + ("LSTM" in kind)))
    return x, state if len(state) > 1 else state[0]


def step_state(cell, *batch, dtype=torch.float64):
    """A random state of a cell: [B, H], or [H] without a batch."""
    state = tuple(torch.randn(*batch, cell.hidden_size, dtype=dtype) for _ in range(1 + isinstance(cell, NN.LSTMCell)))
    return state if len(state) > 1 else state[0]


def weight_of(module):
    return module.weight_ih if hasattr(module, "weight_ih") else module.weight_ih_l0


class Mixed(NN.Module):
    """All kinds of layers and cells: some deep inside, one used under two names."""

    def __init__(self):
        super().__init__()
        self.embedding = NN.Embedding(11, 5)
        self.encoder = NN.ModuleDict({"lstm": NN.LSTM(5, 6, 2, bidirectional=True, batch_first=True)})
        self.gru = NN.GRU(12, 8)
        self.again = self.gru
        self.cells = NN.ModuleList([NN.LSTMCell(8, 7), NN.GRUCell(7, 7), NN.RNNCell(7, 7)])
        self.rnn = NN.RNN(7, 4, nonlinearity="relu")
        self.head = NN.Linear(4, 3)

    def forward(self, tokens):
        x, _ = self.encoder["lstm"](self.embedding(tokens))
        x, _ = self.again(x.transpose(0, 1))
        h, _ = self.cells[0](x[-1])
        h = self.cells[2](self.cells[1](h))
        x, _ = self.rnn(h[None])
        return self.head(x[0])


NAMES = ["encoder.lstm", "gru", "cells.0", "cells.1", "cells.2", "rnn"]
TOKENS = torch.arange(24).reshape(4, 6) % 11


def mixed():
    torch.manual_seed(5)
    return Mixed()
