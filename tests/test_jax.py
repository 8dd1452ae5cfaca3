"""gatewise.jax against a scan written with jax.numpy, against the layers bit for bit, and in JAX's transformations."""

import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import gatewise as gw
import numpy as np
import pytest
from conftest import CELLS, DTYPES, make_data, make_layer, random
from tolerances import assert_close

jax = pytest.importorskip("jax")
import gatewise.jax as gj  # noqa: E402 - needs jax
import jax.numpy as jnp  # noqa: E402

# Of JAX below 0.8, by NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

REPOSITORY = Path(__file__).parents[1]
# For what has nothing to do with the equations.
two_cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.fixture(autouse=True)
def float64_too():
    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    # Most of the time here is XLA's compiler.
    jax.config.update("jax_disable_most_optimizations", True)
    with enable(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def ours(cell):
    if cell.startswith("rnn_"):
        return partial(gj.rnn, nonlinearity=cell.removeprefix("rnn_"))
    return getattr(gj, cell)


def parameters_of(layer):
    return {name: jnp.asarray(value) for name, value in layer.state_dict().items()}


def members(state):
    return state if isinstance(state, tuple) else (state,)


def like(state):
    return state if len(state) > 1 else state[0]


# ---- the same in jax.numpy, as anyone would write it


def step(cell, p, suffix, state, x):
    def linear(kind, value):
        return value @ p[f"weight_{kind}{suffix}"].T + p.get(f"bias_{kind}{suffix}", 0)

    a, b = linear("ih", x), linear("hh", state[0])
    if cell == "lstm":
        i, f, g, o = jnp.split(a + b, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h @ p[f"weight_hr{suffix}"].T if f"weight_hr{suffix}" in p else h), c
    if cell == "gru":
        (ar, az, an), (br, bz, bn) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
        z = jax.nn.sigmoid(az + bz)
        return ((1 - z) * jnp.tanh(an + jax.nn.sigmoid(ar + br) * bn) + z * state[0],)
    return ((jnp.tanh if cell == "rnn_tanh" else jax.nn.relu)(a + b),)


def scanned(cell, p, x, state):
    """x [T, B, I], state [L*D, B, .] -> y, state after."""
    layers = sum(bool(re.fullmatch(r"weight_ih_l\d+", name)) for name in p)
    directions = ("", "_reverse")[: 1 + ("weight_ih_l0_reverse" in p)]
    ends = []
    for layer in range(layers):
        outputs = []
        for direction in directions:
            start = tuple(part[len(ends)] for part in members(state))

            def walk(before, x, suffix=f"_l{layer}{direction}"):
                after = step(cell, p, suffix, before, x)
                return after, after[0]

            end, y = jax.lax.scan(walk, start, x, reverse=bool(direction))
            ends.append(end)
            outputs.append(y)
        x = jnp.concatenate(outputs, -1)
    return x, like(tuple(jnp.stack(parts) for parts in zip(*ends, strict=True)))


def weighted(results, weights):
    return sum((one * other).sum() for one, other in zip(results, weights, strict=True))


def loss_of(call, data):
    """A loss in which each output counts with a number of its own, and the outputs."""
    weights = [data.grad_output, *members(data.grad_state)]

    def loss(p, x, state):
        y, after = call(p, x, state)
        results = [y, *members(after)]
        return weighted(results, weights), results

    return loss


def gradients(call, layer, data):
    """Outputs and all gradients of a call, as one list."""
    loss = jax.value_and_grad(loss_of(call, data), argnums=(0, 1, 2), has_aux=True)
    (_, results), (grad_p, grad_x, grad_state) = loss(parameters_of(layer), data.x, data.state)
    return [*results, grad_x, *members(grad_state), *(grad_p[name] for name in layer.parameters)]


def core_gradients(layer, data, **options):
    tape = layer.record(data.x, data.state, **options)
    grads = tape.backward(data.grad_output, data.grad_state)
    return [tape.output, *members(tape.state), grads.input, *members(grads.state), *grads.parameters.values()]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


STACKS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False},
    {"proj_size": 4, "bidirectional": True},
    {"proj_size": 3, "num_layers": 2, "bias": False},
]


@pytest.mark.parametrize(
    ("cell", "dtype", "stack"),
    [
        (cell, dtype, stack)
        for cell in CELLS
        for stack in STACKS
        for dtype in (DTYPES if "bidirectional" in stack else ["float64"])
        if "proj_size" not in stack or cell == "lstm"
    ],
    ids=str,
)
def test_against_a_scan(cell, dtype, stack):
    layer = make_layer(cell, 5, 9, dtype=dtype, **stack)
    data = make_data(layer, 7, 3)
    found = jax.jit(lambda: gradients(ours(cell), layer, data))()
    expected = jax.jit(lambda: gradients(partial(scanned, cell), layer, data))()
    split = len(members(data.state)) + 1
    assert_close(found[:split], expected[:split], dtype)
    assert_close(found[split:], expected[split:], f"{dtype}_gradient")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("uneven", "every"), [(None, None), ("lengths", 3), ("resets", None), ("both", 4)])
def test_the_bits_are_the_layers(cell, dtype, uneven, every):
    layer = make_layer(cell, 5, 19, num_layers=2, bidirectional=True, dtype=dtype)
    data = make_data(layer, 9, 4)
    options = {"checkpoint_every": every} if every else {}
    if uneven in ("lengths", "both"):
        options["lengths"] = np.array([3, 8, 0, 5])
    if uneven in ("resets", "both"):
        options["resets"] = np.random.default_rng(3).random((9, 4)) < 0.3
    expected = core_gradients(layer, data, **options)
    found = jax.jit(partial(gradients, partial(ours(cell), **options), layer, data))()
    assert_same_bits(found, expected)
    y, state = ours(cell)(layer.state_dict(), data.x, data.state, **options)  # at once, from NumPy arrays
    assert_same_bits([y, *members(state)], expected[: 1 + len(members(state))])


@two_cells
def test_gradients_outside_of_jit(cell):
    layer = make_layer(cell, 5, 9)
    data = make_data(layer, 6, 3)
    assert_same_bits(gradients(ours(cell), layer, data), core_gradients(layer, data))


@pytest.mark.parametrize("lengths", [None, [4, 6, 0]])
def test_layouts(cell, lengths):
    """batch_first, unbatched, and no state at all."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    x, p = random((6, 3, 5), "float32"), parameters_of(layer)
    options = {} if lengths is None else {"lengths": lengths}
    resets = random((6, 3), "float32") > 0.8
    y, state = ours(cell)(p, x, resets=resets, **options)
    y_expected, state_expected = layer(x, resets=resets, **options)
    assert_same_bits([y, *members(state)], [y_expected, *members(state_expected)])
    y, state = ours(cell)(p, x.swapaxes(0, 1), batch_first=True, resets=resets.T, **options)
    assert_same_bits([y.swapaxes(0, 1), *members(state)], [y_expected, *members(state_expected)])
    for row in range(3):
        own = {"lengths": np.int64(lengths[row])} if lengths else {}
        y, state = ours(cell)(p, x[:, row], resets=resets[:, row], **own)
        assert_same_bits([y, *members(state)], [y_expected[:, row], *(one[:, row] for one in members(state_expected))])


def test_what_lies_behind_an_end_cannot_matter(cell):
    layer = make_layer(cell, 5, 9, bidirectional=True)
    data = make_data(layer, 6, 3)
    lengths = np.array([2, 4, 0])
    behind = np.arange(6)[:, None] >= lengths

    def found(x):
        return gradients(partial(ours(cell), lengths=lengths), layer, data._replace(x=x))

    results = found(np.where(behind[..., None], np.float32(np.nan), data.x))
    assert_same_bits(results, found(data.x))
    assert not np.asarray(results[0])[4:].any()
    grad_x = np.asarray(results[1 + len(members(data.state))])
    assert not grad_x[behind].any()


def test_lengths_and_resets_may_be_traced(cell):
    layer = make_layer(cell, 5, 9)
    x, p = random((6, 3, 5), "float32"), parameters_of(layer)
    call = jax.jit(lambda x, lengths, resets: ours(cell)(p, x, lengths=lengths, resets=resets))
    resets = random((6, 3), "float32") > 0.7
    for lengths in ([1, 2, 3], [6, 0, 5], [0, 0, 0]):
        y, state = call(x, np.array(lengths), resets)
        y_expected, state_expected = layer(x, lengths=lengths, resets=resets)
        assert_same_bits([y, *members(state)], [y_expected, *members(state_expected)])
    for wrong in (-1, 7):
        with pytest.raises(Exception, match=rf"lengths: expected numbers from 0 to 6 \(T\), got {wrong}"):
            jax.block_until_ready(call(x, np.array([1, wrong, 3]), resets))
    for wrong in (np.array([1, 2**32 + 3, 0]), np.array([-(2**32), 1, 2]), np.array([1, 2**64 - 1, 2], np.uint64)):
        with pytest.raises(Exception, match="lengths: expected numbers from 0 to 6"):
            jax.block_until_ready(call(x, wrong, resets))


@two_cells
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0), (1, 1)])
def test_sizes_of_zero_and_one(cell, steps, batch):
    layer = make_layer(cell, 5, 9, num_layers=2)
    data = make_data(layer, steps, batch)
    assert_same_bits(gradients(ours(cell), layer, data), core_gradients(layer, data))


@two_cells
def test_only_what_is_asked_for_is_computed(cell):
    """Gradients of one weight, of the state alone, of nothing but the last state."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True, dtype="float64")
    data = make_data(layer, 6, 3)
    p = parameters_of(layer)
    everything = jax.grad(loss_of(ours(cell), data), argnums=(0, 1, 2), has_aux=True)(p, data.x, data.state)[0]
    for name in ("weight_hh_l0", "bias_ih_l1_reverse"):
        own = jax.grad(lambda w, name=name: loss_of(ours(cell), data)({**p, name: w}, data.x, data.state)[0])(p[name])
        assert_same_bits([own], [everything[0][name]])
    own = jax.grad(lambda state: loss_of(ours(cell), data)(p, data.x, state)[0])(data.state)
    assert_same_bits(members(own), members(everything[2]))
    own = jax.grad(lambda x: loss_of(ours(cell), data)(p, x, data.state)[0])(data.x)
    assert_same_bits([own], [everything[1]])

    def last(call, x):
        return sum(part.sum() for part in members(call(p, x, data.state)[1]))

    assert_close(
        jax.grad(partial(last, ours(cell)))(data.x), jax.grad(partial(last, partial(scanned, cell)))(data.x),
        "float64_gradient",
    )  # fmt: skip
    zero = jax.grad(lambda x: jax.lax.stop_gradient(ours(cell)(p, x)[0]).sum() + 0 * x.sum())(data.x)
    assert not np.asarray(zero).any()


# ---- transformations


def test_derivatives_of_both_modes_to_second_order():
    from jax.test_util import check_grads

    cell = "gru"  # hessians of the others are below
    layer = make_layer(cell, 3, 4, bidirectional=True, dtype="float64")
    data = make_data(layer, 4, 2)
    call = partial(ours(cell), lengths=[4, 2], resets=np.array([[0, 0], [0, 1], [1, 0], [0, 0]]))

    @jax.jit
    def loss(p, x, state):
        return loss_of(call, data)(p, x, state)[0]

    check_grads(loss, (parameters_of(layer), data.x, data.state), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@two_cells
@pytest.mark.parametrize("modes", [("fwd", "rev"), ("rev", "rev"), ("fwd", "fwd"), ("rev", "fwd")], ids="-".join)
def test_hessians_agree_with_the_scans(cell, modes):
    layer = make_layer(cell, 3, 2, dtype="float64")
    data, p = make_data(layer, 3, 2), parameters_of(layer)

    def loss(call, bias, x):
        return loss_of(call, data)({**p, "bias_hh_l0": bias}, x, data.state)[0]

    def hessian(call):
        function = partial(loss, call)
        for mode in reversed(modes):
            function = (jax.jacfwd if mode == "fwd" else jax.jacrev)(function, argnums=(0, 1))
        return jax.tree.leaves(jax.jit(function)(p["bias_hh_l0"], data.x))

    for one, other in zip(hessian(ours(cell)), hessian(partial(scanned, cell)), strict=True):
        assert_close(one, other, "float64_gradient")


def primitives(jaxpr, found=None):
    """How often each primitive occurs, inside others too."""
    found = {} if found is None else found
    for equation in jaxpr.eqns:
        found[equation.primitive.name] = found.get(equation.primitive.name, 0) + 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_is_a_batch(cell, batch_first):
    """One call for all examples, forward and backward, with the bits of a batch."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True)
    data = make_data(layer, 6, 8)  # as 4 examples of 2 rows
    p = parameters_of(layer)
    call = partial(ours(cell), batch_first=batch_first)
    turn = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)

    def parts(value):
        return value.reshape(value.shape[0], 4, 2, *value.shape[2:])

    def loss(p, x, state):
        y, after = jax.vmap(lambda x, state: call(p, turn(x), state), in_axes=(1, 1))(x, state)
        y = y.swapaxes(1, 2) if batch_first else y
        weights = [parts(one).swapaxes(0, 1) for one in (data.grad_output, *members(data.grad_state))]
        return weighted([y, *members(after)], weights)

    arguments = p, parts(data.x), jax.tree.map(parts, data.state)
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    expected = core_gradients(layer, data)[1 + len(members(data.state)) :]
    flat = [found[1], *members(found[2])]
    flat = [one.reshape(one.shape[0], 8, *one.shape[3:]) for one in flat] + [
        found[0][name] for name in layer.parameters
    ]
    assert_same_bits(flat, expected)
    counts = primitives(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr)
    assert counts["gatewise_recorded"] == counts["gatewise_backward"] == 1
    assert "scan" not in counts


@two_cells
def test_vmap_of_parts(cell):
    """Of lengths alone, of the state alone, of resets alone, of weights; twice; with other axes."""
    layer, other = make_layer(cell, 5, 9), make_layer(cell, 5, 9)
    other.parameters.update({name: value * 0.5 for name, value in layer.parameters.items()})
    p = parameters_of(layer)
    x = random((6, 2, 5), "float32")
    call = ours(cell)

    def check(found, expected):
        for i, one in enumerate(expected):
            assert_same_bits([part[i] for part in jax.tree.leaves(found)], jax.tree.leaves(one))

    lengths = np.array([[1, 2], [6, 0], [3, 3]])
    check(jax.vmap(lambda n: call(p, x, lengths=n))(lengths), [layer(x, lengths=n) for n in lengths])
    resets = random((3, 6, 2), "float32") > 0.5
    check(jax.vmap(lambda r: call(p, x, resets=r))(resets), [layer(x, resets=r) for r in resets])
    states = [make_data(layer, 6, 2, seed).state for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts, 2), *states)
    check(jax.vmap(lambda s: call(p, x, s), in_axes=2)(stacked), [layer(x, s) for s in states])
    both = {name: jnp.stack([p[name], other.parameters[name]]) for name in p}
    check(jax.vmap(lambda p: call(p, x))(both), [layer(x), other(x)])
    check(jax.vmap(lambda p, x: call(p, x))(both, np.stack([x, 2 * x])), [layer(x), other(2 * x)])
    many = random((3, 4, 6, 5), "float32")  # unbatched, twice
    nested = jax.vmap(jax.vmap(lambda x: call(p, x)))(many)
    check(jax.tree.map(lambda a: a.reshape(12, *a.shape[2:]), nested), [layer(one) for one in many.reshape(12, 6, 5)])
    nothing = jax.vmap(lambda x: call(p, x))(np.zeros((0, 6, 2, 5), "float32"))
    assert nothing[0].shape == (0, 6, 2, 9)


@two_cells
def test_vmap_of_gradients(cell):
    """One gradient of the weights for each example; and gradients of the input, all examples at once."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    p, x = parameters_of(layer), random((4, 6, 2, 5), "float32")

    def loss(p, x):
        y, after = ours(cell)(p, x)
        return (y**2).sum() + sum(part.sum() for part in members(after))

    found = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(p, x)
    of_x = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0))
    for i in range(4):
        grad_p, grad_x = jax.grad(loss, argnums=(0, 1))(p, x[i])
        assert_same_bits([found[name][i] for name in p], [grad_p[name] for name in p])
        assert_same_bits([of_x(p, x)[i]], [grad_x])
    assert "scan" not in primitives(jax.make_jaxpr(of_x)(p, x).jaxpr)
    jacobian = jax.jacrev(lambda x: ours(cell)(p, x)[0].sum((1, 2)))(x[0])  # one tape, several gradients
    for t in (0, 5):
        own = jax.grad(lambda x, t=t: ours(cell)(p, x)[0][t].sum())(x[0])
        assert_same_bits([jacobian[t]], [own])
    # A vmap over a linear map that was made outside of it.
    _, along = jax.linearize(lambda x: ours(cell)(p, x)[0], x[0])
    expected = jax.jvp(lambda x: scanned(cell, p, x, zeros(layer, 2))[0], (x[0],), (x[1],))[1]
    assert_close(jax.vmap(along)(x[1:])[0], expected, "float32_gradient")


def zeros(layer, batch):
    return jax.tree.map(np.zeros_like, make_data(layer, 1, batch).state)


@two_cells
def test_inside_a_scan(cell):
    """Step by step the same bits as at once; weights are packed before the loop, not in it."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    p, data = parameters_of(layer), make_data(layer, 6, 3)

    def walk(p, x, state):
        def one(state, x):
            y, state = ours(cell)(p, x[None], state)
            return state, y[0]

        state, y = jax.lax.scan(one, state, x)
        return y, state

    y, state = jax.jit(walk)(p, data.x, data.state)
    expected = layer(data.x, data.state)
    assert_same_bits([y, *members(state)], [expected[0], *members(expected[1])])
    text = jax.jit(walk).lower(p, data.x, data.state).compile().as_text()
    computations = re.split(r"\n\n+", text)
    assert [part.lstrip().startswith("ENTRY") for part in computations if '"gatewise_pack"' in part] == [True]
    assert not any(part.lstrip().startswith("ENTRY") for part in computations if '"gatewise_forward"' in part)
    found, other = (
        jax.jit(jax.grad(lambda p, call=call: loss_of(call, data)(p, data.x, data.state)[0]))(p)
        for call in (walk, partial(scanned, cell))
    )
    assert_close(found, other, "float32_gradient")


@two_cells
def test_checkpoint_and_cond(cell):
    layer = make_layer(cell, 5, 9)
    data, p = make_data(layer, 6, 3), parameters_of(layer)
    plain = loss_of(ours(cell), data)
    expected = jax.grad(plain, has_aux=True)(p, data.x, data.state)[0]
    found = jax.jit(jax.grad(jax.checkpoint(plain), has_aux=True))(p, data.x, data.state)[0]
    assert_same_bits(found.values(), expected.values())

    def either(p, x, flag):
        return jax.lax.cond(
            flag, lambda p, x: plain(p, x, data.state)[0], lambda p, x: 2 * plain(p, x[:, ::-1], data.state)[0], p, x
        )

    flags = np.array([True, False, True, True])
    xs = np.stack([data.x * scale for scale in (1, 2, 3, 4)]).astype("float32")
    one = jax.jit(jax.grad(either, argnums=(0, 1)))
    expected = [one(p, x, flag) for x, flag in zip(xs, flags, strict=True)]
    # Mapped, JAX takes both branches, with zeros for what the one that was not taken would have kept.
    found = jax.jit(jax.vmap(jax.grad(either, argnums=(0, 1)), in_axes=(None, 0, 0)))(p, xs, flags)
    of_x = jax.jit(jax.vmap(jax.grad(either, argnums=1), in_axes=(None, 0, 0)))(p, xs, flags)
    for i, (grad_p, grad_x) in enumerate(expected):
        assert_same_bits([part[i] for part in found[0].values()], grad_p.values())
        assert_same_bits([found[1][i], of_x[i]], [grad_x, grad_x])


@two_cells
def test_training_with_optax(cell):
    optax = pytest.importorskip("optax")
    layer = make_layer(cell, 4, 12, bidirectional=True, dtype="float64")
    x = random((20, 8, 4), "float64")
    target = (np.cumsum(x[..., 0], 0) > 0).astype("float64")

    def curve(call):
        model = {"layer": parameters_of(layer), "head": jnp.asarray(random((24,), "float64", 3)) * 0.1}
        optimizer = optax.adam(0.01)
        state = optimizer.init(model)

        def loss(model):
            y, _ = call(model["layer"], x)
            return optax.sigmoid_binary_cross_entropy(y @ model["head"], target).mean()

        @jax.jit
        def train(model, state):
            value, grads = jax.value_and_grad(loss)(model)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(model, updates), state, value

        values = []
        for _ in range(30):
            model, state, value = train(model, state)
            values.append(float(value))
        return values

    found = curve(ours(cell))
    assert found[-1] < 0.75 * found[0]
    np.testing.assert_allclose(found, curve(lambda p, x: scanned(cell, p, x, zeros(layer, 8))), rtol=1e-8)


@two_cells
def test_other_devices_get_jax_numpy(cell):
    """A program for a GPU has no call of ours in it; on this processor what it does is right too."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True, dtype="float64")
    data, p = make_data(layer, 6, 3), parameters_of(layer)
    options = {"lengths": [6, 0, 4], "resets": random((6, 3), "float64") > 0.6}
    function = jax.jit(jax.grad(lambda p: loss_of(partial(ours(cell), **options), data)(p, data.x, data.state)[0]))
    assert "gatewise_forward" in function.trace(p).lower(lowering_platforms=("cpu",)).as_text()
    assert "@gatewise" not in function.trace(p).lower(lowering_platforms=("cuda",)).as_text()
    operands = [data.x, *members(data.state), np.array([6, 0, 4], "int32"), options["resets"], *p.values()]
    architecture = gj._architecture(cell, np.dtype("float64"), tuple((name, one.shape) for name, one in p.items()))
    of = gj._Options(architecture, False, True, True, 0, gw.backend())
    expected = layer(data.x, data.state, **options)
    assert_close(gj._walk(*operands, of=of), [expected[0], *members(expected[1])], "float64")


SHARDED = """
import gatewise as gw, gatewise.jax as gj, jax, jax.numpy as jnp, numpy as np
if not hasattr(jax, "shard_map"):
    raise SystemExit("none")
from jax.sharding import PartitionSpec as S
p = {name: jnp.asarray(value) for name, value in gw.LSTM(5, 9, 2, seed=1).state_dict().items()}
x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype("float32")
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
shard = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(S(), S(None, "d")), out_specs=out))
loss = lambda p, x: (gj.lstm(p, x)[0] ** 2).sum()
expected = jax.grad(loss)(p, x)
mapped = shard(lambda p, x: gj.lstm(p, x)[0], S(None, "d"))
np.testing.assert_array_equal(mapped(p, x), gj.lstm(p, x)[0])
each = shard(lambda p, x: jax.vmap(lambda x: gj.lstm(p, x[:, None])[0][:, 0], 1, 1)(x), S(None, "d"))
outside = [jax.jit(jax.grad(lambda p: (f(p, x) ** 2).sum()))(p) for f in (mapped, each)]
for found in (*outside, shard(jax.grad(loss), S())(p, x)):
    for name in p:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
try:
    shard(lambda p, x: loss(p, x), S())(p, x)
except ValueError:
    print("one device's part is refused as the whole")
"""


def test_shards():
    """Data parallelism: gradients of weights are summed over the devices, as those of any other function."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    if done.stderr.strip() == "none":
        pytest.skip("this JAX has no jax.shard_map")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused" in done.stdout


@two_cells
def test_jaxs_switches(cell):
    """Without compilation, with a look-out for NaN, without promotion of ranks."""
    layer = make_layer(cell, 5, 9)
    data = make_data(layer, 6, 3)
    with jax.disable_jit():
        assert_same_bits(gradients(ours(cell), layer, data), core_gradients(layer, data))
    loss = loss_of(ours(cell), data)
    infinite = {**parameters_of(layer), "bias_ih_l0": jnp.full(layer.parameters["bias_ih_l0"].shape, np.nan, "float32")}
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.grad(loss, has_aux=True)(infinite, data.x, data.state)
    with jax.numpy_rank_promotion("raise"):
        call = partial(ours(cell), lengths=[6, 2, 0])
        along = (parameters_of(layer), data.x, data.state)
        primal, _ = jax.jvp(lambda *given: loss_of(call, data)(*given)[0], along, along)
        assert_close(primal, loss_of(call, data)(*along)[0], "float32")


# ---- the core underneath


@two_cells
def test_threads_do_not_change_bits(cell, use_threads):
    layer = make_layer(cell, 20, 40, num_layers=2, bidirectional=True)
    data = make_data(layer, 12, 23)
    results = []
    for threads in (1, 2):
        use_threads(threads)
        results.append(jax.jit(lambda: gradients(ours(cell), layer, data))())
    assert_same_bits(*results)


def test_programs_at_once():
    layer = make_layer("lstm", 20, 40)
    p, x = parameters_of(layer), random((30, 8, 20), "float32")
    call = jax.jit(jax.grad(lambda p, x: (gj.lstm(p, x)[0] ** 2).sum()))
    expected = [call(p, x * i) for i in range(4)]
    found = [None] * 4

    def work(i):
        for _ in range(10):
            found[i] = jax.block_until_ready(call(p, x * i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one.values(), other.values())


def test_a_program_keeps_its_backend():
    """Forward, tape and backward fit each other, whatever is chosen in between."""
    layer = make_layer("lstm", 5, 19)
    data = make_data(layer, 6, 3)
    before = gw.backend()
    y, undo = jax.vjp(lambda x: gj.lstm(layer.state_dict(), x, data.state)[0], data.x)
    try:
        for name in gw.backends():
            gw.use_backend(name)
            (found,) = undo(data.grad_output)
            gw.use_backend(before)
            tape = layer.record(data.x, data.state)
            assert_same_bits([y, found], [tape.output, tape.backward(data.grad_output).input])
    finally:
        gw.use_backend(before)


def test_programs_that_nobody_should_write_are_refused():
    """The handlers are open to anyone: wrong sizes and foreign bytes are an error, not a crash."""
    layer = make_layer("lstm", 5, 9)
    p, x, h = parameters_of(layer), jnp.ones((4, 2, 5), "float32"), jnp.zeros((1, 2, 9), "float32")
    of = gj._Options(
        gj._architecture("lstm", np.dtype("float32"), tuple((name, value.shape) for name, value in p.items())),
        False, False, False, 0, gw.backend(),
    )  # fmt: skip
    packed_bytes, tape_bytes = of.sizes(4, 2)
    packed = gj._pack(of, list(p.values()))
    weights, results = list(p.values()), of.results(x)
    tape = jnp.zeros(tape_bytes, "uint8")
    nothing = {"given": np.array([1, 0, 0]), "wanted": np.array([1, 1])}
    out = gj._results_of_backward(of, x, [h, h], weights, (True, True))

    def refused(target, results, *operands, **attributes):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            jax.block_until_ready(jax.ffi.ffi_call(f"gatewise_{target}", results)(*operands, **attributes))

    own, to_pack = of.attributes(), of.attributes(weights_only=True)
    refused("pack", gj._bytes(packed_bytes), *weights[:-1], **to_pack)
    refused("pack", gj._bytes(packed_bytes), *weights, x, **to_pack)
    refused("pack", gj._bytes(packed_bytes - 64), *weights, **to_pack)
    refused("pack", gj._bytes(packed_bytes), weights[0][:-1], *weights[1:], **to_pack)
    refused("pack", gj._bytes(packed_bytes), *weights, **{**to_pack, "backend": "abacus"})
    refused("pack", gj._bytes(packed_bytes), *weights, **{**to_pack, "cell": "abacus"})
    refused("pack", gj._bytes(packed_bytes), *weights, **{**to_pack, "numbers": np.zeros(11, np.int64)})
    refused("pack", gj._bytes(packed_bytes), *weights, **{**to_pack, "numbers": np.full(11, -1)})
    refused("pack", gj._bytes(packed_bytes), *weights, **{**to_pack, "numbers": np.ones(3, np.int64)})
    refused("pack", gj._bytes(packed_bytes), *weights)
    nothing_of_it = jnp.zeros(0, "float32")
    for huge in ([2**62, 2**62, 0, 1, 1, 0], [5, 9, 0, 2**33, 1, 0], [1, 1, 0, 2**30, 2, 0], [2**31, 1, 0, 1, 1, 0]):
        numbers = np.array([*huge, 0, 0, 0, 0, 0])
        refused("pack", gj._bytes(packed_bytes), nothing_of_it, nothing_of_it, **{**to_pack, "numbers": numbers})
    refused("forward", results, x, h, h, jnp.zeros(packed_bytes, "uint8"), **own)
    refused("forward", results, x, h, h, packed[:-64], **own)
    refused("forward", results, x, h, packed, **own)
    refused("forward", results, x[..., :4], h, h, packed, **own)
    refused("forward", results, x[0], h, h, packed, **own)
    refused("forward", results, x, h[..., :4], h, packed, **own)
    refused("forward", results, x, h.astype("float64"), h, packed, **own)
    refused("forward", results[:1], x, h, h, packed, **own)
    refused("forward", [*results, gj._bytes(64)], x, h, h, packed, **of.attributes(record=True))
    y = jnp.asarray(layer(np.asarray(x))[0])
    refused("backward", out[:-1], x, h, h, y, tape, y, packed, **own, **nothing)
    refused("backward", out, x, h, h, y, tape, packed, **own, **nothing)
    refused("backward", out, x, h, h, y, packed, **own, **nothing)
    refused("backward", out, x, h, h, y, tape, y, packed, **own, **{**nothing, "given": np.array([1, 0])})
    refused("backward", out, x, h, h, y, tape, y, packed, **own, **{**nothing, "wanted": np.array([1])})
    # A tape that is none is made anew.
    recorded = layer.record(np.asarray(x))
    grads = recorded.backward(np.asarray(y))
    for foreign in (tape, tape[:0], tape[:64], tape + 1):
        found = jax.ffi.ffi_call("gatewise_backward", out)(x, h, h, y, foreign, y, packed, **own, **nothing)
        assert_same_bits(found, [grads.input, *grads.state, *grads.parameters.values()])


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_the_interface_is_xlas(tmp_path):
    """Each offset that the handlers rely on, against XLA's own header."""
    names = {
        "Extension": ("XLA_FFI_Extension_Base", {"type": "type", "next": "next"}),
        "Version": ("XLA_FFI_Api_Version", {"major": "major_version", "minor": "minor_version"}),
        "Metadata": ("XLA_FFI_Metadata", {"version": "api_version", "traits": "traits"}),
        "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"metadata": "metadata"}),
        "Buffer": ("XLA_FFI_Buffer", {"dtype": "dtype", "data": "data", "rank": "rank", "dims": "dims"}),
        "Buffers": ("XLA_FFI_Args", {"size": "size", "types": "types", "buffers": "args"}),
        "String": ("XLA_FFI_ByteSpan", {"data": "ptr", "size": "len"}),
        "Array": ("XLA_FFI_Array", {"dtype": "dtype", "size": "size", "data": "data"}),
        "Attributes": ("XLA_FFI_Attrs", {"size": "size", "types": "types", "names": "names", "values": "attrs"}),
        "NewError": ("XLA_FFI_Error_Create_Args", {"message": "message", "code": "errc"}),
        "Api": ("XLA_FFI_Api", {"version": "api_version", "create_error": "XLA_FFI_Error_Create"}),
        "CallFrame": (
            "XLA_FFI_CallFrame",
            {"api": "api", "stage": "stage", "arguments": "args", "results": "rets", "attributes": "attrs"},
        ),
    }
    checks = [
        f"static_assert(offsetof({ours}, {one}) == offsetof({theirs}, {other}));"
        f"static_assert(sizeof({ours}::{one}) == sizeof({theirs}::{other}));"
        for ours, (theirs, fields) in names.items()
        for one, other in fields.items()
        if (one, other) != ("version", "api_version") or ours == "Api"
    ]
    for ours_name, theirs in {
        "DataType::boolean": "PRED", "DataType::int32": "S32", "DataType::int64": "S64", "DataType::uint8": "U8",
        "DataType::float32": "F32", "DataType::float64": "F64",
    }.items():  # fmt: skip
        checks.append(f"static_assert(int({ours_name}) == XLA_FFI_DataType_{theirs});")
    checks += [
        "static_assert(int(Attribute::array) == XLA_FFI_AttrType_ARRAY);",
        "static_assert(int(Attribute::string) == XLA_FFI_AttrType_STRING);",
        "static_assert(metadata_extension == XLA_FFI_Extension_Metadata);",
        "static_assert(invalid_argument == XLA_FFI_Error_Code_INVALID_ARGUMENT);",
        "static_assert(version_major == XLA_FFI_API_MAJOR && newest_minor >= XLA_FFI_API_MINOR);",
    ]
    source = tmp_path / "check.cpp"
    header = REPOSITORY / "cpp" / "bindings" / "frameworks" / "xla.hpp"
    source.write_text(
        f'#include "xla/ffi/api/c_api.h"\n#include "{header}"\nusing namespace gatewise::xla;\n' + "\n".join(checks)
    )
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{jax.ffi.include_dir()}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bad input


def wrong(name, **changes):
    return pytest.param(changes.pop("match"), changes.pop("error", ValueError), changes, id=name)


@pytest.mark.parametrize(
    ("match", "error", "changes"),
    [
        wrong("axes", x=np.zeros(5, "f"), match=r"x: expected shape \(T, B, 5\) or \(T, 5\), got \(5,\)"),
        wrong("width", x=np.zeros((4, 2, 6), "f"), match=r"x: expected shape \(T, B, 5\)"),
        wrong("integers", x=np.zeros((4, 2, 5), int), match="x: expected float32 or float64, got int", error=TypeError),
        wrong("no array", x="x", match="x: expected float32 or float64, got <U1", error=TypeError),
        wrong("dtypes", x=np.zeros((4, 2, 5)), match="weight_ih_l0: expected float64 as x", error=TypeError),
        wrong("no mapping", parameters=[1], match="parameters: expected a mapping", error=TypeError),
        wrong("no names", parameters={}, match="parameters: expected weight_ih_l0 among them, got none"),
        wrong("state", state=np.zeros((1, 2, 9), "f"), match="state: expected a pair", error=TypeError),
        wrong("three states", state=(1.0, 2.0, 3.0), match="state: expected a pair", error=TypeError),
        wrong("state's shape", state=(np.zeros((1, 3, 9), "f"),) * 2, match=r"state\[0\]: expected shape \(1, 2, 9\)"),
        wrong("state's dtype", state=(np.zeros((1, 2, 9)),) * 2, match=r"\[0\]: expected float32", error=TypeError),
        wrong("lengths", lengths=[1, 5], match=r"lengths: expected numbers from 0 to 4 \(T\), got 5"),
        wrong("lengths' shape", lengths=[1], match=r"lengths: expected shape \(2,\)"),
        wrong("lengths' dtype", lengths=[1.0, 2.0], match="lengths: expected whole numbers", error=TypeError),
        wrong("resets", resets=np.full((4, 2), 2), match="resets: expected bools"),
        wrong("resets' shape", resets=np.zeros((4, 3), bool), match=r"resets: expected shape \(4, 2\)"),
        wrong("order", batch_first=1, match="batch_first: expected True or False", error=TypeError),
        wrong("checkpoints", checkpoint_every=0, match="checkpoint_every: expected a number from 1"),
    ],
)
def test_bad_calls(match, error, changes):
    layer = make_layer("lstm", 5, 9)
    arguments = {"parameters": layer.state_dict(), "x": np.zeros((4, 2, 5), "f"), **changes}
    with pytest.raises(error, match=match):
        gj.lstm(arguments.pop("parameters"), arguments.pop("x"), **arguments)


def test_bad_parameters():
    x, whole = np.zeros((4, 2, 5), "f"), make_layer("lstm", 5, 9, num_layers=2).state_dict()

    def refused(match, call=gj.lstm, **changes):
        given = {name: value for name, value in {**whole, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=match):
            call(given, x)

    refused("parameters: expected .*bias_hh_l1, got", bias_hh_l1=None)
    refused("parameters: expected", weight_ih_l3=whole["weight_ih_l1"])
    refused("parameters: expected weight_hh_l0 among them", weight_hh_l0=None)
    refused(r"weight_hh_l1: expected shape \(36, 9\), got \(35, 9\)", weight_hh_l1=whole["weight_hh_l1"][1:])
    refused(r"weight_ih_l0: expected shape \(4\*H, I\) of lstm", weight_ih_l0=whole["weight_ih_l0"][1:])
    refused("weight_hr_l0: expected no projection of gru", gj.gru, weight_hr_l0=np.zeros((2, 9), "f"))
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'gelu'"):
        gj.rnn(whole, x, nonlinearity="gelu")
    with pytest.raises(TypeError, match="state: expected an array h, got a tuple of 2"):
        gj.gru(make_layer("gru", 5, 9).state_dict(), x, (np.zeros((1, 2, 9), "f"),) * 2)

    @jax.jit
    def traced(lengths=None, resets=None):
        return gj.lstm(whole, x, lengths=lengths, resets=resets)

    with pytest.raises(TypeError, match="lengths: expected whole numbers, got float"):
        traced(lengths=np.ones(2))
    with pytest.raises(TypeError, match="resets: expected bools, got int"):
        traced(resets=np.ones((4, 2), int))


def test_unusual_arrays():
    """Other byte orders, strides, mappings; numbers that are no arrays yet."""
    layer = make_layer("lstm", 5, 9)
    x = random((6, 3, 5), "float32")
    expected = layer(x)[0]
    swapped = {name: value.astype(value.dtype.newbyteorder()) for name, value in layer.state_dict().items()}
    for parameters, given in (
        (swapped, x.astype(x.dtype.newbyteorder())),
        (layer.parameters, np.asfortranarray(x)),
        (dict(reversed(layer.state_dict().items())), np.repeat(x, 2, 0)[::2]),
    ):
        assert_same_bits([gj.lstm(parameters, given)[0]], [expected])
    for wrong in ([["a"]], [[2**100]], [[1], [2, 3]], np.zeros((4, 2, 5), "float16"), None):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            gj.lstm(layer.parameters, wrong)
    with pytest.raises(TypeError, match="parameters: expected names, got 1"):
        gj.lstm({**layer.parameters, 1: x}, x)
    with pytest.raises(ValueError, match="nonlinearity: expected"):
        gj.rnn(layer.parameters, x, nonlinearity=np.array(["tanh"]))


def test_sizes_beyond_memory():
    """Shapes without arrays: an answer or an error, at once."""
    p = make_layer("lstm", 5, 9).state_dict()
    shape = jax.ShapeDtypeStruct
    for steps, batch in ((2**30, 1), (1, 2**30)):
        x = shape((steps, batch, 5), "float32")
        assert jax.eval_shape(jax.grad(lambda x: gj.lstm(p, x)[0].sum()), x) == x
    with pytest.raises(ValueError, match="x: expected a sequence whose tape fits into memory"):
        jax.eval_shape(jax.grad(lambda x: gj.lstm(p, x)[0].sum()), shape((2**40, 2**10, 5), "float32"))


def test_without_jax():
    """The package imports without JAX, and its module says what is missing."""
    code = "import sys; sys.modules['jax'] = None; import gatewise; import gatewise.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "ModuleNotFoundError: gatewise.jax needs JAX: pip install 'gatewise[jax]'" in done.stderr
    code = "import sys, gatewise; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_of_a_counter():
    command = [sys.executable, REPOSITORY / "examples" / "jax_counter.py", "--hidden", "16", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5
