"""gatewise.torch in PyTorch's graph: saved tensors, changes in place, gradients of all kinds, second derivatives."""

import numpy as np
import pytest
from torch_modules import CELLS, LAYERS, MARKS, NN, assert_equal_results, flat, gt, members, run, torch, twins

pytestmark = MARKS


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_gradcheck(kind):
    _, ours = twins(kind, 3, 4)
    shape = (2, 3) if kind in CELLS else (3, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*ours.named_parameters(), strict=True)

    def call(x, *weights):
        return flat(torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x,)))[0]

    torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("kind", LAYERS)
def test_layouts(kind):
    """Inputs and gradients may be strided, expanded, transposed or sliced."""
    theirs, ours = twins(kind, 5, 9)
    wide = torch.randn(6, 3, 10, dtype=torch.float64)
    for x in (
        wide[..., ::2],
        wide[..., 5:],
        wide[::2, :, :5],
        wide[:, :1, :5].expand(6, 3, 5),
        torch.randn(5, 3, 6, dtype=torch.float64).permute(2, 1, 0),
    ):
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
    y, _ = ours(x)  # x itself needs no gradient
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
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(1.5),
    "clamp_": lambda y: y.clamp_(-0.1, 0.1),
    "y[-1].mul_": lambda y: y[-1].mul_(2),
    "y[0, 1] = 0": lambda y: y.__setitem__((0, 1), 0),
    "through data": lambda y: y.data.mul_(2),
    "through NumPy": lambda y: y.detach().numpy().fill(7),
    "ReLU(inplace=True)": NN.ReLU(inplace=True),
    "twice": lambda y: y.mul_(2).add_(1),
}


@pytest.mark.parametrize("operation", IN_PLACE)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRU", {}),
        ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        ("RNN", {}),
        ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
    ],
    ids=str,
)
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
def test_outputs_of_all_kinds_of_calls_may_be_changed_in_place(kind, how):
    """The gradients are those of a change of a copy."""
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
    """After a change in place backward raises an error, as it does for torch.nn's in float32."""
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
    """Train with a penalty on the size of the gradient, whose gradient comes from PyTorch's own code."""
    theirs, ours = twins(kind, 3, 4)
    shape = (2, 3) if kind in CELLS else (5, 2, 3)

    def results(module):
        x = torch.linspace(-1, 1, int(np.prod(shape)), dtype=torch.float64).reshape(shape).requires_grad_()
        module.zero_grad()
        y = members(module(x))[0]
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        (y.sum() + (grad**2).sum()).backward()
        return [grad, x.grad, *(p.grad for p in module.parameters())]

    actual = results(ours)
    onednn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    expected = results(theirs)
    torch.backends.mkldnn.set_flags(_enabled=onednn)
    assert_equal_results(actual, expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", ["stacked", "fed back", "both states", "x from h", "bidirectional"])
def test_second_derivatives_of_connected_calls(kind, how):
    """Where one input was computed from another, autograd must not follow the path twice."""
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
    actual, expected = (
        torch.autograd.functional.jacobian(lambda x, module=module: module(x)[0], x, vectorize=True)
        for module in (ours, theirs)
    )
    assert_equal_results([actual], [expected])
    for module in (ours, theirs):
        module.zero_grad()
        y, _ = module(x)
        y.backward(torch._neg_view(torch.ones_like(y)))
    assert_equal_results([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_tapes_are_saved_tensors():
    """Activation checkpointing drops tapes, and hooks see them."""
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


def test_missing_second_derivatives():
    _, ours = twins("LSTM", 3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    for output in (ours(x)[0], ours.eval()(x, lengths=[5, 2])[0], ours(x, resets=torch.eye(5, 2))[0]):
        with pytest.raises(RuntimeError, match=r"create_graph.* expected a call without dropout, lengths, resets"):
            torch.autograd.grad(output.sum(), x, create_graph=True)
