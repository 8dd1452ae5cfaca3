"""Bad input: an error that names the argument, what was expected and what came; nothing changes."""

import gatewise as gw
import numpy as np
import pytest
from conftest import assert_same_bits, by_name, make_data, make_layer, make_state, map_state, random

T, B, I, H = 4, 3, 5, 6  # noqa: E741
HUGE = 2**40  # more than any memory holds; huge sizes of layers are in test_process.py
NO_ARRAYS = [None, "text", b"bytes", object(), {}, len, [[1.0, 2.0], [3.0]], {1.0, 2.0}]
X = random((T, B, I), "float32")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


@pytest.fixture
def layer(cell):
    return make_layer(cell, I, H, 2)


def everything(layer):
    """What must not change: the parameters, call_count and the layer's output."""
    return by_name(parameters=layer.state_dict(), count=np.array([layer.call_count], "float64"), y=layer(X)[0])


def everything_of_stream(stream):
    """What must not change: the state and what the stream gives next (asked of a copy)."""
    return by_name(state=stream.state, y=stream.copy().run(zeros(T, *stream_rows(stream), I)))


def stream_rows(stream):
    return () if stream.batch_size is None else (stream.batch_size,)


@pytest.fixture
def refused(layer):
    """refused(error, match, function, *arguments): refused, and layer and arguments stay as they were."""

    def check(error, match, function, *args, **kwargs):
        before, arguments = everything(layer), copies((args, kwargs))
        with pytest.raises(error, match=match):
            function(*args, **kwargs)
        assert_same_bits(everything(layer), before)
        for array, copied in zip(arrays((args, kwargs)), arrays(arguments), strict=True):
            np.testing.assert_array_equal(array, copied)

    return check


def arrays(value):
    """All arrays in nested tuples, lists and dictionaries, but for those that pretend to be huge."""
    if isinstance(value, np.ndarray):
        return [value] if value.size < HUGE else []
    if isinstance(value, dict):
        value = list(value.values())
    return [array for member in value for array in arrays(member)] if isinstance(value, (tuple, list)) else []


def copies(value):
    if isinstance(value, dict):
        return {key: copies(member) for key, member in value.items()}
    if isinstance(value, (tuple, list)):
        return [copies(member) for member in value]
    return value.copy() if arrays(value) else value


# -----------------------------------------------------------------------------------------------------------
# Making a layer


@pytest.mark.parametrize("kind", [gw.LSTM, gw.GRU, gw.RNN])
@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2.5, TypeError),
        (2.0, TypeError),
        ("3", TypeError),
        (None, TypeError),
        (np.array([2, 3]), TypeError),
        (-(2**100), ValueError),
    ],
    ids=str,
)
def test_sizes(kind, name, value, error):
    with pytest.raises(error, match=f"^{name}: "):
        kind(**{"input_size": 3, "hidden_size": 4, name: value})


def test_sizes_may_be_numpy_integers():
    assert gw.GRU(np.int64(3), np.uint8(4), np.int32(2), seed=1).hidden_size == 4


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("dropout", -0.1, ValueError),
        ("dropout", 1.1, ValueError),
        ("dropout", float("nan"), ValueError),
        ("dropout", "0.5", TypeError),
        ("dropout", None, TypeError),
        ("proj_size", -1, ValueError),
        ("proj_size", 4, ValueError),
        ("proj_size", HUGE, ValueError),
        ("proj_size", 1.5, TypeError),
        ("dtype", "float16", (ValueError, TypeError)),
        ("dtype", "int32", (ValueError, TypeError)),
        ("dtype", "complex64", (ValueError, TypeError)),
        ("dtype", "no dtype", (ValueError, TypeError)),
        ("dtype", 3, (ValueError, TypeError)),
        ("dtype", None, (ValueError, TypeError)),
        ("seed", -1, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", "1", TypeError),
    ],
    ids=str,
)
def test_options(name, value, error):
    with pytest.raises(error, match=f"^{name}: "):
        gw.LSTM(3, 4, 2, **{name: value})


@pytest.mark.parametrize(("value", "error"), [("sin", ValueError), ("", ValueError), (None, (TypeError, ValueError))])
def test_nonlinearity(value, error):
    with pytest.raises(error, match=r"^nonlinearity: "):
        gw.RNN(3, 4, nonlinearity=value)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (gw.LSTM, (), {}),
        (gw.LSTM, (3,), {}),
        (gw.LSTM, (3, 4, 1, True), {}),
        (gw.LSTM, (3, 4), {"no_such_option": 1}),
        (gw.LSTM, (3, 4), {"nonlinearity": "relu"}),
        (gw.GRU, (3, 4), {"proj_size": 2}),
        (gw.RNN, (3, 4), {"proj_size": 2}),
    ],
    ids=str,
)
def test_signatures(kind, args, kwargs):
    with pytest.raises(TypeError):
        kind(*args, **kwargs)


OPTIONS = [
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "dtype",
    "seed",
]


@pytest.mark.parametrize("name", [*OPTIONS, "parameters"])
def test_options_are_read_only(layer, name):
    before = everything(layer)
    with pytest.raises(AttributeError):
        setattr(layer, name, 3)
    assert_same_bits(everything(layer), before)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError)])
def test_call_count(layer, value, error):
    layer.call_count = 3
    with pytest.raises(error, match=r"^call_count: "):
        layer.call_count = value
    assert layer.call_count == 3


# -----------------------------------------------------------------------------------------------------------
# x, the state and the gradients

BAD_X = [
    ("scalar", zeros(), ValueError),
    ("one axis", zeros(I), ValueError),
    ("four axes", zeros(1, T, B, I), ValueError),
    ("wrong size", zeros(T, B, I + 1), ValueError),
    ("size 1", zeros(T, B, 1), ValueError),
    ("size 0", zeros(T, B, 0), ValueError),
    ("unbatched, wrong size", zeros(T, I - 1), ValueError),
    ("integers", zeros(T, B, I, dtype="int32"), TypeError),
    ("bools", zeros(T, B, I, dtype="bool"), TypeError),
    ("complex", zeros(T, B, I, dtype="complex64"), TypeError),
    ("objects", zeros(T, B, I, dtype="object"), TypeError),
    ("strings", zeros(T, B, I, dtype="U3"), TypeError),
    ("dates", zeros(T, B, I, dtype="M8[s]"), TypeError),
    ("records", zeros(T, B, I, dtype="f4,f4"), TypeError),
    ("masked integers", np.ma.zeros((T, B, I), "int32"), TypeError),
] + [(f"no array {index}", value, (TypeError, ValueError)) for index, value in enumerate(NO_ARRAYS)]
bad_x = pytest.mark.parametrize(("x", "error"), [pytest.param(x, error, id=name) for name, x, error in BAD_X])


@bad_x
@pytest.mark.parametrize("method", ["__call__", "record"])
def test_x(layer, refused, method, x, error):
    refused(error, "^x: ", getattr(layer, method), x)


def test_message_says_what_came(layer):
    with pytest.raises(ValueError, match=r"^x: expected shape \(T, B, 5\).*, got \(4, 3, 7\)"):
        layer(zeros(T, B, 7))
    with pytest.raises(TypeError, match=r"^x: .*int32"):
        layer(zeros(T, B, I, dtype="int32"))


def test_x_of_a_batch_first_layer(cell):
    layer = make_layer(cell, I, H, batch_first=True)
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, T, 5\).*, got \(4, 3, 7\)"):
        layer(zeros(T, B, 7))


def bad_states(layer):
    """(name, state, error), every member in turn where there are two."""
    good = make_state(layer, B)
    rows, batch, width = (good[0] if isinstance(good, tuple) else good).shape
    members = {
        "few rows": zeros(rows - 1, batch, width),
        "many rows": zeros(rows + 1, batch, width),
        "other batch": zeros(rows, batch + 1, width),
        "batch of one": zeros(rows, 1, width),
        "other width": zeros(rows, batch, width + 1),
        "no axes": zeros(),
        "unbatched": zeros(rows, width),
        "integers": zeros(rows, batch, width, dtype="int64"),
        "bools": zeros(rows, batch, width, dtype="bool"),
        "complex": zeros(rows, batch, width, dtype="complex128"),
        "text": "text",
        "object": object(),
        "huge": np.broadcast_to(np.float32(0), (rows, HUGE, width)),
    }
    if not isinstance(good, tuple):
        return members | {"a pair": (good, good), "empty": ()}
    pairs = {f"h {name}": (bad, good[1]) for name, bad in members.items()}
    pairs |= {f"c {name}": (good[0], bad) for name, bad in members.items()}
    others = {"one array": good[0], "one": good[:1], "three": (*good, good[0]), "empty": (), "number": 3.0}
    return pairs | others | {"stacked": np.stack([*good, good[0]])}


@pytest.mark.parametrize("method", ["__call__", "record"])
def test_state(layer, refused, method):
    for state in bad_states(layer).values():
        refused((TypeError, ValueError), r"^state[^:]*: ", getattr(layer, method), X, state)


def test_state_of_an_unbatched_call(layer, refused):
    refused(ValueError, r"^state[^:]*: ", layer, X[:, 0], make_state(layer, 1))
    refused(ValueError, r"^state[^:]*: ", layer, X, make_state(layer, None))


def test_grad_output(layer):
    data = make_data(layer, T, B)
    expected = layer.record(data.x, data.state).backward(data.grad_output, data.grad_state)
    tape = layer.record(data.x, data.state)
    good = data.grad_output
    bad = [good[1:], good[:, 1:], good[..., 1:], good[:, 0], good[None], good[:, :1], zeros()]
    bad += [good.astype("int32"), good.astype("complex64"), good > 0, "text", object()]
    for grad_output in bad:
        with pytest.raises((TypeError, ValueError), match=r"^grad_output: "):
            tape.backward(grad_output, data.grad_state)
    grads = tape.backward(good, data.grad_state)  # the tape is still there
    assert_same_bits(grads.input, expected.input)
    assert_same_bits(dict(grads.parameters), dict(expected.parameters))


def test_grad_state(layer):
    data = make_data(layer, T, B)
    tape = layer.record(data.x, data.state)
    for grad_state in bad_states(layer).values():
        with pytest.raises((TypeError, ValueError), match=r"^grad_state[^:]*: "):
            tape.backward(data.grad_output, grad_state)
    tape.backward(data.grad_output, data.grad_state)


def test_tape_twice(layer, refused):
    data = make_data(layer, T, B)
    tape = layer.record(data.x, data.state)
    gradients = tape.backward(data.grad_output, data.grad_state, keep=True)
    again = tape.backward(data.grad_output, data.grad_state)
    assert_same_bits(again.input, gradients.input)
    assert_same_bits(again.state, gradients.state)
    assert_same_bits(dict(again.parameters), dict(gradients.parameters))
    for keep in (False, True):
        refused(RuntimeError, "(?i)tape", tape.backward, data.grad_output, data.grad_state, keep=keep)
    assert_same_bits(tape.output, layer(data.x, data.state)[0])


def test_tape_is_read_only(layer):
    tape = layer.record(X)
    for array in arrays((tape.output, tape.state)):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_refused_record_draws_no_masks(cell):
    layer = make_layer(cell, I, H, 2, dropout=0.5)
    with pytest.raises(ValueError, match=r"^x: "):
        layer.record(zeros(T, B, I + 1))
    with pytest.raises((TypeError, ValueError), match=r"^state[^:]*: "):
        layer.record(X, zeros(1))
    assert layer.call_count == 0


# -----------------------------------------------------------------------------------------------------------
# out


def bad_outs(shape, overlapping):
    """(out, error) by name, for a result of this shape in float32; `overlapping` overlap an argument."""
    good = np.full(shape, 7, "float32")
    read_only = good.copy()
    read_only.flags.writeable = False
    backwards = (slice(None, None, -1),) * len(shape)
    bad = {
        "read-only": (read_only, ValueError),
        "strided": (np.full((*shape[:-1], 2 * shape[-1]), 7, "float32")[..., ::2], ValueError),
        "negative strides": (good.copy()[backwards], ValueError),
        "too few steps": (good[1:].copy(), ValueError),
        "too many steps": (np.concatenate([good, good[:1]]), ValueError),
        "another axis": (good[None].copy(), ValueError),
        "flat": (good.ravel()[:-1].copy(), ValueError),
        "broadcast": (np.broadcast_to(np.float32(7), shape), ValueError),
        "float64": (good.astype("float64"), TypeError),
        "float16": (good.astype("float16"), TypeError),
        "integers": (good.astype("int32"), TypeError),
        "byte-swapped": (good.astype(good.dtype.newbyteorder()), TypeError),
        "list": (good.tolist(), TypeError),
        "text": ("text", TypeError),
        "object": (object(), TypeError),
        "memoryview": (memoryview(good.copy()), TypeError),
        "bytearray": (bytearray(good.nbytes), TypeError),
    }
    turned = np.zeros(shape[::-1], "float32").T
    if not turned.flags.c_contiguous:
        bad["transposed"] = (turned, ValueError)
    if len(shape) > 1:
        bad["too narrow"] = (good[..., 1:].copy(), ValueError)
    return bad | {f"overlap {index}": (value, ValueError) for index, value in enumerate(overlapping)}


def test_out(layer, refused):
    shape = (T, B, H)
    memory = random(3 * T * B * H, "float32")
    x = memory[: X.size].reshape(X.shape)
    over_x = [memory[start : start + T * B * H].reshape(shape) for start in (0, 1, X.size - 1)]
    for out, error in bad_outs(shape, over_x).values():
        refused(error, "^out: ", layer, x, out=out)


def test_out_over_the_state(layer, refused):
    """Each member of the state in turn lies in the memory that out also has."""
    size = 2 * B * H  # of a member: two layers
    memory = random(T * B * H + size, "float32")
    out = memory[: T * B * H].reshape(T, B, H)
    for start in (0, 5, T * B * H - 1):
        inside = memory[start : start + size].reshape(2, B, H)
        good = make_state(layer, B)
        states = [(inside, good[1]), (good[0], inside)] if isinstance(good, tuple) else [inside]
        for state in states:
            refused(ValueError, "^out: ", layer, X, state, out=out)


def test_x_must_fit_exactly_with_out(layer, refused):
    """With out nothing is converted."""
    out = np.full((T, B, H), 7, "float32")
    others = [X.astype("float64"), X.astype("float16"), X.astype(X.dtype.newbyteorder()), X.astype("int32")]
    for x in [*others, X.tolist(), "text", memoryview(X)]:
        refused(TypeError, "^x: ", layer, x, out=out)
    for x in [X[..., 1:], X[0, 0], X[None]]:
        refused(ValueError, "^x: ", layer, x, out=out)


@pytest.mark.parametrize("turn", [np.asfortranarray, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]])
def test_strided_x_with_out(layer, turn):
    """Either is right: the result, or a refusal after which `out` is unchanged."""
    out = np.full((T, B, H), 7, "float32")
    try:
        layer(turn(X), out=out)
    except ValueError:
        assert (out == 7).all()
    else:
        assert_same_bits(out, layer(X)[0])


def test_out_of_other_bad_calls_is_left_alone(layer, refused):
    out = np.full((T, B, H), 7, "float32")
    refused(ValueError, "^x: ", layer, zeros(T, B, I + 1), out=out)
    refused((TypeError, ValueError), r"^state[^:]*: ", layer, X, zeros(1), out=out)


# -----------------------------------------------------------------------------------------------------------
# Parameters


def bad_values(good):
    other = [
        good[1:],
        good[None],
        good.T[1:].T,
        zeros(),
        good.astype("int32"),
        good.astype("complex64"),
        good > 0,
    ]
    return [*other, *(value for value in NO_ARRAYS)]


def test_assigning_a_parameter(layer, refused):
    for name, good in layer.state_dict().items():
        for value in bad_values(good):
            refused((TypeError, ValueError), f"^{name}: ", layer.parameters.__setitem__, name, value)


def test_unknown_parameter(layer, refused):
    assert "weight_xx_l0" not in layer.parameters
    refused(KeyError, "weight_xx_l0", layer.parameters.__getitem__, "weight_xx_l0")
    refused((KeyError, ValueError), "weight_xx_l0", layer.parameters.__setitem__, "weight_xx_l0", zeros(3))
    refused((KeyError, ValueError, TypeError), "3", layer.parameters.__setitem__, 3, zeros(3))
    refused((KeyError, ValueError), "weight_xx_l0", layer.parameters.update, {"weight_xx_l0": zeros(3)})


def test_parameters_are_read_only(layer):
    for value in layer.parameters.values():
        with pytest.raises(ValueError, match="read-only"):
            value[...] = 0
    with pytest.raises((TypeError, AttributeError)):
        del layer.parameters["weight_ih_l0"]


def test_update_is_all_or_nothing(layer, refused):
    good = {name: np.ones_like(value) for name, value in layer.parameters.items()}
    last = list(good)[-1]
    for value in bad_values(good[last]):
        refused((TypeError, ValueError), f"^{last}: ", layer.parameters.update, good | {last: value})
    refused((KeyError, ValueError), "weight_xx_l0", layer.parameters.update, good | {"weight_xx_l0": zeros(3)})


def test_load_state_dict(layer, refused):
    good = {name: np.ones_like(value) for name, value in layer.parameters.items()}
    last = list(good)[-1]
    missing = {name: value for name, value in good.items() if name != last}
    refused(ValueError, last, layer.load_state_dict, missing)
    refused(ValueError, "weight_xx_l0", layer.load_state_dict, good | {"weight_xx_l0": zeros(3)})
    refused(ValueError, "weight_ih_l0", layer.load_state_dict, {})
    for value in bad_values(good[last]):
        refused((TypeError, ValueError), last, layer.load_state_dict, good | {last: value})
    for value in (None, 3, "text", [1, 2], X):
        refused((TypeError, ValueError), r"^\w+: ", layer.load_state_dict, value)
        refused((TypeError, ValueError), r"^\w+: ", layer.parameters.update, value)


def test_edit_is_all_or_nothing(layer, refused):
    def spoil(name, value):
        with layer.edit() as parameters:
            parameters["weight_ih_l0"] += 1
            parameters[name] = value

    def fail():
        with layer.edit() as parameters:
            for name in parameters:
                parameters[name] *= 2
            raise ZeroDivisionError

    for value in bad_values(layer.state_dict()["weight_hh_l1"]):
        refused((TypeError, ValueError), "^weight_hh_l1: ", spoil, "weight_hh_l1", value)
    refused((KeyError, ValueError), "weight_xx_l0", spoil, "weight_xx_l0", zeros(3))
    refused(ZeroDivisionError, None, fail)


# -----------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture(params=[None, 1, B], ids="B{}".format)
def stream(layer, request):
    stream = layer.stream(request.param)
    stream.run(random((T, *stream_rows(stream), I), "float32"))
    return stream


@pytest.fixture
def stream_refuses(stream):
    def check(error, match, function, *args, **kwargs):
        before, arguments = everything_of_stream(stream), copies((args, kwargs))
        with pytest.raises(error, match=match):
            function(*args, **kwargs)
        assert_same_bits(everything_of_stream(stream), before)
        for array, copied in zip(arrays((args, kwargs)), arrays(arguments), strict=True):
            np.testing.assert_array_equal(array, copied)

    return check


def test_stream_of_a_bidirectional_layer(cell):
    with pytest.raises(ValueError, match="bidirectional"):
        make_layer(cell, I, H, bidirectional=True).stream()


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.5, TypeError), ("2", TypeError), (X, TypeError)],
    ids=["negative", "fraction", "text", "array"],
)
def test_batch_size(layer, refused, value, error):
    refused(error, "^batch_size: ", layer.stream, value)


def bad_steps(rows):
    """Bad input for axes (*rows, I)."""
    bad = [
        zeros(),
        zeros(*rows, I + 1),
        zeros(*rows, 1),
        zeros(7, *rows, I),
        zeros(2, 2, *rows, I),
        zeros(1, 1, 1, 1, I),
    ]
    bad += [zeros(*rows, I, dtype=dtype) for dtype in ("int32", "bool", "complex64", "object", "U3", "M8[s]")]
    return bad + NO_ARRAYS


def test_step(stream, stream_refuses):
    for x in bad_steps(stream_rows(stream)):
        stream_refuses((TypeError, ValueError), "^x: ", stream.step, x)


def test_step_of_another_batch(layer):
    for batch, shape in [(None, (1, I)), (1, (I,)), (3, (I,)), (3, (1, I)), (3, (4, I)), (1, (0, I))]:
        with pytest.raises(ValueError, match=r"^x: "):
            layer.stream(batch).step(zeros(*shape))


def test_step_into_out(stream, stream_refuses):
    rows = stream_rows(stream)
    memory = random(2 * B * (H + I), "float32")
    size = int(np.prod(rows, dtype=int))
    x = memory[: size * I].reshape(*rows, I)
    over_x = [memory[start : start + size * H].reshape(*rows, H) for start in (0, 1, size * I - 1)]
    for out, error in bad_outs((*rows, H), over_x).values():
        stream_refuses(error, "^out: ", stream.step, x, out)
    out = np.full((*rows, H), 7, "float32")
    exact = [
        x.astype("float64"),
        x.astype("float16"),
        x.astype(x.dtype.newbyteorder()),
        x.astype("int32"),
        x.tolist(),
    ]
    for other in exact:
        stream_refuses(TypeError, "^x: ", stream.step, other, out)
    for other in (x[..., 1:], x[None], zeros(), zeros(*rows, I + 1)):
        stream_refuses(ValueError, "^x: ", stream.step, other, out)
    for other in (np.repeat(x, 2, axis=-1)[..., ::2], x[..., ::-1].copy()[..., ::-1]):
        accepted_or_refused(stream, other, out)


def accepted_or_refused(stream, x, out):
    """A strided x with `out`: the result, or a refusal after which `out` is unchanged."""
    expected = stream.copy().step(x.copy())
    out[...] = 7
    try:
        stream.step(x, out)
    except ValueError:
        assert (out == 7).all()
    else:
        assert_same_bits(out, expected)


def test_step_needs_its_arguments(stream, stream_refuses):
    x = zeros(*stream_rows(stream), I)
    out = np.full((*stream_rows(stream), H), 7, "float32")
    stream_refuses(TypeError, None, stream.step)
    stream_refuses(TypeError, None, stream.step, x, out, out)
    stream_refuses(TypeError, None, stream.step, x, out, no_such_argument=1)
    if hasattr(type(stream), "step"):
        stream_refuses(TypeError, None, type(stream).step)
        stream_refuses((TypeError, AttributeError), None, type(stream).step, None, x, out)
        stream_refuses((TypeError, AttributeError), None, type(stream).step, x, x, out)


def test_run(stream, stream_refuses):
    rows = stream_rows(stream)
    for x in bad_steps((T, *rows)):
        stream_refuses((TypeError, ValueError), r"^(x|block): ", stream.run, x)
    x = zeros(T, *rows, I)
    memory = random(x.size + T * B * H, "float32")
    block = memory[: x.size].reshape(x.shape)
    size = x.size // I * H
    over = [memory[start : start + size].reshape(T, *rows, H) for start in (0, 1, x.size - 1)]
    for out, error in bad_outs((T, *rows, H), over).values():
        stream_refuses(error, "^out: ", stream.run, block, out)
    out = np.full((T, *rows, H), 7, "float32")
    for other in [x.astype("float64"), x.astype("float16"), x.astype(x.dtype.newbyteorder()), x.tolist()]:
        stream_refuses(TypeError, r"^(x|block): ", stream.run, other, out)


def test_state_of_a_stream(layer, stream, stream_refuses):
    good = stream.state
    bad = [
        map_state(lambda s: s[1:], good),
        map_state(lambda s: s[..., 1:], good),
        map_state(lambda s: s[None], good),
    ]
    bad += [map_state(lambda s, dtype=dtype: s.astype(dtype), good) for dtype in ("int32", "bool", "complex64")]
    bad += ["text", object(), 3.0, (), (zeros(1), zeros(1), zeros(1))]
    bad += [good[0], (good[0], good[1][1:]), (good[0], None, None)] if isinstance(good, tuple) else [(good, good)]
    for state in bad:
        stream_refuses((TypeError, ValueError), r"^state[^:]*: ", setattr, stream, "state", state)


def test_batch_size_is_read_only(stream, stream_refuses):
    stream_refuses(AttributeError, None, setattr, stream, "batch_size", 3)


# -----------------------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("name", ["no-such-backend", "", None, 3])
def test_use_backend(name):
    before = gw.backend()
    with pytest.raises((TypeError, ValueError), match=r"^name: "):
        gw.use_backend(name)
    assert gw.backend() == before


def test_unknown_backend_is_told_the_known_ones():
    with pytest.raises(ValueError, match="no-such-backend") as caught:
        gw.use_backend("no-such-backend")
    for name in gw.backends():
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (2**100, ValueError),
    ],
)
def test_set_num_threads(value, error):
    before = gw.get_num_threads()
    with pytest.raises(error, match=r"^n: "):
        gw.set_num_threads(value)
    assert gw.get_num_threads() == before


def test_check_sees_a_change(layer):
    """The check of this file itself: it sees a change."""
    before = everything(layer)
    layer.parameters["weight_ih_l0"] = layer.parameters["weight_ih_l0"] + 1
    with pytest.raises(AssertionError):
        assert_same_bits(everything(layer), before)


# -----------------------------------------------------------------------------------------------------------
# Lengths, resets, checkpoints, traces


BAD_LENGTHS = {
    "above T": ([4, 5, 1], ValueError, "from 0 to 4 .T., got 5"),
    "negative": ([4, -1, 1], ValueError, "from 0 to 4 .T., got -1"),
    "too few": ([4, 1], ValueError, r"expected shape \(3,\), got \(2,\)"),
    "too many": ([4, 1, 1, 1], ValueError, r"got \(4,\)"),
    "two axes": ([[4, 1, 1]], ValueError, r"got \(1, 3\)"),
    "a number": (3, ValueError, r"got \(\)"),
    "fractions": ([4.0, 1.0, 1.0], TypeError, "got float64"),
    "bools": ([True, False, True], TypeError, "got bool"),
    "text": ("abc", TypeError, "expected whole numbers"),
    "object": (object(), TypeError, "expected whole numbers"),
    "uneven": ([[1, 2], [3]], ValueError, "uneven"),
    "no text": (np.empty(0, "U1"), TypeError, "got <U1"),
    "no complex": (np.empty(0, complex), TypeError, "got complex128"),
    "unsigned and huge": (np.array([2**64 - 1, 0, 0], np.uint64), ValueError, f"got {2**64 - 1}"),
}
BAD_RESETS = {
    "transposed": (zeros(B, T), ValueError, r"expected shape \(4, 3\), got \(3, 4\)"),
    "one axis": (zeros(T), ValueError, r"got \(4,\)"),
    "a step too many": (zeros(T + 1, B), ValueError, r"got \(5, 3\)"),
    "two": (np.full((T, B), 2), ValueError, "got 2"),
    "a half": (np.full((T, B), 0.5), ValueError, "got 0.5"),
    "nan": (np.full((T, B), np.nan), ValueError, "got nan"),
    "complex": (zeros(T, B, dtype="complex64"), TypeError, "got complex64"),
    "text": ("abc", TypeError, "expected bools"),
    "object": (object(), TypeError, "expected bools"),
    "nothing": (np.empty(0, "V4"), TypeError, "got .V4"),
}


@pytest.mark.parametrize("method", ["__call__", "record", "trace"])
def test_lengths_and_resets(layer, refused, method):
    for lengths, error, match in BAD_LENGTHS.values():
        refused(error, f"^lengths: .*{match}", getattr(layer, method), X, lengths=lengths)
    for resets, error, match in BAD_RESETS.values():
        refused(error, f"^resets: .*{match}", getattr(layer, method), X, resets=resets)
    refused(ValueError, "^state", getattr(layer, method), X, make_state(layer, B + 1), lengths=[1, 2, 3])


def test_lengths_leave_out_alone(layer):
    out = np.full((T, B, H), 7, "float32")
    for options in ({"lengths": [5, 1, 1]}, {"resets": zeros(T)}):
        with pytest.raises(ValueError, match=r"^(lengths|resets): "):
            layer(X, out=out, **options)
    assert (out == 7).all()


def test_axes_of_lengths_and_resets(cell):
    layer = make_layer(cell, I, H, batch_first=True)
    x = X.swapaxes(0, 1)
    with pytest.raises(ValueError, match=r"^resets: expected shape \(3, 4\), got \(4, 3\)"):
        layer(x, resets=zeros(T, B))
    with pytest.raises(ValueError, match=r"^lengths: expected shape \(\), got \(1,\)"):
        layer(x[0], lengths=[2])
    with pytest.raises(ValueError, match=r"^resets: expected shape \(4,\), got \(4, 1\)"):
        layer(x[0], resets=zeros(T, 1))


@pytest.mark.parametrize(
    ("every", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)],
    ids=str,
)
def test_checkpoint_every(layer, refused, every, error):
    refused(error, "^checkpoint_every: ", layer.record, X, checkpoint_every=every)


def test_resets_of_streams(cell):
    layer = make_layer(cell, I, H, 2)
    stream, single = layer.stream(B), layer.stream()
    for target, x in ((stream, X), (single, X[:, 0])):
        target.run(x)
        before = everything_of_stream(target)
        flags = [zeros(B + 1), zeros(B, 1), np.full(B, 2), "abc", np.full(B, np.nan)]
        for resets in flags if target is stream else [zeros(1), 2, "abc", np.nan]:
            for out in (None, np.empty((*stream_rows(target), H), "float32")):
                with pytest.raises((TypeError, ValueError), match=r"^resets: "):
                    target.step(x[0], out, resets=resets)
            with pytest.raises((TypeError, ValueError), match=r"^resets: "):
                target.run(x, resets=resets)
        with pytest.raises(ValueError, match=r"^x: "):
            target.step(X[0, 0, 1:], resets=np.ones(stream_rows(target), bool))
        with pytest.raises(TypeError, match=r"^step: "):
            target.step(x[0], None, None)
        assert_same_bits(everything_of_stream(target), before)


def test_rows_to_reset(cell):
    layer = make_layer(cell, I, H)
    stream, single = layer.stream(B), layer.stream()
    stream.run(X)
    before = everything_of_stream(stream)
    bad = [
        ([0, 0, 1], ValueError),
        (np.empty(0, "U1"), TypeError),
        (3, ValueError),
        (-4, ValueError),
        ([0, 3], ValueError),
        ([[0]], ValueError),
        ([0.5], TypeError),
    ]
    bad += [("a", TypeError), (np.ones(2, bool), ValueError), (np.ones((B, 1), bool), ValueError)]
    for rows, error in bad:
        with pytest.raises(error, match=r"^rows: "):
            stream.reset(rows)
    with pytest.raises(ValueError, match=r"^rows: "):
        single.reset([0])
    assert_same_bits(everything_of_stream(stream), before)


def test_gates(layer):
    for name in ("forgot", "", 3, None, np.array(["a", "b"])):
        with pytest.raises(ValueError, match=r"^name: expected '"):
            layer.gate(name)


def test_input_gradient(layer, refused):
    for step, error in [(T, ValueError), (-T - 1, ValueError), (1.0, TypeError), (None, TypeError)]:
        refused(error, "^step: ", layer.input_gradient, X, step)
    for unit, error in [(H, ValueError), (-H - 1, ValueError), (0.5, TypeError)]:
        refused(error, "^unit: ", layer.input_gradient, X, 0, unit=unit)
    with pytest.raises(ValueError, match=r"^step: expected a step of the sequence, which has none"):
        layer.input_gradient(X[:0], 0)


@pytest.mark.parametrize(
    ("sequences", "error", "match"),
    [
        ([], ValueError, "^sequences: expected at least one array"),
        (3, TypeError, "^sequences: expected several arrays"),
        (np.array(5.0), TypeError, "^sequences: expected several arrays"),
        ("text", TypeError, "^sequences: "),
        ([zeros(3, 2), zeros(3, 3)], ValueError, r"^sequences\[1\]: expected shape \(T, 2\), got \(3, 3\)"),
        ([zeros(3, 2), zeros(3)], ValueError, r"^sequences\[1\]: "),
        ([zeros()], ValueError, r"^sequences\[0\]: "),
        ([zeros(3), zeros(3, dtype="float64")], TypeError, r"^sequences\[1\]: expected float32 .*, got float64"),
    ],
    ids=str,
)
def test_pad(sequences, error, match):
    with pytest.raises(error, match=match):
        gw.pad(sequences)


def test_unpad():
    for lengths, error, match in BAD_LENGTHS.values():
        with pytest.raises(error, match=f"^lengths: .*{match}"):
            gw.unpad(X, lengths)
    with pytest.raises(ValueError, match=r"^x: expected shape \(T, B, ...\), got \(4,\)"):
        gw.unpad(zeros(4), [1])
    with pytest.raises(TypeError, match=r"^batch_first: "):
        gw.unpad(X, [1, 1, 1], batch_first=1)
