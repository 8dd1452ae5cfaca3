"""The reference against mathematics (finite differences, a worked example), PyTorch and its own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gatewise import reference
from tolerances import assert_close

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
T, B, I, H, P = 4, 3, 3, 4, 2  # noqa: E741 - the sizes of the reference, unless a test has its own
STEP = 1e-5  # of the central differences


def make_parameters(random, cell, layers, directions, bias, hidden, projection):
    sums, projected = reference.CELLS[cell].gates * hidden, projection or hidden
    shapes = {}
    for layer, suffix in itertools.product(range(layers), ("", "_reverse")[:directions]):
        inputs = directions * projected if layer else I
        shapes[f"weight_ih_l{layer}{suffix}"] = (sums, inputs)
        shapes[f"weight_hh_l{layer}{suffix}"] = (sums, projected)
        if bias:
            shapes[f"bias_ih_l{layer}{suffix}"] = shapes[f"bias_hh_l{layer}{suffix}"] = (sums,)
        if projection:
            shapes[f"weight_hr_l{layer}{suffix}"] = (projection, hidden)
    return {name: random.uniform(-0.8, 0.8, shape) for name, shape in shapes.items()}


def make_problem(cell, *, layers=1, bidirectional=False, bias=True, projection=0, steps=T, batch=B, hidden=H):
    """x, state, parameters, and gradients of the output and of the state after it, all of order one."""
    random = np.random.default_rng(12345)
    directions, projected = 2 if bidirectional else 1, projection or hidden

    def make_state():
        h, c = (random.standard_normal((layers * directions, batch, n)) for n in (projected, hidden))
        return (h, c) if cell == "lstm" else h

    x = random.standard_normal((steps, batch, I))
    parameters = make_parameters(random, cell, layers, directions, bias, hidden, projection)
    grad_output = random.standard_normal((steps, batch, directions * projected))
    return x, make_state(), parameters, grad_output, make_state()


def members(state):
    return state if isinstance(state, tuple) else (state,)


# ---- finite differences


STACKS = [
    {},
    {"layers": 2},
    {"bidirectional": True, "bias": False},
    {"layers": 2, "bidirectional": True, "dropout": 0.4},
]
DIFFERENCES = [
    *((cell, stack) for cell in CELLS for stack in STACKS),
    ("lstm", {"projection": 1, "bias": False}),
    ("lstm", {"projection": 1, "layers": 2, "bidirectional": True, "dropout": 0.4}),
    *((cell, {"bidirectional": True, "lengths": (3, 1), "resets": ((0, 1), (0, 0), (1, 0))}) for cell in CELLS),
    ("lstm", {"projection": 1, "layers": 2, "lengths": (0, 2), "resets": ((0, 0), (0, 1), (1, 1))}),
]


def central_difference(loss, array):
    """Gradient of loss() in array, which loss reads, element by element."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + STEP
        above = loss()
        array[index] = value - STEP
        below = loss()
        array[index] = value
        gradient[index] = (above - below) / (2 * STEP)
    return gradient


@pytest.mark.parametrize(("cell", "stack"), DIFFERENCES, ids=str)
def test_backward_is_the_derivative_of_forward(cell, stack):
    stack = dict(stack)
    scheduled = {name: stack.pop(name, None) for name in ("lengths", "resets")}
    dropout = stack.pop("dropout", 0.0)
    problem = make_problem(cell, **stack, steps=3, batch=2, hidden=2)
    x, state, parameters, grad_output, grad_state = problem
    options = {
        "num_layers": stack.get("layers", 1),
        "bidirectional": stack.get("bidirectional", False),
        "dropout": dropout,
        "seed": 7,
        "call_count": 3,
        **scheduled,
    }

    def loss():
        output, after, _ = reference.forward(cell, x, state, parameters, **options)
        pairs = zip(members(after), members(grad_state), strict=True)
        return np.sum(output * grad_output) + sum(np.sum(first * other) for first, other in pairs)

    _, _, tape = reference.forward(cell, x, state, parameters, **options)
    grad_x, grad_before, grad_parameters = reference.backward(tape, grad_output, grad_state)
    assert_close(grad_x, central_difference(loss, x), "finite_difference", "x")
    expected = tuple(central_difference(loss, member) for member in members(state))
    assert_close(members(grad_before), expected, "finite_difference", "state")
    expected = {name: central_difference(loss, array) for name, array in parameters.items()}
    assert_close(grad_parameters, expected, "finite_difference", "parameters")


@pytest.mark.parametrize("cell", CELLS)
def test_backward_is_linear_and_none_is_zero(cell):
    x, state, parameters, grad_output, grad_state = make_problem(cell)
    _, _, tape = reference.forward(cell, x, state, parameters)

    def gradients(*arguments):
        grad_x, grad_before, grad_parameters = reference.backward(tape, *arguments)
        return (grad_x, *members(grad_before), *grad_parameters.values())

    parts = zip(gradients(grad_output), gradients(None, grad_state), strict=True)
    both = gradients(grad_output, grad_state)
    assert_close(tuple(first + other for first, other in parts), both, "float64_gradient")


def test_members_of_a_gradient_may_be_none():
    x, state, parameters, _, (grad_h, grad_c) = make_problem("lstm")
    _, _, tape = reference.forward("lstm", x, state, parameters)
    zero = np.zeros_like(grad_h)
    for partial_state, meant in [((grad_h, None), (grad_h, zero)), ((None, grad_c), (zero, grad_c))]:
        assert_close(reference.backward(tape, None, partial_state), reference.backward(tape, None, meant), "float64")


def test_tape_keeps_copies():
    x, state, parameters, grad_output, grad_state = make_problem("lstm", layers=2)
    _, _, tape = reference.forward("lstm", x, state, parameters, num_layers=2)
    before = reference.backward(tape, grad_output, grad_state)
    for array in (x, *state, *parameters.values()):
        array[...] = np.nan
    assert_close(reference.backward(tape, grad_output, grad_state), before, "float64")


# ---- PyTorch


def torch_module(torch, cell, parameters, **options):
    names = {"lstm": "LSTM", "gru": "GRU"}
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    module = getattr(torch.nn, names.get(cell, "RNN"))(**options, dtype=torch.float64)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in parameters.items()})
    return module


def tensors(torch, state):
    return tuple(torch.tensor(member, requires_grad=True) for member in members(state))


def arrays(values):
    return tuple(value.detach().numpy() for value in values)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("cell", "projection"), [*((cell, 0) for cell in CELLS), ("lstm", P)])
def test_equal_to_torch(cell, projection, layers, bidirectional, bias):
    torch = pytest.importorskip("torch")
    problem = make_problem(cell, layers=layers, bidirectional=bidirectional, bias=bias, projection=projection)
    x, state, parameters, grad_output, grad_state = problem
    output, after, tape = reference.forward(cell, x, state, parameters, num_layers=layers, bidirectional=bidirectional)
    grad_x, grad_before, grad_parameters = reference.backward(tape, grad_output, grad_state)

    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    if projection:
        options["proj_size"] = projection
    module = torch_module(torch, cell, parameters, input_size=I, hidden_size=H, **options)
    (x_torch,), state_torch = tensors(torch, x), tensors(torch, state)
    output_torch, after_torch = module(x_torch, state_torch if cell == "lstm" else state_torch[0])
    assert_close(output, output_torch.detach().numpy(), "torch_float64", "output")
    assert_close(members(after), arrays(members(after_torch)), "torch_float64", "state")

    grads = tuple(torch.from_numpy(array) for array in (grad_output, *members(grad_state)))
    torch.autograd.backward((output_torch, *members(after_torch)), grads)
    assert_close(grad_x, x_torch.grad.numpy(), "torch_float64_gradient", "grad_input")
    expected = tuple(tensor.grad.numpy() for tensor in state_torch)
    assert_close(members(grad_before), expected, "torch_float64_gradient", "grad_state")
    expected = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    assert_close(grad_parameters, expected, "torch_float64_gradient", "grad_parameters")


@pytest.mark.parametrize("cell", CELLS)
def test_no_state_is_zero_as_in_torch(cell):
    torch = pytest.importorskip("torch")
    x, state, parameters, _, _ = make_problem(cell)
    output, after, _ = reference.forward(cell, x, None, parameters)
    output_torch, after_torch = torch_module(torch, cell, parameters, input_size=I, hidden_size=H)(torch.from_numpy(x))
    assert_close(output, output_torch.detach().numpy(), "torch_float64")
    assert_close(members(after), arrays(members(after_torch)), "torch_float64")
    if cell == "lstm":
        h, _ = state
        expected = reference.forward(cell, x, (h, np.zeros_like(h)), parameters)[:2]
        assert_close(reference.forward(cell, x, (h, None), parameters)[:2], expected, "float64")


# ---- a worked example


def test_lstm_worked_example():
    """Sums f (1, -1), i (0, 1), candidate (0.5, -0.5), o (1, 1) with c (0.2, 0.8), worked by hand."""
    sums = np.array([[0.0, 1.0], [1.0, -1.0], [0.5, -0.5], [1.0, 1.0]])  # i f g o
    parameters = {
        "weight_ih_l0": np.zeros((8, 1)),
        "weight_hh_l0": np.zeros((8, 2)),
        "bias_ih_l0": sums.ravel(),
        "bias_hh_l0": np.zeros(8),
    }
    state = (np.zeros((1, 1, 2)), np.array([[[0.2, 0.8]]]))
    output, (h, c), _ = reference.forward("lstm", np.zeros((1, 1, 1)), state, parameters)
    assert_close(c, np.array([[[0.377270, -0.122682]]]), "six_digits", "c")
    assert_close(h, np.array([[[0.263426, -0.089240]]]), "six_digits", "h")
    assert np.array_equal(output, h)


# ---- sigmoid


def test_sigmoid_at_both_ends():
    x = np.array([-np.inf, -1000.0, -700.0, -40.0, 0.0, 40.0, 1000.0, np.inf, np.nan])
    with np.errstate(all="raise"):
        y = reference.sigmoid(x)
    assert_close(y[[2, 3]], np.exp(x[[2, 3]]), "activation")  # a form like 1 - 1 / (1 + exp(x)) would give 0
    assert_close(y[[0, 1, 4, 5, 6, 7, 8]], np.array([0, 0, 0.5, 1, 1, 1, np.nan]), "activation")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_in_between(dtype):
    x = np.linspace(-80, 80, 4001, dtype=dtype)
    wide = x.astype(np.longdouble)
    y = reference.sigmoid(x)
    assert y.dtype == dtype
    assert_close(y, 1 / (1 + np.exp(-wide)), "activation")


# ---- dropout


def draw_by_the_book(seed, call_count, layer, row, step, unit):
    """The random number of one element, in Python's integers."""

    def mix(z, bits, shifts, factors):
        for shift, factor in zip(shifts, (*factors, 1), strict=True):
            z = (z ^ (z >> shift)) * factor % 2**bits
        return z

    def mix64(z):
        return mix(z % 2**64, 64, (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def mix32(z):
        return mix(z, 32, (16, 15, 16), (0x7FEB352D, 0x846CA68B))

    key = mix64(seed + 0x9E3779B97F4A7C15)
    for word in (call_count, layer, row, step):
        key = mix64((key ^ word) + 0x9E3779B97F4A7C15)
    return mix32(mix32(unit ^ (key & 0xFFFFFFFF)) ^ (key >> 32))


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, 2**64 - 1])
def test_dropout_mask_by_the_book(seed):
    mask = reference.dropout_mask(0.4, seed, 2**40 + 1, 2, 3, 4, 5)
    for (step, row, unit), factor in np.ndenumerate(mask):
        draw = draw_by_the_book(seed, 2**40 + 1, 2, row, step, unit)
        assert factor == (0 if draw < int(0.4 * 2**32) else 1 / (1 - 0.4))


def test_dropout_mask_at_its_threshold():
    draw = draw_by_the_book(3, 4, 1, 0, 0, 0)
    assert reference.dropout_mask(draw / 2**32, 3, 4, 1, 1, 1, 1)[0, 0, 0] != 0
    assert reference.dropout_mask((draw + 1) / 2**32, 3, 4, 1, 1, 1, 1)[0, 0, 0] == 0


def test_dropout_mask_is_the_one_it_always_was():
    mask = reference.dropout_mask(0.5, seed=42, call_count=1, layer=0, steps=2, batch=2, units=8)
    picture = ["".join("#" if factor else "." for factor in row) for step in mask for row in step]
    assert picture == ["..#.....", "###..#..", "#..###.#", "###..#.."]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask_share_and_values(p):
    mask = reference.dropout_mask(p, 1, 0, 0, 50, 20, 100)
    assert mask.dtype == np.float64
    assert mask.shape == (50, 20, 100)
    assert set(np.unique(mask)) == {0.0, 1 / (1 - p)}
    deviation = np.sqrt(p * (1 - p) / mask.size)  # of the share of zeros of a binomial draw
    assert abs(np.mean(mask == 0) - p) < 4 * deviation
    for axes in [(0, 1), (0, 2), (1, 2)]:  # no step, row or unit is favoured
        shares = np.mean(mask == 0, axis=axes)
        assert np.all(np.abs(shares - p) < 5 * deviation * np.sqrt(len(shares)))


def test_dropout_mask_neighbours_are_independent():
    dropped = reference.dropout_mask(0.5, 1, 0, 0, 50, 20, 100) == 0
    for axis in range(3):
        same = np.diff(dropped.astype(int), axis=axis) == 0
        assert abs(np.mean(same) - 0.5) < 4 * 0.5 / np.sqrt(same.size)


def test_dropout_mask_depends_on_every_word():
    arguments = {"seed": 3, "call_count": 4, "layer": 1}
    mask = reference.dropout_mask(0.5, **arguments, steps=8, batch=4, units=16)
    assert np.array_equal(mask, reference.dropout_mask(0.5, **arguments, steps=8, batch=4, units=16))
    for name, value in arguments.items():
        other = reference.dropout_mask(0.5, **(arguments | {name: value + 1}), steps=8, batch=4, units=16)
        assert 0.4 < np.mean(mask == other) < 0.6, name
    swapped = reference.dropout_mask(0.5, 4, 3, 1, steps=8, batch=4, units=16)
    assert 0.4 < np.mean(mask == swapped) < 0.6


def test_dropout_mask_of_a_part_is_part_of_the_mask():
    full_mask = reference.dropout_mask(0.3, 1, 2, 0, 6, 5, 7)
    assert np.array_equal(reference.dropout_mask(0.3, 1, 2, 0, 4, 3, 2), full_mask[:4, :3, :2])


def test_dropout_mask_at_the_ends():
    assert np.array_equal(reference.dropout_mask(0.0, 1, 0, 0, 5, 4, 30), np.ones((5, 4, 30)))
    assert np.array_equal(reference.dropout_mask(1.0, 1, 0, 0, 5, 4, 30), np.zeros((5, 4, 30)))
    for shape in [(0, 4, 30), (5, 0, 30), (5, 4, 0)]:
        assert reference.dropout_mask(0.5, 1, 0, 0, *shape).shape == shape
    for p in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"^p: "):
            reference.dropout_mask(p, 1, 0, 0, 1, 1, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_is_a_mask_between_layers(cell, dtype):
    """Three layers with dropout are three runs of one layer with the masks between, and none at the end."""
    x, state, parameters, _, _ = make_problem(cell, layers=3, bidirectional=True)
    x = x.astype(dtype)
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "seed": 7, "call_count": 5}
    output, _, _ = reference.forward(cell, x, state, parameters, **options)
    for layer in range(3):
        layer_parameters = {n.replace(f"_l{layer}", "_l0"): a for n, a in parameters.items() if f"_l{layer}" in n}
        start = tuple(member[2 * layer : 2 * layer + 2] for member in members(state))
        x, _, _ = reference.forward(
            cell, x, start if cell == "lstm" else start[0], layer_parameters, bidirectional=True
        )
        if layer < 2:
            x = x * reference.dropout_mask(0.4, 7, 5, layer, *x.shape).astype(dtype)
    assert np.array_equal(output, x)


def test_dropout_of_everything():
    x, state, parameters, grad_output, _ = make_problem("lstm", layers=2)
    run = {"num_layers": 2, "dropout": 1.0}
    output, _, tape = reference.forward("lstm", x, state, parameters, **run)
    other, _, _ = reference.forward("lstm", x + 1, state, parameters, **run)
    assert np.array_equal(output, other)
    grad_x, _, _ = reference.backward(tape, grad_output)
    assert not grad_x.any()


def test_dropout_selects():
    """What is dropped becomes zero, an infinity too."""
    x, _, parameters, _, _ = make_problem("rnn_relu", layers=2)
    parameters["bias_ih_l0"][1] = np.inf
    parameters["weight_ih_l1"][:, 1] = 1
    run = {"num_layers": 2, "dropout": 0.5, "seed": 1}
    with np.errstate(invalid="ignore"):
        output, _, _ = reference.forward("rnn_relu", x[:1], None, parameters, **run)
    dropped = reference.dropout_mask(0.5, 1, 0, 0, 1, B, H)[0, :, 1] == 0
    assert dropped.any()
    assert not dropped.all()
    assert np.array_equal(np.isfinite(output[0]).all(axis=-1), dropped)


# ---- dtypes and sizes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("cell", CELLS)
def test_dtype_is_that_of_x(cell, dtype):
    problem = make_problem(cell, layers=2, bidirectional=True)
    x, state, parameters, grad_output, grad_state = problem
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "seed": 1}
    output, after, tape = reference.forward(cell, x.astype(dtype), state, parameters, **options)
    expected, expected_after, _ = reference.forward(cell, x, state, parameters, **options)
    kind = {np.float16: "float16", np.float32: "float32"}.get(dtype, "float64")
    assert_close(output, expected, kind, "output")
    assert_close(members(after), members(expected_after), kind, "state")
    grad_x, grad_before, grad_parameters = reference.backward(tape, grad_output, grad_state)
    for array in (output, *members(after), grad_x, *members(grad_before), *grad_parameters.values()):
        assert array.dtype == dtype


def test_longdouble_is_closer_than_float64():
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is float64 on this machine")
    x, state, parameters, _, _ = make_problem("lstm")
    wide, _, _ = reference.forward("lstm", x.astype(np.longdouble), state, parameters)
    assert np.any(wide != wide.astype(np.float64))


@pytest.mark.parametrize(("steps", "batch"), [(0, B), (T, 0), (0, 0)])
@pytest.mark.parametrize(("cell", "projection"), [*((cell, 0) for cell in CELLS), ("lstm", P)])
def test_no_steps_or_no_rows(cell, projection, steps, batch):
    stack = {"layers": 2, "bidirectional": True, "projection": projection}
    problem = make_problem(cell, **stack, steps=steps, batch=batch)
    x, state, parameters, grad_output, grad_state = problem
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
    output, after, tape = reference.forward(cell, x, state, parameters, **options)
    assert output.shape == (steps, batch, 2 * (projection or H))
    grad_x, grad_before, grad_parameters = reference.backward(tape, grad_output, grad_state)
    assert grad_x.shape == x.shape
    for first, other in zip(members(after), members(state), strict=True):
        assert np.array_equal(first, other)
    for first, other in zip(members(grad_before), members(grad_state), strict=True):
        assert np.array_equal(first, other)
    assert {name: array.shape for name, array in grad_parameters.items()} == {
        name: array.shape for name, array in parameters.items()
    }
    assert not any(array.any() for array in grad_parameters.values())


@pytest.mark.parametrize("cell", CELLS)
def test_state_carries_on(cell):
    x, state, parameters, _, _ = make_problem(cell, layers=2)
    output, last, _ = reference.forward(cell, x, state, parameters, num_layers=2)
    first, between, _ = reference.forward(cell, x[:1], state, parameters, num_layers=2)
    second, after, _ = reference.forward(cell, x[1:], between, parameters, num_layers=2)
    assert_close(np.concatenate([first, second]), output, "float64")
    assert_close(members(after), members(last), "float64")


@pytest.mark.parametrize("cell", CELLS)
def test_rows_end_where_they_end(cell):
    """Each row as a batch of one row cut to its length, whatever comes after its end; both directions, two layers."""
    options = {"num_layers": 2, "bidirectional": True}
    x, state, parameters, grad_output, grad_state = make_problem(cell, layers=2, bidirectional=True)
    lengths = [3, 0, 4]
    for row, length in enumerate(lengths):
        x[length:, row] = grad_output[length:, row] = np.nan
    output, after, tape = reference.forward(cell, x, state, parameters, **options, lengths=lengths)
    grad_x, grad_before, grad_parameters = reference.backward(tape, grad_output, grad_state)
    total = {name: np.zeros_like(value) for name, value in parameters.items()}
    for row, length in enumerate(lengths):
        row_slice = slice(row, row + 1)

        def of_row(state, row_slice=row_slice):
            parts = tuple(part[:, row_slice] for part in members(state))
            return parts if isinstance(state, tuple) else parts[0]

        alone = reference.forward(cell, x[:length, row_slice], of_row(state), parameters, **options)
        grads = reference.backward(alone[2], grad_output[:length, row_slice], of_row(grad_state))
        assert_close(output[:length, row_slice], alone[0], "float64")
        assert_close(members(of_row(after)), members(alone[1]), "float64")
        assert_close(grad_x[:length, row_slice], grads[0], "float64_gradient")
        assert_close(members(of_row(grad_before)), members(grads[1]), "float64_gradient")
        assert not output[length:, row].any()
        assert not grad_x[length:, row].any()
        total = {name: value + grads[2][name] for name, value in total.items()}
    assert_close(grad_parameters, total, "float64_gradient")


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_separates(cell):
    """Two sequences in one: in both directions each half is as a sequence of its own."""
    x, state, parameters, _, _ = make_problem(cell, bidirectional=True, steps=5)
    resets = np.zeros((5, B), bool)
    resets[2] = True
    output, _, _ = reference.forward(cell, x, None, parameters, bidirectional=True, resets=resets)
    halves = [reference.forward(cell, part, None, parameters, bidirectional=True)[0] for part in (x[:2], x[2:])]
    assert_close(output, np.concatenate(halves), "float64")
    first = np.zeros((5, B), bool)
    first[0] = True
    one_way = {name: value for name, value in parameters.items() if not name.endswith("_reverse")}
    before = tuple(part[:1] for part in members(state))
    output, _, _ = reference.forward(cell, x, before if cell == "lstm" else before[0], one_way, resets=first)
    assert_close(output, reference.forward(cell, x, None, one_way)[0], "float64")


def test_arguments_are_checked():
    x, state, parameters, _, _ = make_problem("lstm")
    with pytest.raises(TypeError, match=r"^x: "):
        reference.forward("lstm", x.astype(int), state, parameters)
    with pytest.raises(ValueError, match=r"^state: "):
        reference.forward("lstm", x, (state[0], state[1][:, :1]), parameters)
    _, _, tape = reference.forward("lstm", x, state, parameters)
    with pytest.raises(ValueError, match=r"^grad_state: "):
        reference.backward(tape, None, (state[0][:, :1], None))
