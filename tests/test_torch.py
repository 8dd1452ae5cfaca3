"""gatewise.torch against torch.nn: the same constructor, numbers, gradients, errors and habits, on gatewise's core."""

import copy
import gc
import io
import itertools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES

torch = pytest.importorskip("torch")
import gatewise.torch as gt  # noqa: E402 - needs torch
from torch import library  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),  # PyTorch: not by oneDNN
    pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning"),
]

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
NN = torch.nn
REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread_in_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twins(kind, *sizes, dtype=torch.float64, **options):
    """torch.nn's module and ours from the same seed: the same numbers."""
    made = []
    for home in (NN, gt):
        torch.manual_seed(3)
        made.append(getattr(home, kind)(*sizes, dtype=dtype, **options))
    return made


def members(state):
    return state if isinstance(state, tuple) else (state,)


def state_for(module, *batch, seed=5, requires_grad=True):
    torch.manual_seed(seed)
    dtype = next(module.parameters()).dtype
    sequences = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    state = tuple(torch.randn(sequences, *batch, size, dtype=dtype, requires_grad=requires_grad) for size in sizes)
    return state if len(state) > 1 else state[0]


def data_of(output):
    return output.data if isinstance(output, NN.utils.rnn.PackedSequence) else output


def run(module, x, state=None, **options):
    """Output, state and all gradients of one module; x is a leaf of its own."""
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
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), index
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), index
            kind = f"torch_{str(one.dtype).removeprefix('torch.')}_gradient"
            scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
            assert not one.numel() or float((one - other).detach().abs().max()) / scale <= TOLERANCES[kind].limit, index


def options_grid():
    for kind in LAYERS:
        for dtype in (torch.float32, torch.float64):
            for options in (
                {}, {"bias": False}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 3},
                {"num_layers": 2, "bidirectional": True, "batch_first": True},
                *([{"nonlinearity": "relu"}] if kind == "RNN" else []),
                *([{"proj_size": 3}, {"proj_size": 3, "num_layers": 2, "bidirectional": True}] * (kind == "LSTM")),
            ):  # fmt: skip
                yield kind, dtype, options


GRID = pytest.mark.parametrize(("kind", "dtype", "options"), list(options_grid()), ids=str)


@GRID
@pytest.mark.parametrize("given", [False, True], ids=["zero", "state"])
def test_layers(kind, dtype, options, given):
    """Outputs, states and every gradient: batched and not, training and not."""
    theirs, ours = twins(kind, 5, 9, dtype=dtype, **options)
    assert repr(theirs) == repr(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for shape in ((7, 3, 5), (1, 1, 5), (6, 5)):
        x = torch.randn(shape, dtype=dtype)
        batch = () if len(shape) == 2 else (shape[0] if theirs.batch_first else shape[1],)
        state = state_for(theirs, *batch) if given else None
        wanted = run(theirs, x, state)
        assert_equal_results(run(ours, x, state), wanted)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for _ in range(2):  # the second time with packed weights
                    output, after = ours(x, state)
                    count = 1 + len(members(after))
                    assert_equal_results([output, *members(after)], [part.detach() for part in wanted[:count]])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (70, 5)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zero", "state"])
def test_cells(kind, dtype, bias, shape, given):
    theirs, ours = twins(kind, 5, 9, dtype=dtype, bias=bias)
    x = torch.randn(shape, dtype=dtype)
    state = tuple(torch.randn(*shape[:-1], 9, dtype=dtype) for _ in range(2 if kind == "LSTMCell" else 1))
    state = None if not given else state if len(state) > 1 else state[0]

    def results(module):
        leaf = x.clone().requires_grad_()
        before = [] if state is None else [part.clone().requires_grad_() for part in members(state)]
        now = None if state is None else tuple(before) if len(before) > 1 else before[0]
        for _ in range(3):
            now = module(leaf, now)
        module.zero_grad()
        sum((part * (i + 1)).sin().sum() for i, part in enumerate(members(now))).backward()
        return [*members(now), leaf.grad, *(leaf.grad for leaf in before), *(p.grad for p in module.parameters())]

    assert_equal_results(results(ours), results(theirs))
    with torch.no_grad():
        for _ in range(2):
            assert_equal_results(members(ours(x, state)), members(theirs(x, state)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("given", [False, True], ids=["zero", "state"])
def test_packed_sequences(kind, enforce_sorted, given):
    theirs, ours = twins(kind, 5, 9, 2, bidirectional=True)
    lengths = [7, 4, 4, 1] if enforce_sorted else [4, 1, 7, 4]
    x = torch.randn(7, 4, 5, dtype=torch.float64)
    state = state_for(theirs, 4) if given else None

    def results(module):
        leaf = x.clone().requires_grad_()
        packed = NN.utils.rnn.pack_padded_sequence(leaf, lengths, enforce_sorted=enforce_sorted)
        found = run(module, packed, state)
        output, _ = module(packed, state)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            one, other = getattr(output, name), getattr(packed, name)
            assert (one is None and other is None) or torch.equal(one, other)
        return [*found, leaf.grad]

    assert_equal_results(results(ours), results(theirs))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"checkpoint_every": 3}], ids=str)
def test_packed_rows_have_the_bits_of_padded_ones(kind, dtype, options, use_threads):
    """Packed, the core walks over rows as they lie; padded, over the same rows wherever they are."""
    every = {name: options[name] for name in options if name == "checkpoint_every"}
    dropout = options.get("dropout", 0.0)
    projection = {"proj_size": 20} if kind == "LSTM" else {}
    _, module = twins(kind, 5, 33, 3, bidirectional=True, dropout=dropout, dtype=dtype, **projection)
    lengths = [9, 9, 5, 5, 4, 1] if dropout else [4, 9, 1, 5, 9, 5]  # a row's mask goes by its place
    x, state = torch.randn(9, 6, 5, dtype=dtype), state_for(module, 6)

    def results(given, **more):
        torch.manual_seed(4)
        found = run(module, given, state, **every, **more)
        if isinstance(given, NN.utils.rnn.PackedSequence):
            output = given._replace(data=found[0].detach())
            found[0] = NN.utils.rnn.pad_packed_sequence(output)[0]
        return found

    def padded():
        """With the gradients that the rows of a packed output get."""
        torch.manual_seed(9)
        packed = NN.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        size = len(packed.data), module(packed)[0].data.shape[1]
        torch.manual_seed(9)
        grad = NN.utils.rnn.pad_packed_sequence(packed._replace(data=torch.randn(size, dtype=dtype)))[0]
        leaf, before = x.clone().requires_grad_(), [part.detach().clone().requires_grad_() for part in members(state)]
        torch.manual_seed(4)
        y, after = module(leaf, before[0] if len(before) == 1 else tuple(before), lengths=lengths, **every)
        module.zero_grad()
        torch.manual_seed(9)
        torch.randn(size, dtype=dtype)
        loss = (y * grad).sum() + sum((one * torch.randn(one.shape, dtype=dtype)).sum() for one in members(after))
        loss.backward()
        return [y, *members(after), *(one.grad for one in (*before, *module.parameters()))]

    expected = padded()
    for threads in (1, 2):
        use_threads(threads)
        torch.set_num_threads(threads)
        found = results(NN.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_packed_sequences_that_are_none():
    """Counts that grow, end in zero or do not add up go to PyTorch; nothing reads beyond the rows."""
    _, ours = twins("LSTM", 5, 9)
    data = torch.randn(5, 5, dtype=torch.float64)
    for sizes in (
        torch.tensor([3.0, 2.0]), torch.tensor([3, 2], dtype=torch.int32), torch.tensor([[3, 2]]), torch.tensor(5),
        torch.tensor([2**62] * 4),
    ):  # fmt: skip
        assert ours._gatewise_refuses(NN.utils.rnn.PackedSequence(data, sizes), None)
    few = NN.utils.rnn.PackedSequence(data, torch.tensor([3, 2]), torch.tensor([0]), torch.arange(3))
    assert ours._gatewise_refuses(few, None) == gt.WRONG
    for counts in ([2, 3], [3, 0], [3, 3], [2, 1], []):
        wrong = NN.utils.rnn.PackedSequence(torch.randn(5, 5, dtype=torch.float64), torch.tensor(counts))
        assert ours._gatewise_refuses(wrong, None) == gt.WRONG


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_resets(kind):
    """As gatewise's own layers, with torch's tensors; gradients by central differences."""
    _, ours = twins(kind, 3, 4, bidirectional=True, batch_first=True)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 0])
    y, _ = ours(x, lengths=lengths)
    for row, length in enumerate(lengths):
        if length:
            alone, _ = ours(x[row : row + 1, :length])
            assert torch.equal(y[row, :length], alone[0])
        assert not y[row, length:].any()
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[0, 3] = True
    z, _ = ours(x, resets=resets)
    assert torch.equal(z[0, :3], ours(x[:1, :3])[0][0])
    assert torch.equal(z[0, 3:], ours(x[:1, 3:])[0][0])
    for every in (None, 2):
        torch.autograd.gradcheck(
            lambda x, every=every: ours(x, lengths=lengths, resets=resets, checkpoint_every=every)[0],
            x.clone().requires_grad_(),
        )
    with pytest.raises(ValueError, match=r"^lengths: expected numbers from 0 to 6 .T., got 7"):
        ours(x, lengths=[7, 1, 1])
    with pytest.raises(ValueError, match=r"^resets: expected shape \(3, 6\), got \(6, 3\)"):
        ours(x, resets=resets.T)
    with pytest.raises(ValueError, match=r"^checkpoint_every: "):
        ours(x, checkpoint_every=0)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_gradcheck(kind):
    _, ours = twins(kind, 3, 4)
    shape = (2, 3) if kind in CELLS else (3, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*ours.named_parameters(), strict=True)

    def call(x, *weights):
        found = torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x,))
        return found if isinstance(found, torch.Tensor) else found[0]

    torch.autograd.gradcheck(call, (x, *weights))


# -----------------------------------------------------------------------------------------------------------
# Tensors of all kinds


@pytest.mark.parametrize("kind", LAYERS)
def test_layouts(kind):
    """Strided, expanded, transposed, sliced inputs and gradients."""
    theirs, ours = twins(kind, 5, 9)
    wide = torch.randn(6, 3, 10, dtype=torch.float64)
    for x in (
        wide[..., ::2], wide[..., 5:], wide[::2, :, :5], wide[:, :1, :5].expand(6, 3, 5),
        torch.randn(5, 3, 6, dtype=torch.float64).permute(2, 1, 0),
    ):  # fmt: skip
        results = []
        for module in (ours, theirs):
            leaf = x.detach().requires_grad_()
            module.zero_grad()
            y, _ = module(leaf)
            y.sum().backward()  # an expanded gradient
            results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        assert_equal_results(*results)


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_parameters(kind):
    theirs, ours = twins(kind, 5, 9, 2)
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("l1" in name and "hh" in name)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    assert_equal_results(run(ours, x), run(theirs, x))
    for module in (theirs, ours):
        module.requires_grad_(False)
    results = run(ours, x)
    assert_equal_results(results, run(theirs, x))
    assert all(parameter.grad is None for parameter in ours.parameters())
    ours.requires_grad_(True)
    y, _ = ours(x)  # x itself wants no gradient
    y.sum().backward()
    assert ours.weight_ih_l0.grad is not None


def test_saved_tensors_are_watched():
    """Changing the input between forward and backward is an error, as everywhere in PyTorch."""
    _, ours = twins("LSTM", 5, 9)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    y, _ = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


IN_PLACE = {
    "relu_": lambda y: y.relu_(), "mul_": lambda y: y.mul_(1.5), "clamp_": lambda y: y.clamp_(-0.1, 0.1),
    "y[-1].mul_": lambda y: y[-1].mul_(2), "y[0, 1] = 0": lambda y: y.__setitem__((0, 1), 0),
    "through data": lambda y: y.data.mul_(2), "through NumPy": lambda y: y.detach().numpy().fill(7),
    "ReLU(inplace=True)": NN.ReLU(inplace=True), "twice": lambda y: y.mul_(2).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("operation", IN_PLACE)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRU", {}), ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}), ("RNN", {}),
        ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
    ],
    ids=str,
)  # fmt: skip
def test_outputs_may_be_changed_in_place(kind, operation, options):
    results = []
    for module in twins(kind, 5, 9, **options):
        torch.manual_seed(2)
        x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        y, after = module(x)
        IN_PLACE[operation](y)
        (y.square().sum() + after.sum()).backward()
        results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    assert_equal_results(*results)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("how", ["packed", "unbatched", "lengths", "checkpoints", "stacked", "exported"])
def test_outputs_of_all_roads_may_be_changed_in_place(kind, how):
    """As if they were copied before."""
    results = []
    for change in (lambda y: y.mul_(0.5).clamp_(-0.2, 0.2), lambda y: y.clone().mul_(0.5).clamp_(-0.2, 0.2)):
        module = twins(kind, 5, 9)[1]
        torch.manual_seed(2)
        x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        if how == "packed":
            packed = NN.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 1]))
            y = module(packed)[0].data
        elif how == "unbatched":
            y = module(x[:, 0])[0]
        elif how == "lengths":
            y = module(x, lengths=[2, 6, 0])[0]
        elif how == "checkpoints":
            y = module(x, checkpoint_every=2)[0]
        elif how == "exported":
            y = torch.export.export(module, (x.detach(),), strict=False).module()(x)[0]
        else:
            y = change(module(x)[0])
            torch.manual_seed(3)
            module = getattr(gt, kind)(9, 9, dtype=torch.float64)
            y = module(y)[0]
        change(y).square().sum().backward()
        results.append([x.grad, *([] if how == "exported" else [p.grad for p in module.parameters()])])
    assert_equal_results(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_of_lstm_are_saved_tensors(dtype):
    """As those of torch.nn's in float32: backward says so, and computes nothing wrong."""
    module = twins("LSTM", 5, 9, dtype=dtype)[1]
    y = module(torch.randn(4, 2, 5, dtype=dtype))[0]
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    _, ours = twins("GRU", 5, 9)
    x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    y, _ = ours(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_second_derivatives(kind):
    """By PyTorch's own code: a penalty on the size of the gradient, and its gradient."""
    theirs, ours = twins(kind, 3, 4)
    shape = (2, 3) if kind in CELLS else (5, 2, 3)

    def results(module):
        x = torch.linspace(-1, 1, int(np.prod(shape)), dtype=torch.float64).reshape(shape).requires_grad_()
        module.zero_grad()
        y = members(module(x))[0]
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (y.sum() + (grad**2).sum()).backward()
        return [grad, x.grad, *(p.grad for p in module.parameters())]

    own = results(ours)
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    wanted = results(theirs)
    torch.backends.mkldnn.set_flags(_enabled=onednn)
    assert_equal_results(own, wanted)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["stacked", "fed back", "both states", "x from h", "bidirectional"])
def test_second_derivatives_of_calls_that_hang_together(kind, how):
    """What one input was made of must not be gone through twice."""
    theirs, ours = twins(
        kind, 4, 4, bidirectional=how == "bidirectional", num_layers=2 if how == "bidirectional" else 1
    )

    def call(module, x):
        if how == "stacked":
            return module(module(x)[0])[0]
        if how == "fed back":
            return module(x, module(x)[1])[0]
        h = x[:1].tanh()
        if how == "both states":
            return module(x, (h, h) if kind == "LSTM" else h)[0]
        if how == "x from h":
            return module(h.expand(5, 2, 4) * x, (h, 2 * h) if kind == "LSTM" else h)[0]
        return module(x)[0]

    def results(module):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 2, 4).requires_grad_()
        module.zero_grad()
        y = call(module, x)
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (y.sum() + (grad**2).sum()).backward()
        return [grad, x.grad, *(p.grad for p in module.parameters())]

    assert_equal_results(results(ours), results(theirs))


def test_batched_and_negated_gradients():
    theirs, ours = twins("GRU", 3, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    found = [torch.autograd.functional.jacobian(lambda x, m=m: m(x)[0], x, vectorize=True) for m in (ours, theirs)]
    assert_equal_results([found[0]], [found[1]])
    for module in (ours, theirs):
        module.zero_grad()
        y, _ = module(x)
        y.backward(torch._neg_view(torch.ones_like(y)))
    assert_equal_results([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_tapes_are_saved_tensors():
    """Activation checkpointing drops them, and hooks see them."""
    ours = gt.GRU(16, 32)
    x = torch.randn(50, 4, 16)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        ours(x)[0].sum().backward()
    assert max(sizes) >= 50 * 4 * 32 * 4 * 5
    expected = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda x: ours(x)[0], x, use_reentrant=False).sum().backward()
    assert_equal_results([p.grad for p in ours.parameters()], expected)


def test_a_default_device_changes_nothing():
    _, ours = twins("LSTM", 3, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    expected = ours(x, lengths=[1, 3])[0]
    with torch.device("cpu"):
        assert torch.equal(ours(x, lengths=[1, 3])[0], expected)


def test_second_derivatives_where_there_are_none():
    _, ours = twins("LSTM", 3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    for output in (ours(x)[0], ours.eval()(x, lengths=[5, 2])[0], ours(x, resets=torch.eye(5, 2))[0]):
        with pytest.raises(RuntimeError, match=r"create_graph.* expected a call without dropout, lengths, resets"):
            torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_drawn_from_torchs_generator(kind):
    _, ours = twins(kind, 5, 40, 2, dropout=0.5)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(ours(x)[0], outputs[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


# -----------------------------------------------------------------------------------------------------------
# What gatewise has no road for goes to PyTorch


def flat(results):
    """All tensors in tuples in tuples."""
    return [results] if isinstance(results, torch.Tensor) else [part for one in results for part in flat(one)]


def refused_or_equal(ours, theirs, call):
    """Both give the same, or both raise the same."""
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        try:
            results.append(call(module))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    one, other = results
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    one, other = flat(one), flat(other)
    if other[0].dtype in (torch.float32, torch.float64):
        assert_equal_results(one, other)
    else:
        assert [part.dtype for part in one] == [part.dtype for part in other]
        assert all(map(torch.equal, one, other))


BAD_CALLS = {
    "a wrong size": lambda m: m(torch.zeros(3, 2, 4, dtype=torch.float64)),
    "one axis": lambda m: m(torch.zeros(5, dtype=torch.float64)),
    "four axes": lambda m: m(torch.zeros(1, 1, 1, 5, dtype=torch.float64)),
    "another dtype": lambda m: m(torch.zeros(3, 2, 5)),
    "integers": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.int64)),
    "no tensor": lambda m: m([[1.0]]),
    "a state of another batch": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.float64), state_for(m, 3)),
    "an unbatched state": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.float64), state_for(m)),
    "no rows": lambda m: m(torch.zeros(3, 0, 5, dtype=torch.float64)),
    "the meta device": lambda m: m.to("meta")(torch.zeros(3, 2, 5, dtype=torch.float64, device="meta")),
    "half": lambda m: m.bfloat16()(torch.ones(3, 2, 5, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_calls(kind, name):
    theirs, ours = twins(kind, 5, 9)
    if name == "the meta device":
        assert BAD_CALLS[name](ours)[0].device.type == "meta"
        return
    refused_or_equal(ours, theirs, BAD_CALLS[name])


def test_no_steps():
    """Where PyTorch raises, so do we."""
    theirs, ours = twins("LSTM", 5, 9)
    refused_or_equal(ours, theirs, lambda m: m(torch.zeros(0, 2, 5, dtype=torch.float64)))


def test_autocast_and_transforms():
    theirs, ours = twins("LSTM", 5, 9, dtype=torch.float32)
    x = torch.randn(3, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        refused_or_equal(ours, theirs, lambda m: m(x))
        with pytest.raises(NotImplementedError, match=r"^lengths, resets, checkpoint_every: .* got autocast"):
            ours(x, lengths=[1, 2])
    theirs, ours = twins("RNN", 5, 9)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    for transform in (
        lambda m: (torch.func.vmap(lambda one: m(one)[0], randomness="same")(x),),
        lambda m: (torch.func.grad(lambda one: m(one)[0].sum())(x[0]),),
        lambda m: (torch.func.jvp(lambda one: m(one)[0], (x[0],), (x[1],))[1],),
    ):
        refused_or_equal(ours, theirs, transform)


def test_forward_mode_derivatives():
    theirs, ours = twins("RNN", 5, 9)
    x, tangent = torch.randn(2, 3, 2, 5, dtype=torch.float64)

    def call(module):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return (torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent,)

    refused_or_equal(ours, theirs, call)


class Subclass(torch.Tensor):
    pass


class Counting(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Refusing(torch.overrides.TorchFunctionMode):
    """Questions of ours must not reach a mode."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        assert function is not torch.Tensor.is_neg
        return function(*arguments, **(options or {}))


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses to have been passed by."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen += 1
        return function(*arguments, **(options or {}))

    def __exit__(self, *error):
        assert self.seen
        return super().__exit__(*error)


def without_memory(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def misaligned(tensor):
    return torch.frombuffer(bytearray(b"four" + tensor.numpy().tobytes()), dtype=tensor.dtype, offset=4).view(
        tensor.shape
    )


def leaked(tensor):
    found = []
    torch.func.grad(lambda one: (found.append(one), one.sum())[1])(tensor)
    return found[0]


ODD_TENSORS = {
    "negated": lambda t: torch._neg_view(t),
    "negated by a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "every second unit": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows between others": lambda t: torch.stack([t, t], -2)[..., 0, :],
    "one row for all": lambda t: t[:1].expand_as(t),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a Parameter": lambda t: NN.Parameter(t),
    "a tensor that wants a gradient": lambda t: t.clone().requires_grad_(),
    "a subclass": lambda t: t.as_subclass(Subclass),
    "zero by its kind": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex128),
    "integers": lambda t: t.long(),
    "sparse": lambda t: t.to_sparse(),
    "on another device": lambda t: t.to("meta"),
    "left over from a transform": leaked,
    "without memory": without_memory,
    "misaligned": misaligned,
    "too few units": lambda t: t[..., :-1].contiguous(),
    "another batch": lambda t: t[:-1],
    "without a batch": lambda t: t[0],
    "no rows": lambda t: t[:0],
    "a number": lambda t: t.flatten()[0],
    "one axis more": lambda t: t[None],
    "an array": lambda t: t.numpy(),
    "nothing": lambda t: None,
}


def plain_call(kind, dtype=torch.float64):
    """Input and state of a plain call of torch.nn's `kind` with 9 inputs and 9 units: 3 steps of 4 rows."""
    torch.manual_seed(6)
    is_cell = kind in CELLS
    x = torch.randn(4, 9, dtype=dtype) if is_cell else torch.randn(3, 4, 9, dtype=dtype)
    state = tuple(torch.randn(*([] if is_cell else [1]), 4, 9, dtype=dtype) for _ in range(1 + ("LSTM" in kind)))
    return x, state if len(state) > 1 else state[0]


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind in (*CELLS, *LAYERS) for place in ("xhc" if "LSTM" in kind else "xh")],
)
@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")
def test_odd_tensors(kind, place, odd):
    """After a plain call, whose packed weights are there."""
    if (kind, place, odd) == ("LSTMCell", "c", "without memory"):
        pytest.skip("PyTorch itself crashes")
    theirs, ours = twins(kind, 9, 9)
    x, state = plain_call(kind)
    given = dict(zip("xhc", (x, *members(state)), strict=False))

    def call(module):
        x, *state = given.values()
        return module(x, tuple(state) if "LSTM" in kind else state[0])

    with torch.no_grad():
        call(ours)
        given[place] = ODD_TENSORS[odd](given[place])
        if odd == "on another device":
            for module in (theirs, ours):
                with pytest.raises((RuntimeError, NotImplementedError)):
                    torch.equal(flat(call(module))[0], torch.zeros(()))
        elif odd == "a subclass":
            assert [type(part) for part in flat(call(ours))] == [type(part) for part in flat(call(theirs))]
        else:
            refused_or_equal(ours, theirs, call)


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_odd_states(kind):
    theirs, ours = twins(kind, 9, 9)
    x, state = plain_call(kind)
    one = members(state)[0]
    with torch.no_grad():
        ours(x, state)
        for odd in (one, (one,), (one, one), [one, one], (one,) * 3, (), "state", 1, (None, None), (one, None), None):
            refused_or_equal(ours, theirs, lambda module, odd=odd: module(x, odd))


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_plain_calls_of_any_strides(kind, options):
    """And with the bits, and without gradients the memory, of calls that go by the longer road."""
    theirs, ours = twins(kind, 9, 9, **options)
    whole = torch.randn(6, 8, 18, dtype=torch.float64)
    with torch.no_grad():
        for x in (
            whole[:3, :4, :9], whole[::2, ::2, 9:], whole.transpose(0, 1)[:3, :4, :9],
            whole[:1, :1, :9].expand(3, 4, 9), whole[:1, :4, :9], whole[:3, :1, :9], whole[0, :4, :9],
            whole[0, :1, :9], whole[0, ::3, :9],
        ):  # fmt: skip
            state = state_for(ours, *([] if x.dim() == 2 else [x.size(0 if ours.batch_first else 1)]))
            for before in (None, state):
                gt.repack(ours)
                first, second = flat(ours(x, before)), flat(ours(x, before))
                assert gt._caches[id(ours)]
                assert_equal_results(second, flat(theirs(x, before)))
                assert all(map(torch.equal, first, second))
                assert [part.shape for part in first] == [part.shape for part in second]
                assert all(part.is_contiguous() and not part.requires_grad for part in second)


def test_tensors_made_by_the_core_are_torchs():
    """What may be done with any tensor may be done with them, long after their module."""
    _, ours = twins("LSTM", 9, 9)
    x, state = plain_call("LSTM")
    with torch.no_grad():
        ours(x, state)
        found = ours(x, state)
    y, (h, _) = found
    kept = y.clone()
    del ours, found
    gc.collect()
    y.add_(1).sub_(1)
    assert torch.allclose(y, kept)
    assert torch.equal(pickle.loads(pickle.dumps(h)), h)
    assert torch.equal(copy.deepcopy(h), h)
    h.numpy()[...] = 2
    assert float(h.sum()) == 2 * h.numel()
    assert y.data_ptr() % 64 == 0
    assert h.share_memory_().is_shared()
    weight = torch.ones(9, dtype=torch.float64, requires_grad=True)
    (y * weight).sum().backward()
    assert torch.allclose(weight.grad, kept.sum((0, 1)))
    ours = twins("LSTM", 9, 9)[1]
    with torch.inference_mode():
        ours(x, state)
        assert all(part.is_inference() for part in flat(ours(x, state)))


def traced(module, x, state):
    """Traced on one input, run on another."""
    found = torch.jit.trace(
        lambda x, *state: module(x, state if len(state) > 1 else state[0]), (x * 2, *members(state))
    )
    return found(x, *members(state))


def tangents(module, x, state):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        return [torch.autograd.forward_ad.unpack_dual(part).tangent for part in flat(module(dual, state))]


def within(context):
    def call(module, x, state):
        with context():
            return module(x, state)

    return call


ODD_MOMENTS = {
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a mode of functions": within(Counting),
    "a mode that refuses": within(Refusing),
    "a mode of operations": within(Watching),
    "a default device": within(lambda: torch.device("cpu")),
    "functionalize": lambda m, x, state: torch.func.functionalize(lambda one: m(one, state))(x),
    "vmap": lambda m, x, state: torch.vmap(lambda one: m(one)[0], randomness="same")(x),
    "a trace": traced,
    "forward-mode derivatives": tangents,
    "gradients": within(torch.enable_grad),
}


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
@pytest.mark.parametrize("moment", ODD_MOMENTS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_odd_moments(kind, moment):
    theirs, ours = twins(kind, 9, 9, dtype=torch.float32)
    x, state = plain_call(kind, torch.float32)
    with torch.no_grad():
        ours(x, state)
        refused_or_equal(ours, theirs, lambda module: ODD_MOMENTS[moment](module, x, state))


@pytest.mark.parametrize("sizes", [(0, 9), (5, 0)], ids=str)
def test_cells_of_no_size(sizes):
    theirs, ours = twins("GRUCell", *sizes)
    x, state = torch.zeros(4, sizes[0], dtype=torch.float64), step_state(ours, 4)
    with torch.no_grad():
        refused_or_equal(ours, theirs, lambda module: module(x, state))


def test_odd_weights():
    """Weights of the same address and version that are not the same."""
    theirs, ours = twins("GRUCell", 6, 9)
    x, state = torch.randn(4, 6, dtype=torch.float64), step_state(ours, 4)
    with torch.no_grad():
        weight = theirs.weight_ih.detach()
        for change in (
            torch._neg_view,
            lambda weight: weight.view(6, 27).T,
            lambda weight: weight.as_subclass(Subclass),
        ):
            for value in (weight, change(weight)):
                for module in (theirs, ours):
                    module.weight_ih = NN.Parameter(value)
                refused_or_equal(ours, theirs, lambda module: module(x, state))


ATTRIBUTES = [
    ("RNNCell", {}, "nonlinearity", "relu"), ("RNNCell", {}, "nonlinearity", "other"), ("RNN", {}, "mode", "RNN_RELU"),
    ("LSTM", {}, "bias", False), ("LSTM", {"num_layers": 2}, "num_layers", 1),
    ("LSTM", {"bidirectional": True}, "bidirectional", False), ("LSTM", {}, "hidden_size", 4),
    ("GRU", {}, "input_size", 4), ("GRU", {}, "hidden_size", 4), ("GRU", {}, "bias", False),
    ("GRUCell", {}, "input_size", 4), ("GRUCell", {}, "hidden_size", 4), ("LSTM", {}, "batch_first", True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "name", "value"), ATTRIBUTES, ids=str)
def test_changed_attributes(kind, options, name, value):
    """torch.nn reads them at each call."""
    theirs, ours = twins(kind, 9, 9, **options)
    x, _ = plain_call(kind)
    with torch.no_grad():
        ours(x)
        for module in (theirs, ours):
            setattr(module, name, value)
        refused_or_equal(ours, theirs, lambda module: module(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_weights_of_other_kinds(kind):
    """Misaligned ones, as of a file in memory; of another shape; without memory. Ours leave their storage as it is."""
    theirs, ours = twins(kind, 9, 9)
    x, _ = plain_call(kind)
    name = "bias_ih" if kind in CELLS else "bias_ih_l0"
    for change in (misaligned, lambda bias: bias[:1].clone(), lambda bias: bias[:-1].clone(), without_memory):
        value = NN.Parameter(change(getattr(theirs, name).detach()))
        with torch.no_grad():
            ours(x)
            before = [getattr(module, name) for module in (theirs, ours)]
            for module in (theirs, ours):
                setattr(module, name, value)
            refused_or_equal(ours, theirs, lambda module: module(x))
            for module, old in zip((theirs, ours), before, strict=True):
                setattr(module, name, old)
    flat(ours(x))[0].sum().backward()
    assert all(parameter.untyped_storage().resizable() for parameter in ours.parameters())


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_packed_weights_are_forgotten(kind):
    """By what trains, or moves the weights."""
    _, ours = twins(kind, 9, 9)
    x, _ = plain_call(kind)
    for forget in (lambda: ours(x), lambda: ours.to(torch.float32), lambda: setattr(ours, "bias", True)):
        ours.to(torch.float64)
        with torch.no_grad():
            ours(x)
        assert id(ours) in gt._caches
        forget()
        assert id(ours) not in gt._caches


def test_packed_weights_go_with_their_module():
    _, ours = twins("GRUCell", 5, 9)
    with torch.no_grad():
        ours(torch.zeros(1, 5, dtype=torch.float64))
    place = id(ours)
    assert gt._caches[place].module() is ours
    del ours
    gc.collect()
    assert place not in gt._caches


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_the_interface_is_dlpacks(tmp_path):
    """Each offset that the core relies on, against the header that comes with PyTorch."""
    names = {
        "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
        "Device": ("DLDevice", {"type": "device_type", "number": "device_id"}),
        "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
        "Tensor": (
            "DLTensor",
            {
                "data": "data", "device": "device", "axes": "ndim", "dtype": "dtype", "shape": "shape",
                "strides": "strides", "byte_offset": "byte_offset",
            },
        ),
        "Owned": (
            "DLManagedTensorVersioned",
            {"version": "version", "owner": "manager_ctx", "free": "deleter", "flags": "flags", "tensor": "dl_tensor"},
        ),
        "ExchangeApi": (
            "DLPackExchangeAPI",
            {
                "version": "header.version", "older": "header.prev_api", "new_tensor": "managed_tensor_allocator",
                "tensor_of_object": "managed_tensor_from_py_object_no_sync",
                "object_of": "managed_tensor_to_py_object_no_sync",
                "look": "dltensor_from_py_object_no_sync", "stream": "current_work_stream",
            },
        ),
    }  # fmt: skip
    checks = [
        f"static_assert(offsetof({ours}, {one}) == offsetof({theirs}, {other}));"
        f"static_assert(sizeof(std::declval<{ours}>().{one}) == sizeof(std::declval<{theirs}>().{other}));"
        for ours, (theirs, fields) in names.items()
        for one, other in fields.items()
    ]
    checks += [f"static_assert(sizeof({ours}) == sizeof({theirs}));" for ours, (theirs, _) in names.items()]
    checks += [
        "static_assert(int(cpu) == kDLCPU && version_major == DLPACK_MAJOR_VERSION);",
        "static_assert(int(unsigned_integer) == kDLUInt && int(floating) == kDLFloat);",
    ]
    source = tmp_path / "check.cpp"
    header = REPOSITORY / "cpp" / "bindings" / "frameworks" / "dlpack.hpp"
    source.write_text(
        f'#include <cstddef>\n#include <utility>\n#include "ATen/dlpack.h"\n#include "{header}"\n'
        "using namespace gatewise::dlpack;\n" + "\n".join(checks)
    )
    include = pathlib.Path(torch.__file__).parent / "include"
    done = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# -----------------------------------------------------------------------------------------------------------
# Packed weights are never stale


def changed(kind, change, rows, prepare=lambda module: module):
    """Output before and after a change of the weights, and what torch.nn says after it."""
    theirs, ours = twins(kind, 5, 9)
    prepare(ours.eval())
    cell = kind in CELLS
    x = torch.randn(*(() if cell else (rows,)), rows if cell else 1, 5, dtype=torch.float64)
    state = step_state(ours, rows) if cell else None
    with torch.no_grad():
        for _ in range(2):
            before = members(ours(x, state))[0]
    change(ours)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        after, wanted = members(ours(x, state))[0], members(theirs(x, state))[0]
    assert not torch.equal(before, after)
    assert_equal_results([after], [wanted])


def step_state(cell, *batch, dtype=torch.float64):
    state = tuple(torch.randn(*batch, cell.hidden_size, dtype=dtype) for _ in range(1 + isinstance(cell, NN.LSTMCell)))
    return state if len(state) > 1 else state[0]


def weight_of(module):
    return module.weight_ih if hasattr(module, "weight_ih") else module.weight_ih_l0


def by_optimizer(module):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    members(module(torch.ones(3, 5, dtype=weight_of(module).dtype)))[0].sum().backward()
    optimizer.step()


def in_place(module):
    with torch.no_grad():
        weight_of(module).mul_(2)


def by_state_dict(module):
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})


def by_another_parameter(module):
    name = "weight_ih" if hasattr(module, "weight_ih") else "weight_ih_l0"
    setattr(module, name, NN.Parameter(2 * weight_of(module).detach()))


def by_data(module):
    weight_of(module).data = 2 * weight_of(module).data


def through_numpy(module):
    weight_of(module).detach().numpy()[...] *= 2


def through_data(module):
    weight_of(module).data.mul_(2)


def by_fused_optimizer(module):
    optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def through_a_vector(module):
    """Of all parameters, which are then views of it."""
    vector = NN.utils.parameters_to_vector(module.parameters()).detach()
    NN.utils.vector_to_parameters(vector, module.parameters())
    with torch.no_grad():
        module(torch.ones(*(1,) * isinstance(module, NN.RNNBase), 1, 5, dtype=vector.dtype))
    vector.mul_(2)


def through_the_storage(module):
    storage = weight_of(module).untyped_storage()
    doubled = 2 * torch.empty(0, dtype=weight_of(module).dtype).set_(storage.clone())
    storage.copy_(doubled.untyped_storage())


def through_dlpack(module):
    torch.from_dlpack(weight_of(module).detach()).data.mul_(2)


SEEN = [
    by_optimizer, in_place, by_state_dict, by_another_parameter, by_data, by_fused_optimizer, through_numpy,
    through_data, through_a_vector, through_the_storage, through_dlpack,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rows", [1, 100])
def test_changes_are_seen(kind, change, rows):
    changed(kind, change, rows)


def matrices(module):
    """The weights and biases, whose memory is written to without PyTorch's counting it."""
    return [parameter.detach().numpy() for parameter in module.parameters()]


def one_number(module):
    matrices(module)[0][1, 2] *= 2


def the_last_number(module):
    matrices(module)[1].flat[-1] += 1


def one_bias(module):
    matrices(module)[-1][3] += 0.5


def one_sign(module):
    matrices(module)[0][4, 0] *= -1


def all_signs(module):
    for matrix in matrices(module):
        matrix *= -1


def one_row(module):
    matrices(module)[1][5] = 1


def one_column(module):
    matrices(module)[0][:, 3] = 0


def two_numbers_exchanged(module):
    matrix = matrices(module)[0]
    matrix[0, 1], matrix[1, 1] = matrix[1, 1], matrix[0, 1].copy()


def rows_reversed(module):
    matrix = matrices(module)[1]
    matrix[...] = matrix[::-1].copy()


def columns_rolled(module):
    matrix = matrices(module)[1]
    matrix[...] = np.roll(matrix, 1, axis=1)


def more_and_less(module):
    """By the same, so that no sum changes."""
    matrix = matrices(module)[1]
    matrix[2, 3] += 0.25
    matrix[3, 3] -= 0.25


def clamped(module):
    for matrix in matrices(module):
        np.clip(matrix, -0.33, 0.33, out=matrix)


PARTIAL = [
    one_number, the_last_number, one_bias, one_sign, all_signs, one_row, one_column, two_numbers_exchanged,
    rows_reversed, columns_rolled, more_and_less, clamped,
]  # fmt: skip


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("change", PARTIAL, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rows", [2, 63, 100])
def test_uncounted_changes_of_some_numbers_are_seen(kind, change, rows):
    changed(kind, change, rows)


def test_the_least_bit_of_a_weight_is_seen():
    """It is too small for the tolerance of a comparison: by the packed weights."""
    _, ours = twins("GRUCell", 5, 9)
    with torch.no_grad():
        ours(torch.ones(1, 5, dtype=torch.float64))
        before = gt._caches[id(ours)].weights
        ours(torch.ones(1, 5, dtype=torch.float64))
        assert gt._caches[id(ours)].weights is before
        matrix = matrices(ours)[0]
        matrix[0, 0] = np.nextafter(matrix[0, 0], 2)
        ours(torch.ones(1, 5, dtype=torch.float64))
        assert gt._caches[id(ours)].weights is not before


def test_finite_differences():
    """Of a loss, by writes through `.data`, against backward."""
    torch.manual_seed(21)
    module, x, step = gt.LSTM(3, 7).double(), torch.randn(4, 2, 3, dtype=torch.float64), 1e-5

    def loss():
        return module(x)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(), module.weight_hh_l0)
    numerical, weight = torch.zeros_like(gradient), module.weight_hh_l0.data
    with torch.no_grad():
        loss()
        for place in np.ndindex(*weight.shape):
            old = weight[place].item()
            for sign in (1, -1):
                weight[place] = old + sign * step
                numerical[place] += sign * loss() / (2 * step)
            weight[place] = old
    assert torch.allclose(numerical, gradient, rtol=1e-5, atol=1e-8)


def known_weights(*tensors):
    """What knows these tensors again; what it has packed is another matter."""
    packed = gt._core.Packed("gru", np.dtype(np.float32), 1, 1, 0, 1, 1, [[np.zeros((3, 1), "f4")] * 2 + [None] * 4])
    return gt._core.TensorWeights(gt._tensors, ("any",) * len(tensors), tensors, lambda weights: packed, False)


@pytest.mark.parametrize("size", [1, 3, 16, 31, 64, 65, 127, 128, 131, 300])
def test_each_bit_counts(size):
    """On each backend, whose blocks and last pieces differ."""
    import gatewise as gw

    before = gw.backend()
    rng = np.random.default_rng(size)
    for name in gw.backends():
        gw.use_backend(name)
        numbers = torch.from_numpy(rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32))
        others = torch.zeros(3)
        known, bits = known_weights(numbers, others), numbers.numpy().view(np.uint32)
        assert known.is_cacheable
        assert known.hold((numbers, others))
        for i in range(size):
            for bit in (0, 9, 23, 31):
                bits[i] ^= np.uint32(1 << bit)
                assert not known.hold((numbers, others))
                bits[i] ^= np.uint32(1 << bit)
        for i, j in itertools.combinations(range(min(size, 131)), 2):
            bits[[i, j]] = bits[[j, i]]
            assert known.hold((numbers, others)) == (bits[i] == bits[j])
            bits[[i, j]] = bits[[j, i]]
            bits[[i, j]] ^= np.uint32(1 << 31)
            assert not known.hold((numbers, others))
            bits[[i, j]] ^= np.uint32(1 << 31)
        assert known.hold((numbers, others))
        assert known.hold((numbers.clone(), others.clone()))
        assert not known.hold((numbers, others.view(1, 3)))
        assert not known.hold((numbers.double(), others))
        assert not known.hold((numbers,))
    gw.use_backend(before)


@pytest.mark.parametrize("layout", [lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w], 1)[:, : w.size(1)]])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_weights_of_any_layout_are_cached_and_seen(kind, layout):
    theirs, ours = twins(kind, 6, 9)
    x, state = torch.randn(*(1,) * (kind == "LSTM"), 4, 6, dtype=torch.float64), None
    name = "weight_hh_l0" if kind == "LSTM" else "weight_hh"
    setattr(ours, name, NN.Parameter(layout(getattr(ours, name).detach())))
    assert not getattr(ours, name).is_contiguous()
    with torch.no_grad():
        ours(x, state)
        before = gt._caches[id(ours)].weights
        ours(x, state)
        assert gt._caches[id(ours)].weights is before
        getattr(ours, name).data[3, 2] += 1
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([members(ours(x, state))[0]], [members(theirs(x, state))[0]])


def test_weights_written_while_they_are_packed_are_not_kept(monkeypatch):
    """Part of them may be packed as they were before."""
    theirs, ours = twins("LSTM", 5, 9)
    x, real = torch.randn(2, 1, 5, dtype=torch.float64), gt._pack

    def pack(*arguments):
        packed = real(*arguments)
        ours.weight_ih_l0.data[0, 0] += 1
        return packed

    monkeypatch.setattr(gt, "_pack", pack)
    with torch.no_grad():
        ours(x)
        assert id(ours) not in gt._caches
        monkeypatch.setattr(gt, "_pack", real)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


@pytest.mark.parametrize("change", [lambda ours: setattr(ours, "nonlinearity", "relu"), gt.thaw], ids=["relu", "thaw"])
def test_weights_forgotten_while_they_are_packed_are_not_kept(change, monkeypatch):
    """By another thread: what is packed is no more what the module would pack."""
    theirs, ours = twins("RNNCell", 5, 9)
    x, real = torch.randn(2, 5, dtype=torch.float64), gt._pack
    gt.freeze(ours)

    def pack(*arguments):
        thread = threading.Thread(target=change, args=(ours,))
        thread.start()
        thread.join()
        return real(*arguments)

    monkeypatch.setattr(gt, "_pack", pack)
    with torch.no_grad():
        ours(x)
        assert id(ours) not in gt._caches
    assert not gt._packing
    monkeypatch.setattr(gt, "_pack", real)
    theirs.nonlinearity = ours.nonlinearity
    gt.thaw(ours)
    with torch.no_grad():
        for _ in range(2):
            assert_equal_results([ours(x)], [theirs(x)])
            one_number(ours)
            theirs.load_state_dict(ours.state_dict())


def test_an_attribute_is_set_between_two_looks(monkeypatch):
    """A call that comes while it is being set must leave nothing behind that is older."""
    theirs, ours = twins("RNNCell", 5, 9)
    x, real = torch.randn(2, 5, dtype=torch.float64), NN.Module.__setattr__

    def setting(self, name, value):
        with torch.no_grad():
            ours(x)
        real(self, name, value)

    with torch.no_grad():
        monkeypatch.setattr(NN.Module, "__setattr__", setting)
        ours.nonlinearity = "relu"
        monkeypatch.undo()
        theirs.nonlinearity = "relu"
        assert_equal_results([ours(x)], [theirs(x)])


def test_a_thread_writes_to_weights_of_a_megabyte():
    """Which are looked at without the GIL: the memory that a parameter gives up must live on until the look ends."""
    theirs, ours = twins("LSTM", 64, 160)
    ours.eval()
    x, end = torch.randn(2, 1, 64, dtype=torch.float64), threading.Event()

    def write():
        rng = np.random.default_rng(1)
        while not end.is_set():
            ours.weight_hh_l0.data[rng.integers(640), rng.integers(160)] += 0.01
            ours.weight_ih_l0.data = ours.weight_ih_l0.data * 0.999

    writer = threading.Thread(target=write)
    writer.start()
    with torch.no_grad():
        for _ in range(200):
            assert ours(x)[0].isfinite().all()
        end.set()
        writer.join()
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_the_core_refuses_weights_that_are_none():
    weights = (torch.zeros(3),)
    for arguments in (
        (None, ("any",), weights, lambda given: None, False),
        (gt._tensors, ("any",), weights, lambda given: None, False),
        (gt._tensors, ("any",), weights, lambda given: 3, False),
        (gt._tensors, ("any",), weights, None, False),
        (gt._tensors, None, weights, lambda given: None, False),
        (gt._tensors, ("any",), (3,), lambda given: None, False),
        (gt._tensors, ("any",), (torch.zeros(3, dtype=torch.int64),), lambda given: None, False),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
            gt._core.TensorWeights(*arguments)
    known = known_weights(*weights)
    assert not known.hold((3,))
    assert not known.hold((None,))
    for arguments in ((None, None, None), ({}, None, None), ({}, 3, 3)):
        assert known.step(*arguments) is None
        assert known.walk(*arguments, True) is None
    for method, count in ((known.step, 3), (known.walk, 4)):
        with pytest.raises(TypeError, match=f"expected {count} arguments, got 2"):
            method({}, None)
    for kind in (gt._core.TensorWeights, gt._core.TensorLibrary):
        with pytest.raises(TypeError):
            type("Own", (kind,), {})


# -----------------------------------------------------------------------------------------------------------
# Frozen modules


def frozen_twins(kind, *sizes):
    theirs, ours = twins(kind, *sizes)
    assert gt.freeze(ours.eval()) is ours
    return theirs, ours


COUNTED = [by_optimizer, in_place, by_state_dict, by_another_parameter, by_data]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("change", COUNTED, ids=lambda change: change.__name__)
def test_frozen_modules_see_what_is_counted(kind, change):
    changed(kind, lambda ours: change(ours), 1, prepare=gt.freeze)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
@pytest.mark.parametrize(
    "after", [gt.thaw, gt.repack, gt.restore, lambda ours: ours.eval(), lambda ours: ours.double(), in_place]
)
def test_frozen_modules_see_the_rest_later(kind, after):
    """An uncounted write goes unseen, and is seen after thaw, repack and whatever else makes a module look again."""
    theirs, ours = frozen_twins(kind, 5, 9)
    x = torch.randn(*(1,) * (kind == "LSTM"), 1, 5, dtype=torch.float64)
    with torch.no_grad():
        before = members(ours(x))[0]
        one_number(ours)
        assert torch.equal(members(ours(x))[0], before)
        after(ours)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([members(ours(x))[0]], [members(theirs(x))[0]])
        one_number(ours)
        theirs.load_state_dict(ours.state_dict())
        equal = torch.allclose(members(ours(x))[0], members(theirs(x))[0], rtol=0, atol=1e-12)
    assert equal == (after in (gt.thaw, gt.restore))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_frozen_modules_are_not_frozen(how):
    _, ours = frozen_twins("GRUCell", 5, 9)
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        other = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
        assert vars(other).keys() == vars(NN.GRUCell(5, 9)).keys()
        before = other(x)
        one_number(other)
        assert not torch.equal(other(x), before)
        before = ours(x)
        one_number(ours)
        assert torch.equal(ours(x), before)


def test_gradients_of_frozen_modules_are_those_of_the_present_weights():
    theirs, ours = frozen_twins("GRU", 5, 9)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
    one_number(ours)
    theirs.load_state_dict(ours.state_dict())
    assert_equal_results(run(ours, x), run(theirs, x))
    with torch.no_grad():  # and the packed weights are forgotten by then
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_frozen_weights_made_of_others_are_looked_at():
    """Their tensors are others at each call."""
    _, ours = frozen_twins("LSTM", 5, 9)
    NN.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        before = ours(x)[0]
        packed = gt._caches[id(ours)].weights
        assert torch.equal(ours(x)[0], before)
        assert gt._caches[id(ours)].weights is packed
        ours.parametrizations.weight_hh_l0.original0.data[2] *= 2
        assert not torch.equal(ours(x)[0], before)


@pytest.mark.parametrize("hidden", [32, 128])
def test_frozen_weights_with_gaps_are_looked_at(hidden):
    """What is known of them is a copy, to whose address another weight may come."""
    for attempt in range(60):
        torch.manual_seed(attempt)
        theirs, ours = torch.nn.GRU(hidden, hidden, bias=False), gt.GRU(hidden, hidden, bias=False)
        ours.load_state_dict(theirs.state_dict())
        ours.weight_ih_l0 = torch.nn.Parameter(torch.randn(3 * hidden, 2 * hidden)[:, :hidden])
        gt.freeze(ours)
        x = torch.randn(5, 2, hidden)
        with torch.no_grad():
            ours(x)
            for weight in [torch.randn(3 * hidden, hidden) / 10 for _ in range(4)]:
                ours.weight_ih_l0.data = weight
                theirs.weight_ih_l0.data = weight.clone()
                assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-4)


def test_what_can_be_frozen():
    model = gt.accelerate(mixed()).eval()
    assert gt.freeze(model) is model
    assert gt.thaw(model) is model
    assert gt.thaw(NN.Linear(2, 3)) is not None
    for model in (NN.Linear(2, 3), NN.Sequential(), mixed()):
        with pytest.raises(ValueError, match=r"^model: expected modules of gatewise.torch inside, got \w+ without any"):
            gt.freeze(model)


def test_frozen_modules_go_with_their_module():
    _, ours = frozen_twins("GRUCell", 5, 9)
    gc.collect()
    count = len(gt._frozen_modules)
    del ours
    gc.collect()
    assert len(gt._frozen_modules) == count - 1


def gradients(module):
    """A call with them, after which nothing is changed."""
    x = torch.ones(2, 5, dtype=weight_of(module).dtype, requires_grad=True)
    members(module(x))[0].sum().backward()


def restored_and_accelerated(module):
    gt.accelerate(gt.restore(module))


OTHERS = [
    gradients, gt.freeze, gt.thaw, gt.repack, restored_and_accelerated, copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)), lambda module: module.float(), lambda module: module.double(),
    lambda module: module.train(), lambda module: module.eval(), lambda module: module.requires_grad_(False),
    lambda module: module.requires_grad_(True),
]  # fmt: skip


@settings(max_examples=200)
@given(
    kind=st.sampled_from([*LAYERS, *CELLS]),
    changes=st.lists(st.sampled_from([*SEEN, *PARTIAL, *OTHERS]), min_size=2, max_size=12),
    inference=st.booleans(),
)
def test_sequences_of_changes(kind, changes, inference):
    """Whatever is done to a module, it computes with the weights that it has, as torch.nn's module with the same."""
    theirs, ours = twins(kind, 5, 9)
    for change in [lambda module: None, *changes]:
        if change is by_optimizer:
            ours.requires_grad_(True)
        result = change(ours)
        ours = result if isinstance(result, NN.Module) else ours
        if ours in gt._frozen_modules and change not in COUNTED:
            gt.repack(ours)
        dtype = weight_of(ours).dtype
        theirs.to(dtype).load_state_dict(ours.state_dict())
        x = torch.randn(*(2,) * (kind in LAYERS), 3, 5, dtype=dtype)
        state = step_state(ours, 3, dtype=dtype) if kind in CELLS else None
        with torch.inference_mode(inference), torch.no_grad():
            for _ in range(2):
                actual, wanted = members(ours(x, state))[0], members(theirs(x, state))[0]
                assert torch.allclose(actual, wanted, rtol=0, atol=1e-10 if dtype is torch.float64 else 3e-3)
        assert gt.accelerated(ours) == [""]


# -----------------------------------------------------------------------------------------------------------
# Memory that comes again, or is shared


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_weights_that_are_made_anew_are_never_taken_for_old_ones(kind):
    """Freed memory comes back at the same address with the same version."""
    _, ours = twins(kind, 8, 8)
    ours.eval()
    x = torch.randn(*(1,) * (kind == "LSTM"), 1, 8, dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    seen = set()
    with torch.no_grad():
        for i in range(20):
            fresh = {name: torch.full_like(value, 0.01 * i) for name, value in ours.named_parameters()}
            found = torch.func.functional_call(ours, fresh, (x,))
            seen.add(float(members(found)[0].sum()))
            del fresh, found
        assert len(seen) == 20
        NN.utils.parametrizations.weight_norm(ours, names[0])
        seen = set()
        for i in range(20):
            getattr(ours.parametrizations, names[0]).original0.fill_(0.1 * (i + 1))
            seen.add(float(members(ours(x))[0].sum()))
        assert len(seen) == 20


def test_writes_to_shared_memory_are_seen():
    theirs, ours = twins("LSTM", 5, 9)
    ours.eval()
    ours.share_memory()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        through_numpy(ours)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_another_backend_packs_anew():
    import gatewise as gw

    _, ours = twins("LSTM", 5, 9)
    ours.eval()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    before = gw.backend()
    with torch.no_grad():
        for name in gw.backends():
            gw.use_backend(name)
            ours(x)
            assert gt._caches[id(ours)].weights.packed.backend == name
    gw.use_backend(before)


# -----------------------------------------------------------------------------------------------------------
# Whole models


class Mixed(NN.Module):
    """Everything that there is, some of it deep, some of it twice."""

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


def curve(model, steps=8):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = NN.functional.cross_entropy(model(TOKENS), torch.tensor([0, 1, 2, 1]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_accelerate_and_restore():
    plain, model = mixed(), mixed()
    parameters, kinds = list(model.parameters()), [type(module) for module in model.modules()]
    for _ in range(2):
        assert gt.accelerate(model) is model
        assert gt.accelerated(model) == NAMES
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert str(model) == str(plain)
    assert isinstance(model.gru, NN.GRU)
    expected = curve(plain)
    assert curve(model) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    assert gt.restore(model) is model
    assert gt.accelerated(model) == []
    assert [type(module) for module in model.modules()] == kinds
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-3)


def test_optimizers_and_hooks_go_on():
    plain, model = mixed(), mixed()
    seen = []
    for one in (plain, model):
        one.gru.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gt.accelerate(model)
    other = torch.optim.SGD(plain.parameters(), 0.1)
    for one, of_one in ((model, optimizer), (plain, other)):
        one(TOKENS).sum().backward()
        of_one.step()
    assert len(seen) == 2
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies(how):
    model = gt.accelerate(mixed())
    with torch.no_grad():
        expected = model(TOKENS)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model if how == "save" else model.state_dict(), file)
        file.seek(0)
        if how == "save":
            other = torch.load(file, weights_only=False)
        else:
            other = Mixed()  # a plain one
            other.load_state_dict(torch.load(file, weights_only=True))
    if how != "state_dict":
        assert gt.accelerated(other) == NAMES
    with torch.no_grad():
        assert torch.allclose(other(TOKENS), expected, atol=1e-5)
        in_place(model.rnn)
        assert torch.allclose(other(TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old weight_norm", "tied"])
def test_weights_made_of_others(kind):
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        model = NN.Sequential(NN.LSTM(5, 6), NN.Identity())
        if kind == "weight_norm":
            NN.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
        elif kind == "spectral_norm":
            NN.utils.parametrizations.spectral_norm(model[0], "weight_hh_l0")
        elif kind == "old weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                NN.utils.weight_norm(model[0], "weight_hh_l0")
        else:
            model[0].bias_hh_l0 = model[0].bias_ih_l0
        # In training, spectral_norm changes with each look at the weight; torch.nn.LSTM has four a call, by accident.
        models.append(model.train(kind != "spectral_norm"))
    theirs, ours = models
    gt.accelerate(ours)
    assert gt.accelerated(ours) == ["0"]
    x = torch.randn(4, 3, 5)
    for _ in range(3):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(2)
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            optimizer.zero_grad()
            y = model[0](x)[0]
            y.sum().backward()
            optimizer.step()
            results.append([y, *(p.grad for p in model.parameters())])
        assert_equal_results(*results)
        for model in (ours, theirs):
            model.eval()
        with torch.no_grad():
            assert_equal_results([ours[0](x)[0]], [theirs[0](x)[0]])
        for model in (ours, theirs):
            model.train(kind != "spectral_norm")
    gt.restore(ours)
    assert gt.accelerated(ours) == []
    assert type(ours[0]).__mro__[: len(type(theirs[0]).__mro__)][-3:] == type(theirs[0]).__mro__[-3:]


def test_subclasses_with_code_of_their_own_are_left_alone():
    class Own(NN.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    model = gt.accelerate(NN.Sequential(Own(5, 6)))
    assert gt.accelerated(model) == []


def test_bad_models():
    for function in (gt.accelerate, gt.restore, gt.accelerated, gt.repack, gt.freeze, gt.thaw):
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
            function(3)


# -----------------------------------------------------------------------------------------------------------
# Threads and processes


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("grad", [False, True])
def test_another_thread_restores_a_module_during_a_call(kind, grad, monkeypatch):
    """At each place where it may."""
    theirs, ours = twins(kind, 5, 9)
    x = torch.randn(*(2,) * (kind in LAYERS), 3, 5, dtype=torch.float64)
    calls = {"_off_the_road", "_plain", "_needs_gradients", "_packed", "_in_forward_mode", "_weight_shapes"}
    for name in sorted(calls):
        gt.accelerate(ours)
        real = getattr(gt, name)

        def restoring(*arguments, real=real):
            gt.restore(ours)
            return real(*arguments)

        with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
            patch.setattr(gt, name, restoring)
            assert_equal_results([members(ours(x))[0]], [members(theirs(x))[0]])
    gt.accelerate(ours)
    if kind in LAYERS:
        monkeypatch.setattr(gt, "_off_the_road", lambda: gt.restore(ours) and None)
        with pytest.raises(NotImplementedError, match="expected no restore during the call"):
            ours(x, lengths=[1, 2, 2])


def test_two_threads_use_one_module():
    _, ours = twins("LSTM", 16, 33)
    ours.eval()
    x = torch.randn(50, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(x)[0]
    wrong = []

    def work():
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(ours(x)[0], expected):
                    wrong.append(1)
            leaf = x.clone().requires_grad_()
            ours(leaf)[0].sum().backward(inputs=[leaf])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Rows(torch.utils.data.Dataset):
    """Each item is made by a layer that has worked in the parent."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((200, 64, 16), float(index)))[0][-1, 0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")  # JAX, where other tests have used it
def test_data_loaders(context):
    """No hang, after a forward on several threads in the parent."""
    torch.manual_seed(1)
    layer = gt.LSTM(16, 64).eval()
    data = Rows(layer)
    expected = torch.stack([data[index] for index in range(6)])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert torch.allclose(torch.cat(list(loader)), expected, atol=1e-6)  # spawned, they pick their own backend


def test_torchs_number_of_threads_is_kept_to(monkeypatch):
    """A DataLoader's worker, for example, sets it to one."""
    asked = []

    real = gt._core.Foreign

    def foreign(*arguments):
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(gt._core, "Foreign", foreign)
    _, ours = twins("LSTM", 5, 9)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours(torch.zeros(3, 2, 5, dtype=torch.float64))
    assert asked == [1, 2]


RACE = """
import sys, threading, time, torch, gatewise.torch as gt
sys.setswitchinterval(1e-6)
layer, cell, x = gt.LSTM(8, 8).eval(), gt.GRUCell(8, 8).eval(), torch.randn(1, 1, 8)
end = time.monotonic() + 2

def change():
    while time.monotonic() < end:
        for module, name in ((layer, "weight_ih_l0"), (cell, "weight_ih")):
            setattr(module, name, torch.nn.Parameter(torch.randn_like(getattr(module, name))))

def use():
    state = h = None
    with torch.no_grad():
        while time.monotonic() < end:
            _, state = layer(x, state)
            h = cell(x[0], h)

threads = [threading.Thread(target=one) for one in (change, use, use)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_parameters_are_replaced_during_a_call():
    """They may be gone while they are looked at, where nobody holds them."""
    subprocess.run([sys.executable, "-c", RACE], check=True, timeout=120)


THREADS = """
import os, sys, torch, gatewise, gatewise.torch as gt
torch.set_num_threads(1)
gatewise.set_num_threads(2)
module, x = gt.LSTM(128, 128).eval(), torch.zeros(50, 32, 128)
with torch.no_grad():
    module(x[:1, :1])  # packs
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(int(sys.argv[1]))
    module(x)
    assert gt._caches[id(module)]
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
@pytest.mark.skipif(not gt._core.configuration()["openmp"], reason="built without OpenMP")
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_calls_keep_to_torchs_number_of_threads(threads):
    done = subprocess.run([sys.executable, "-c", THREADS, str(threads)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads - 1


def test_the_import_is_lazy():
    import subprocess
    import sys

    code = "import sys, gatewise; assert 'torch' not in sys.modules; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"


def test_numpy_and_torch_agree():
    """The same weights in gatewise's own layer: the same bits."""
    import gatewise as gw

    _, ours = twins("LSTM", 5, 9, 2, bidirectional=True)
    layer = gw.LSTM(5, 9, 2, bidirectional=True, dtype="float64")
    layer.load_state_dict({name: value.numpy() for name, value in ours.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((7, 3, 5))
    np.testing.assert_array_equal(ours(torch.from_numpy(x))[0].detach().numpy(), layer(x)[0])


# -----------------------------------------------------------------------------------------------------------
# The operator: torch.compile and torch.export


def operator_arguments(module, x, state=(), *, record=True, every=0, lengths=None, resets=None):
    weights = [getattr(module, name) for name in module._flat_weights_names]
    h, c = (*state, None, None)[:2]
    sizes = [module.input_size, module.hidden_size, module.num_layers, module.proj_size, every]
    flags = [module.bias, module.bidirectional, module.batch_first]
    return x, h, c, weights, gt.CELLS[module.mode], sizes, flags, lengths, resets, 0.0, None, record


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("more", [{}, {"every": 3}, {"lengths": torch.tensor([2, 7, 0])}], ids=str)
def test_opcheck(kind, options, more):
    _, ours = twins(kind, 5, 9, **options)
    x = torch.randn((3, 7, 5) if ours.batch_first else (7, 3, 5), dtype=torch.float64, requires_grad=True)
    arguments = operator_arguments(ours, x, members(state_for(ours, 3)), **more)
    library.opcheck(torch.ops.gatewise.recurrent.default, arguments)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("every", [0, 3])
def test_tapes_have_the_size_that_is_foretold(kind, dtype, every):
    _, ours = twins(kind, 5, 33, 3, bidirectional=True, dtype=dtype)
    node = gt._Node(*operator_arguments(ours, None, every=every)[4:-1])
    for steps, batch in ((1, 1), (7, 3), (10, 130)):
        x = torch.zeros(steps, batch, 5, dtype=dtype)
        packed = node.pack([getattr(ours, name) for name in ours._flat_weights_names], dtype)
        assert node.tape_bytes(x) == node.call(x).foreign(packed).tape_bytes


@pytest.mark.parametrize("kind", LAYERS)
def test_the_operator_refuses(kind):
    _, ours = twins(kind, 5, 9)
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    good = operator_arguments(ours, x, members(state_for(ours, 3, requires_grad=False)))
    bad = [
        (0, x[..., :4]), (0, x[0]), (0, x.float()), (0, x.int()), (1, good[1][:, :1]), (1, good[1].float()),
        (3, good[3][1:]), (3, [good[3][0].float(), *good[3][1:]]),
        (3, [good[3][0][1:], *good[3][1:]]), (2, torch.zeros(1, 3, 8)),
    ]  # fmt: skip
    for place, value in bad:
        with pytest.raises(ValueError, match=r"^gatewise::recurrent: "):
            torch.ops.gatewise.recurrent(*good[:place], value, *good[place + 1 :])


def test_the_operator_needs_its_tape():
    import gatewise as gw

    _, ours = twins("GRU", 5, 9)
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.ops.gatewise.recurrent(*operator_arguments(ours, x, record=False))[0]
    with pytest.raises(RuntimeError, match="without a tape"):
        y.sum().backward()
    y = torch.ops.gatewise.recurrent(*operator_arguments(ours, x))[0]
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|does not require grad"):
        grad.sum().backward()
    if len(gw.backends()) > 1:
        y = torch.ops.gatewise.recurrent(*operator_arguments(ours, x))[0]
        before = gw.backend()
        gw.use_backend(next(name for name in gw.backends() if name != before))
        with pytest.raises(RuntimeError, match="another backend"):
            y.sum().backward()
        gw.use_backend(before)


class Classifier(NN.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent = getattr(NN, kind)(5, 9, **options)
        self.head = NN.Linear(9 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x, state=None):
        return self.head(self.recurrent(x, state)[0])


@pytest.fixture
def dynamo():
    import torch._dynamo

    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_compile(dynamo, kind, options):
    """One graph, the same numbers and gradients, for several lengths."""
    torch.manual_seed(1)
    model = gt.accelerate(Classifier(kind, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((7, 3, 5), (9, 4, 5), (6, 5)):
        x = torch.randn(shape)
        results = []
        for one in (compiled, model):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            y.sin().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
        assert_equal_results(*results)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_compile_refuses(dynamo):
    """What the eager road refuses is refused by the same words, and nothing is ignored."""
    model = gt.GRU(5, 9)
    compiled = torch.compile(model, fullgraph=False, backend="aot_eager")
    for x, hx in (
        (torch.zeros(4, 3, 2), None), (torch.zeros(4, 3, 5), torch.zeros(1, 1, 9)),
        (torch.zeros(4, 3, 5), torch.zeros(1, 3, 9, dtype=torch.float64)), (torch.zeros(0, 3, 5), None),
    ):  # fmt: skip
        with pytest.raises(Exception) as expected:
            model(x, hx)
        with pytest.raises(type(expected.value)):
            compiled(x, hx)
    half = gt.GRU(5, 9).bfloat16()
    with pytest.raises(NotImplementedError, match="lengths, resets, checkpoint_every"):
        torch.compile(half, backend="aot_eager")(
            torch.zeros(4, 3, 5, dtype=torch.bfloat16), lengths=torch.tensor([1, 2, 3])
        )


@pytest.mark.filterwarnings("ignore")
def test_compile_without_a_full_graph():
    """PyTorch breaks its graph at any LSTM unless told otherwise: right all the same."""
    import torch._dynamo

    torch._dynamo.reset()
    model = gt.accelerate(Classifier("LSTM"))
    x = torch.randn(7, 3, 5)
    assert torch.allclose(torch.compile(model, backend="eager")(x), model(x), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_export(kind):
    torch.manual_seed(1)
    model = gt.accelerate(Classifier(kind, num_layers=2)).eval()
    x = torch.randn(7, 3, 5)
    steps = torch.export.Dim("steps", min=2, max=100)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: steps}})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("gatewise.recurrent.default") == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for length in (7, 12):
        x = torch.randn(length, 3, 5)
        assert torch.allclose(again(x), model(x), atol=1e-6)


# -----------------------------------------------------------------------------------------------------------
# The examples


def run_example(*command):
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(__file__).parent.parent / "examples"
    found = subprocess.run(
        [sys.executable, *command[:-1], folder / command[-1][0], *command[-1][1:]],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def onnx_outputs(model, arguments, path, **options):
    """What ONNX Runtime gives for a model that PyTorch exports by its default way."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, arguments, path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {one.name: x.numpy() for one, x in zip(session.get_inputs(), arguments, strict=True)})


@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {}), ("GRU", {"num_layers": 2, "bidirectional": True}), ("RNN", {}), ("GRUCell", {})],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx(kind, options, tmp_path):
    """A module on gatewise is exported as torch.nn's own, with ONNX's operators."""
    _, ours = twins(kind, 5, 6, dtype=torch.float32, **options)
    x = torch.randn(*(4,) * (kind in LAYERS), 3, 5)
    outputs = onnx_outputs(ours.eval(), (x,), tmp_path / "model.onnx")
    assert np.allclose(outputs[0], members(ours(x))[0].detach().numpy(), atol=1e-5)
    assert gt.accelerated(ours) == [""]


@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx_refuses(tmp_path):
    """With words that say what to do, at the top of what PyTorch raises."""
    _, ours = twins("LSTM", 5, 6, dtype=torch.float32)
    x = torch.randn(4, 3, 5)
    program = torch.export.export(ours.eval(), (x,))
    with pytest.raises(Exception, match=r"gatewise.torch.restore\(model\) before torch.export.export"):
        onnx_outputs(program, (x,), tmp_path / "model.onnx")
    assert torch.allclose(program.module()(x)[0], ours(x)[0])


def test_the_example_of_a_tagger():
    out = run_example(["torch_tagger.py", "--hidden", "16", "--steps", "10"])
    assert float(out.split()[-1]) < 1e-4


def test_distributed_training():
    """Two processes come to the losses of one with the joined batch."""
    out = run_example("-m", "torch.distributed.run", "--nproc-per-node=2", ["torch_distributed.py"])
    assert out.startswith("2 processes: loss")
    assert float(out.split()[-1]) < 1e-5
