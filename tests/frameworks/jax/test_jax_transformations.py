"""gatewise.jax in JAX's transformations: derivatives, vmap, control flow, devices."""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial

import gatewise as gw
import numpy as np
import pytest
from conftest import make_data, make_layer, random
from tolerances import assert_close

jax = pytest.importorskip("jax")
import gatewise.jax.equations as equations  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from gatewise.jax.functions import architecture_of  # noqa: E402
from gatewise.jax.options import Options  # noqa: E402
from jax_calls import (  # noqa: E402
    assert_same_bits,
    core_gradients,
    float64_enabled,  # noqa: F401
    gradients,
    ignore_copy_warning,
    jax_function,
    loss_of,
    members,
    parameters_of,
    scanned,
    two_cells,
    weighted_sum,
    zero_state,
)

pytestmark = ignore_copy_warning


def test_derivatives_of_both_modes_to_second_order():
    from jax.test_util import check_grads

    cell = "gru"  # the next test is of other cells
    layer = make_layer(cell, 3, 4, bidirectional=True, dtype="float64")
    data = make_data(layer, 4, 2)
    call = partial(jax_function(cell), lengths=[4, 2], resets=np.array([[0, 0], [0, 1], [1, 0], [0, 0]]))

    @jax.jit
    def loss(p, x, state):
        return loss_of(call, data)(p, x, state)[0]

    check_grads(loss, (parameters_of(layer), data.x, data.state), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@two_cells
@pytest.mark.parametrize("modes", [("fwd", "rev"), ("rev", "rev"), ("fwd", "fwd"), ("rev", "fwd")], ids="-".join)
def test_hessians_against_a_scan(cell, modes):
    layer = make_layer(cell, 3, 2, dtype="float64")
    data, p = make_data(layer, 3, 2), parameters_of(layer)

    def loss(call, bias, x):
        return loss_of(call, data)({**p, "bias_hh_l0": bias}, x, data.state)[0]

    def hessian(call):
        function = partial(loss, call)
        for mode in reversed(modes):
            function = (jax.jacfwd if mode == "fwd" else jax.jacrev)(function, argnums=(0, 1))
        return jax.tree.leaves(jax.jit(function)(p["bias_hh_l0"], data.x))

    for actual, expected in zip(hessian(jax_function(cell)), hessian(partial(scanned, cell)), strict=True):
        assert_close(actual, expected, "float64_gradient")


def count_primitives(jaxpr):
    """How often each primitive occurs, inside others too."""
    counts = Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                counts += count_primitives(inner)
    return counts


@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_is_a_batch(cell, batch_first):
    """Forward and backward are one call for all examples, with the bits of a batch."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True)
    data = make_data(layer, 6, 8)  # as 4 examples of 2 rows
    p = parameters_of(layer)
    call = partial(jax_function(cell), batch_first=batch_first)
    reorder = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)

    def examples(value):
        return value.reshape(value.shape[0], 4, 2, *value.shape[2:])

    def loss(p, x, state):
        y, after = jax.vmap(lambda x, state: call(p, reorder(x), state), in_axes=(1, 1))(x, state)
        y = y.swapaxes(1, 2) if batch_first else y
        weights = [examples(grad).swapaxes(0, 1) for grad in (data.grad_output, *members(data.grad_state))]
        return weighted_sum([y, *members(after)], weights)

    arguments = p, examples(data.x), jax.tree.map(examples, data.state)
    grad_p, grad_x, grad_state = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    expected = core_gradients(layer, data)[1 + len(members(data.state)) :]
    of_rows = [grad.reshape(grad.shape[0], 8, *grad.shape[3:]) for grad in (grad_x, *members(grad_state))]
    assert_same_bits([*of_rows, *(grad_p[name] for name in layer.parameters)], expected)
    counts = count_primitives(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr)
    assert counts["gatewise_recorded"] == counts["gatewise_backward"] == 1
    assert "scan" not in counts


@two_cells
def test_vmap_of_some_arrays(cell):
    """Over only lengths, only resets, only the state, only weights; nested; along other axes."""
    layer, other = make_layer(cell, 5, 9), make_layer(cell, 5, 9)
    other.parameters.update({name: value * 0.5 for name, value in layer.parameters.items()})
    p = parameters_of(layer)
    x = random((6, 2, 5), "float32")
    call = jax_function(cell)

    def check(actual, expected):
        for i, example in enumerate(expected):
            assert_same_bits([part[i] for part in jax.tree.leaves(actual)], jax.tree.leaves(example))

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
    x = random((3, 4, 6, 5), "float32")  # two nested axes of unbatched sequences
    nested = jax.vmap(jax.vmap(lambda x: call(p, x)))(x)
    check(
        jax.tree.map(lambda a: a.reshape(12, *a.shape[2:]), nested), [layer(example) for example in x.reshape(12, 6, 5)]
    )
    y, _ = jax.vmap(lambda x: call(p, x))(np.zeros((0, 6, 2, 5), "float32"))
    assert y.shape == (0, 6, 2, 9)


@two_cells
def test_vmap_of_gradients(cell):
    """Gradients of the weights come from one call for each example, those of the input from one call for all."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    p, x = parameters_of(layer), random((4, 6, 2, 5), "float32")

    def loss(p, x):
        y, after = jax_function(cell)(p, x)
        return (y**2).sum() + sum(part.sum() for part in members(after))

    grads_p = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(p, x)
    grads_x = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0))
    for i in range(4):
        grad_p, grad_x = jax.grad(loss, argnums=(0, 1))(p, x[i])
        assert_same_bits([grads_p[name][i] for name in p], [grad_p[name] for name in p])
        assert_same_bits([grads_x(p, x)[i]], [grad_x])
    assert "scan" not in count_primitives(jax.make_jaxpr(grads_x)(p, x).jaxpr)
    jacobian = jax.jacrev(lambda x: jax_function(cell)(p, x)[0].sum((1, 2)))(x[0])  # one tape, several gradients
    for t in (0, 5):
        grad_x = jax.grad(lambda x, t=t: jax_function(cell)(p, x)[0][t].sum())(x[0])
        assert_same_bits([jacobian[t]], [grad_x])
    # vmap over a linear map that was made outside of it
    _, linear_map = jax.linearize(lambda x: jax_function(cell)(p, x)[0], x[0])
    expected = jax.jvp(lambda x: scanned(cell, p, x, zero_state(layer, 2))[0], (x[0],), (x[1],))[1]
    assert_close(jax.vmap(linear_map)(x[1:])[0], expected, "float32_gradient")


@two_cells
def test_inside_a_scan(cell):
    """Single steps in a scan give the bits of a whole call, and the weights are packed before the loop, not in it."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    p, data = parameters_of(layer), make_data(layer, 6, 3)

    def step_by_step(p, x, state):
        def scan_step(state, x):
            y, state = jax_function(cell)(p, x[None], state)
            return state, y[0]

        state, y = jax.lax.scan(scan_step, state, x)
        return y, state

    y, state = jax.jit(step_by_step)(p, data.x, data.state)
    expected = layer(data.x, data.state)
    assert_same_bits([y, *members(state)], [expected[0], *members(expected[1])])
    text = jax.jit(step_by_step).lower(p, data.x, data.state).compile().as_text()
    computations = re.split(r"\n\n+", text)
    assert [part.lstrip().startswith("ENTRY") for part in computations if '"gatewise_pack"' in part] == [True]
    assert not any(part.lstrip().startswith("ENTRY") for part in computations if '"gatewise_forward"' in part)
    actual, expected = (
        jax.jit(jax.grad(lambda p, call=call: loss_of(call, data)(p, data.x, data.state)[0]))(p)
        for call in (step_by_step, partial(scanned, cell))
    )
    assert_close(actual, expected, "float32_gradient")


@two_cells
def test_checkpoint_and_cond(cell):
    layer = make_layer(cell, 5, 9)
    data, p = make_data(layer, 6, 3), parameters_of(layer)
    loss = loss_of(jax_function(cell), data)
    expected = jax.grad(loss, has_aux=True)(p, data.x, data.state)[0]
    actual = jax.jit(jax.grad(jax.checkpoint(loss), has_aux=True))(p, data.x, data.state)[0]
    assert_same_bits(actual.values(), expected.values())

    def conditional_loss(p, x, flag):
        return jax.lax.cond(
            flag, lambda p, x: loss(p, x, data.state)[0], lambda p, x: 2 * loss(p, x[:, ::-1], data.state)[0], p, x
        )

    flags = np.array([True, False, True, True])
    xs = np.stack([data.x * scale for scale in (1, 2, 3, 4)]).astype("float32")
    grad = jax.jit(jax.grad(conditional_loss, argnums=(0, 1)))
    expected = [grad(p, x, flag) for x, flag in zip(xs, flags, strict=True)]
    # Under vmap JAX runs both branches; for the branch not taken, the values saved for backward are zeros.
    grads_p, grads_x = jax.jit(jax.vmap(jax.grad(conditional_loss, argnums=(0, 1)), in_axes=(None, 0, 0)))(p, xs, flags)
    only_grads_x = jax.jit(jax.vmap(jax.grad(conditional_loss, argnums=1), in_axes=(None, 0, 0)))(p, xs, flags)
    for i, (grad_p, grad_x) in enumerate(expected):
        assert_same_bits([part[i] for part in grads_p.values()], grad_p.values())
        assert_same_bits([grads_x[i], only_grads_x[i]], [grad_x, grad_x])


@two_cells
def test_training_with_optax(cell):
    optax = pytest.importorskip("optax")
    layer = make_layer(cell, 4, 12, bidirectional=True, dtype="float64")
    x = random((20, 8, 4), "float64")
    target = (np.cumsum(x[..., 0], 0) > 0).astype("float64")

    def losses(call):
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

    actual = losses(jax_function(cell))
    assert actual[-1] < 0.75 * actual[0]
    np.testing.assert_allclose(actual, losses(lambda p, x: scanned(cell, p, x, zero_state(layer, 8))), rtol=1e-8)


@two_cells
def test_other_devices_run_the_equations(cell):
    """A program for a GPU calls no handler of the core. The equations that it runs instead are right on this CPU."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True, dtype="float64")
    data, p = make_data(layer, 6, 3), parameters_of(layer)
    extras = {"lengths": [6, 0, 4], "resets": random((6, 3), "float64") > 0.6}
    function = jax.jit(
        jax.grad(lambda p: loss_of(partial(jax_function(cell), **extras), data)(p, data.x, data.state)[0])
    )
    assert "gatewise_forward" in function.trace(p).lower(lowering_platforms=("cpu",)).as_text()
    assert "@gatewise" not in function.trace(p).lower(lowering_platforms=("cuda",)).as_text()
    operands = [data.x, *members(data.state), np.array([6, 0, 4], "int32"), extras["resets"], *p.values()]
    shapes = tuple((name, value.shape) for name, value in p.items())
    options = Options(architecture_of(cell, np.dtype("float64"), shapes), False, True, True, 0, gw.backend())
    y, state = layer(data.x, data.state, **extras)
    assert_close(equations.recurrent(*operands, options=options), [y, *members(state)], "float64")


SHARDED = """
import gatewise as gw, gatewise.jax as gj, jax, jax.numpy as jnp, numpy as np
if not hasattr(jax, "shard_map"):
    raise SystemExit("no shard_map")
from jax.sharding import PartitionSpec as S
p = {name: jnp.asarray(value) for name, value in gw.LSTM(5, 9, 2, seed=1).state_dict().items()}
x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype("float32")
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
shard = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(S(), S(None, "d")), out_specs=out))
loss = lambda p, x: (gj.lstm(p, x)[0] ** 2).sum()
expected = jax.grad(loss)(p, x)
mapped = shard(lambda p, x: gj.lstm(p, x)[0], S(None, "d"))
np.testing.assert_array_equal(mapped(p, x), gj.lstm(p, x)[0])
by_example = shard(lambda p, x: jax.vmap(lambda x: gj.lstm(p, x[:, None])[0][:, 0], 1, 1)(x), S(None, "d"))
outside = [jax.jit(jax.grad(lambda p: (f(p, x) ** 2).sum()))(p) for f in (mapped, by_example)]
for actual in (*outside, shard(jax.grad(loss), S())(p, x)):
    for name in p:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5)
try:
    shard(lambda p, x: loss(p, x), S())(p, x)
except ValueError:
    print("refused: the loss of one device as that of all")
"""


def test_shards():
    """In data parallelism gradients of weights are summed over the devices, as those of any other function."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    if done.stderr.strip() == "no shard_map":
        pytest.skip("this JAX has no jax.shard_map")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused" in done.stdout


@two_cells
def test_debugging_modes_of_jax(cell):
    """Without compilation, with a check for NaN, without rank promotion."""
    layer = make_layer(cell, 5, 9)
    data = make_data(layer, 6, 3)
    with jax.disable_jit():
        assert_same_bits(gradients(jax_function(cell), layer, data), core_gradients(layer, data))
    loss = loss_of(jax_function(cell), data)
    with_nan = {**parameters_of(layer), "bias_ih_l0": jnp.full(layer.parameters["bias_ih_l0"].shape, np.nan, "float32")}
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.grad(loss, has_aux=True)(with_nan, data.x, data.state)
    with jax.numpy_rank_promotion("raise"):
        call = partial(jax_function(cell), lengths=[6, 2, 0])
        variables = (parameters_of(layer), data.x, data.state)
        loss, _ = jax.jvp(lambda *variables: loss_of(call, data)(*variables)[0], variables, variables)
        assert_close(loss, loss_of(call, data)(*variables)[0], "float32")
