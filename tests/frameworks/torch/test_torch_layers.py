"""Layers and cells against torch.nn's: outputs, states and gradients; and the options that torch.nn lacks."""

import numpy as np
import pytest
from torch_modules import (
    CELLS,
    LAYERS,
    MARKS,
    NN,
    assert_equal_results,
    eligibility,
    members,
    run,
    state_for,
    torch,
    twins,
)

pytestmark = MARKS


def options_grid():
    for kind in LAYERS:
        for dtype in (torch.float32, torch.float64):
            for options in (
                {},
                {"bias": False},
                {"batch_first": True},
                {"bidirectional": True},
                {"num_layers": 3},
                {"num_layers": 2, "bidirectional": True, "batch_first": True},
                *([{"nonlinearity": "relu"}] if kind == "RNN" else []),
                *([{"proj_size": 3}, {"proj_size": 3, "num_layers": 2, "bidirectional": True}] * (kind == "LSTM")),
            ):
                yield kind, dtype, options


GRID = pytest.mark.parametrize(("kind", "dtype", "options"), list(options_grid()), ids=str)


@GRID
@pytest.mark.parametrize("has_state", [False, True], ids=["zero", "state"])
def test_layers(kind, dtype, options, has_state):
    """Compare outputs, states and all gradients, with a batch and without, in training and not."""
    theirs, ours = twins(kind, 5, 9, dtype=dtype, **options)
    assert repr(theirs) == repr(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for shape in ((7, 3, 5), (1, 1, 5), (6, 5)):
        x = torch.randn(shape, dtype=dtype)
        batch = () if len(shape) == 2 else (shape[0] if theirs.batch_first else shape[1],)
        state = state_for(theirs, *batch) if has_state else None
        expected = run(theirs, x, state)
        assert_equal_results(run(ours, x, state), expected)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for _ in range(2):  # the second time with packed weights
                    output, after = ours(x, state)
                    count = 1 + len(members(after))
                    assert_equal_results([output, *members(after)], [part.detach() for part in expected[:count]])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (70, 5)], ids=str)
@pytest.mark.parametrize("has_state", [False, True], ids=["zero", "state"])
def test_cells(kind, dtype, bias, shape, has_state):
    theirs, ours = twins(kind, 5, 9, dtype=dtype, bias=bias)
    x = torch.randn(shape, dtype=dtype)
    state = tuple(torch.randn(*shape[:-1], 9, dtype=dtype) for _ in range(2 if kind == "LSTMCell" else 1))
    state = None if not has_state else state if len(state) > 1 else state[0]

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
@pytest.mark.parametrize("has_state", [False, True], ids=["zero", "state"])
def test_packed_sequences(kind, enforce_sorted, has_state):
    theirs, ours = twins(kind, 5, 9, 2, bidirectional=True)
    lengths = [7, 4, 4, 1] if enforce_sorted else [4, 1, 7, 4]
    x = torch.randn(7, 4, 5, dtype=torch.float64)
    state = state_for(theirs, 4) if has_state else None

    def results(module):
        leaf = x.clone().requires_grad_()
        packed = NN.utils.rnn.pack_padded_sequence(leaf, lengths, enforce_sorted=enforce_sorted)
        results = run(module, packed, state)
        output, _ = module(packed, state)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            actual, expected = getattr(output, name), getattr(packed, name)
            assert (actual is None and expected is None) or torch.equal(actual, expected)
        return [*results, leaf.grad]

    assert_equal_results(results(ours), results(theirs))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"checkpoint_every": 3}], ids=str)
def test_packed_rows_have_the_bits_of_padded_ones(kind, dtype, options, use_threads):
    """Rows of a PackedSequence are run where they lie, padded rows with gaps: the results are the same."""
    call_options = {name: options[name] for name in options if name == "checkpoint_every"}
    dropout = options.get("dropout", 0.0)
    projection = {"proj_size": 20} if kind == "LSTM" else {}
    _, module = twins(kind, 5, 33, 3, bidirectional=True, dropout=dropout, dtype=dtype, **projection)
    lengths = [9, 9, 5, 5, 4, 1] if dropout else [4, 9, 1, 5, 9, 5]  # a row's dropout mask depends on its index
    x, state = torch.randn(9, 6, 5, dtype=dtype), state_for(module, 6)

    def packed_results():
        sequence = NN.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        torch.manual_seed(4)
        data, *others = run(module, sequence, state, **call_options)
        return [NN.utils.rnn.pad_packed_sequence(sequence._replace(data=data.detach()))[0], *others]

    def padded_results():
        """The gradients of the output are those that `run` makes for the rows of a packed one."""
        torch.manual_seed(9)
        packed = NN.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        size = len(packed.data), module(packed)[0].data.shape[1]
        torch.manual_seed(9)
        grad = NN.utils.rnn.pad_packed_sequence(packed._replace(data=torch.randn(size, dtype=dtype)))[0]
        leaf, before = x.clone().requires_grad_(), [part.detach().clone().requires_grad_() for part in members(state)]
        torch.manual_seed(4)
        y, after = module(leaf, before[0] if len(before) == 1 else tuple(before), lengths=lengths, **call_options)
        module.zero_grad()
        torch.manual_seed(9)
        torch.randn(size, dtype=dtype)
        loss = (y * grad).sum() + sum((part * torch.randn(part.shape, dtype=dtype)).sum() for part in members(after))
        loss.backward()
        return [y, *members(after), *(leaf.grad for leaf in (*before, *module.parameters()))]

    expected = padded_results()
    for threads in (1, 2):
        use_threads(threads)
        torch.set_num_threads(threads)
        actual = packed_results()
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))


def test_invalid_packed_sequences():
    """batch_sizes that grow, end in zero or do not add up go to PyTorch, and nothing reads beyond the rows."""
    _, ours = twins("LSTM", 5, 9)
    data = torch.randn(5, 5, dtype=torch.float64)
    for batch_sizes in (
        torch.tensor([3.0, 2.0]),
        torch.tensor([3, 2], dtype=torch.int32),
        torch.tensor([[3, 2]]),
        torch.tensor(5),
        torch.tensor([2**62] * 4),
    ):
        assert eligibility.layer_obstacle(ours, NN.utils.rnn.PackedSequence(data, batch_sizes), None)
    few_indices = NN.utils.rnn.PackedSequence(data, torch.tensor([3, 2]), torch.tensor([0]), torch.arange(3))
    assert eligibility.layer_obstacle(ours, few_indices, None) == eligibility.INVALID_FOR_TORCH
    for counts in ([2, 3], [3, 0], [3, 3], [2, 1], []):
        sequence = NN.utils.rnn.PackedSequence(data, torch.tensor(counts))
        assert eligibility.layer_obstacle(ours, sequence, None) == eligibility.INVALID_FOR_TORCH


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_resets(kind):
    """The options mean what they mean in gatewise's own layers. Gradients are compared with central differences."""
    _, ours = twins(kind, 3, 4, bidirectional=True, batch_first=True)
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 0])
    y, _ = ours(x, lengths=lengths)
    for row, length in enumerate(lengths):
        if length:
            expected, _ = ours(x[row : row + 1, :length])
            assert torch.equal(y[row, :length], expected[0])
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


def test_a_default_device_changes_nothing():
    _, ours = twins("LSTM", 3, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    expected = ours(x, lengths=[1, 3])[0]
    with torch.device("cpu"):
        assert torch.equal(ours(x, lengths=[1, 3])[0], expected)


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


def test_numpy_and_torch_agree():
    """gatewise's own layer with the same weights gives the same bits."""
    import gatewise as gw

    _, ours = twins("LSTM", 5, 9, 2, bidirectional=True)
    layer = gw.LSTM(5, 9, 2, bidirectional=True, dtype="float64")
    layer.load_state_dict({name: value.numpy() for name, value in ours.state_dict().items()})
    x = np.random.default_rng(0).standard_normal((7, 3, 5))
    np.testing.assert_array_equal(ours(torch.from_numpy(x))[0].detach().numpy(), layer(x)[0])
