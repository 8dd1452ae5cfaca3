"""gatewise.jax against a scan written with jax.numpy, against the layers bit for bit, and with bad input."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gatewise as gw
import numpy as np
import pytest
from conftest import CELLS, DTYPES, make_data, make_layer, random
from tolerances import assert_close

jax = pytest.importorskip("jax")
import gatewise.jax as gj  # noqa: E402 - needs jax
import jax.numpy as jnp  # noqa: E402
from gatewise.jax.functions import architecture_of  # noqa: E402
from gatewise.jax.options import Options  # noqa: E402
from gatewise.jax.primitives import byte_array, pack  # noqa: E402
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
)

REPOSITORY = Path(__file__).parents[3]
pytestmark = ignore_copy_warning

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
    actual = jax.jit(lambda: gradients(jax_function(cell), layer, data))()
    expected = jax.jit(lambda: gradients(partial(scanned, cell), layer, data))()
    outputs = len(members(data.state)) + 1
    assert_close(actual[:outputs], expected[:outputs], dtype)
    assert_close(actual[outputs:], expected[outputs:], f"{dtype}_gradient")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("extras", "checkpoint_every"), [("", None), ("lengths", 3), ("resets", None), ("lengths, resets", 4)]
)
def test_same_bits_as_the_layer(cell, dtype, extras, checkpoint_every):
    layer = make_layer(cell, 5, 19, num_layers=2, bidirectional=True, dtype=dtype)
    data = make_data(layer, 9, 4)
    options = {"checkpoint_every": checkpoint_every} if checkpoint_every else {}
    if "lengths" in extras:
        options["lengths"] = np.array([3, 8, 0, 5])
    if "resets" in extras:
        options["resets"] = np.random.default_rng(3).random((9, 4)) < 0.3
    expected = core_gradients(layer, data, **options)
    actual = jax.jit(partial(gradients, partial(jax_function(cell), **options), layer, data))()
    assert_same_bits(actual, expected)
    y, state = jax_function(cell)(layer.state_dict(), data.x, data.state, **options)  # without jit, on NumPy arrays
    assert_same_bits([y, *members(state)], expected[: 1 + len(members(state))])


@two_cells
def test_gradients_outside_of_jit(cell):
    layer = make_layer(cell, 5, 9)
    data = make_data(layer, 6, 3)
    assert_same_bits(gradients(jax_function(cell), layer, data), core_gradients(layer, data))


@pytest.mark.parametrize("lengths", [None, [4, 6, 0]])
def test_layouts(cell, lengths):
    """batch_first, unbatched, and no state at all."""
    layer = make_layer(cell, 5, 9, num_layers=2)
    x, p = random((6, 3, 5), "float32"), parameters_of(layer)
    options = {} if lengths is None else {"lengths": lengths}
    resets = random((6, 3), "float32") > 0.8
    y, state = jax_function(cell)(p, x, resets=resets, **options)
    y_expected, state_expected = layer(x, resets=resets, **options)
    assert_same_bits([y, *members(state)], [y_expected, *members(state_expected)])
    y, state = jax_function(cell)(p, x.swapaxes(0, 1), batch_first=True, resets=resets.T, **options)
    assert_same_bits([y.swapaxes(0, 1), *members(state)], [y_expected, *members(state_expected)])
    for row in range(3):
        options = {"lengths": np.int64(lengths[row])} if lengths else {}
        y, state = jax_function(cell)(p, x[:, row], resets=resets[:, row], **options)
        state_of_row = [part[:, row] for part in members(state_expected)]
        assert_same_bits([y, *members(state)], [y_expected[:, row], *state_of_row])


def test_steps_after_the_end_of_a_row_do_not_matter(cell):
    layer = make_layer(cell, 5, 9, bidirectional=True)
    data = make_data(layer, 6, 3)
    lengths = np.array([2, 4, 0])
    after_end = np.arange(6)[:, None] >= lengths

    def results_for(x):
        return gradients(partial(jax_function(cell), lengths=lengths), layer, data._replace(x=x))

    results = results_for(np.where(after_end[..., None], np.float32(np.nan), data.x))
    assert_same_bits(results, results_for(data.x))
    assert not np.asarray(results[0])[4:].any()
    grad_x = np.asarray(results[1 + len(members(data.state))])
    assert not grad_x[after_end].any()


def test_lengths_and_resets_may_be_traced(cell):
    layer = make_layer(cell, 5, 9)
    x, p = random((6, 3, 5), "float32"), parameters_of(layer)
    call = jax.jit(lambda x, lengths, resets: jax_function(cell)(p, x, lengths=lengths, resets=resets))
    resets = random((6, 3), "float32") > 0.7
    for lengths in ([1, 2, 3], [6, 0, 5], [0, 0, 0]):
        y, state = call(x, np.array(lengths), resets)
        y_expected, state_expected = layer(x, lengths=lengths, resets=resets)
        assert_same_bits([y, *members(state)], [y_expected, *members(state_expected)])
    for length in (-1, 7):
        with pytest.raises(Exception, match=rf"lengths: expected numbers from 0 to 6 \(T\), got {length}"):
            jax.block_until_ready(call(x, np.array([1, length, 3]), resets))
    for lengths in (np.array([1, 2**32 + 3, 0]), np.array([-(2**32), 1, 2]), np.array([1, 2**64 - 1, 2], np.uint64)):
        with pytest.raises(Exception, match="lengths: expected numbers from 0 to 6"):
            jax.block_until_ready(call(x, lengths, resets))


@two_cells
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0), (1, 1)])
def test_sizes_of_zero_and_one(cell, steps, batch):
    layer = make_layer(cell, 5, 9, num_layers=2)
    data = make_data(layer, steps, batch)
    assert_same_bits(gradients(jax_function(cell), layer, data), core_gradients(layer, data))


@two_cells
def test_gradients_of_some_arrays(cell):
    """Gradients with respect to one weight or only the state, and gradients of only the last state."""
    layer = make_layer(cell, 5, 9, num_layers=2, bidirectional=True, dtype="float64")
    data = make_data(layer, 6, 3)
    p = parameters_of(layer)
    loss = loss_of(jax_function(cell), data)
    (grad_p, grad_x, grad_state), _ = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(p, data.x, data.state)
    for name in ("weight_hh_l0", "bias_ih_l1_reverse"):
        grad = jax.grad(lambda w, name=name: loss({**p, name: w}, data.x, data.state)[0])(p[name])
        assert_same_bits([grad], [grad_p[name]])
    grad = jax.grad(lambda state: loss(p, data.x, state)[0])(data.state)
    assert_same_bits(members(grad), members(grad_state))
    grad = jax.grad(lambda x: loss(p, x, data.state)[0])(data.x)
    assert_same_bits([grad], [grad_x])

    def sum_of_last_state(call, x):
        return sum(part.sum() for part in members(call(p, x, data.state)[1]))

    actual = jax.grad(partial(sum_of_last_state, jax_function(cell)))(data.x)
    expected = jax.grad(partial(sum_of_last_state, partial(scanned, cell)))(data.x)
    assert_close(actual, expected, "float64_gradient")
    zero = jax.grad(lambda x: jax.lax.stop_gradient(jax_function(cell)(p, x)[0]).sum() + 0 * x.sum())(data.x)
    assert not np.asarray(zero).any()


# ---- the core


@two_cells
def test_threads_do_not_change_bits(cell, use_threads):
    layer = make_layer(cell, 20, 40, num_layers=2, bidirectional=True)
    data = make_data(layer, 12, 23)
    results = []
    for threads in (1, 2):
        use_threads(threads)
        results.append(jax.jit(lambda: gradients(jax_function(cell), layer, data))())
    assert_same_bits(*results)


def test_programs_at_once():
    layer = make_layer("lstm", 20, 40)
    p, x = parameters_of(layer), random((30, 8, 20), "float32")
    call = jax.jit(jax.grad(lambda p, x: (gj.lstm(p, x)[0] ** 2).sum()))
    expected = [call(p, x * i) for i in range(4)]
    actual = [None] * 4

    def work(i):
        for _ in range(10):
            actual[i] = jax.block_until_ready(call(p, x * i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual_grads, expected_grads in zip(actual, expected, strict=True):
        assert_same_bits(actual_grads.values(), expected_grads.values())


def test_a_program_keeps_its_backend():
    """Forward, tape and backward use the same backend, even if another one is chosen between them."""
    layer = make_layer("lstm", 5, 19)
    data = make_data(layer, 6, 3)
    before = gw.backend()
    y, transposed = jax.vjp(lambda x: gj.lstm(layer.state_dict(), x, data.state)[0], data.x)
    try:
        for name in gw.backends():
            gw.use_backend(name)
            (grad_x,) = transposed(data.grad_output)
            gw.use_backend(before)
            tape = layer.record(data.x, data.state)
            assert_same_bits([y, grad_x], [tape.output, tape.backward(data.grad_output).input])
    finally:
        gw.use_backend(before)


# The handlers are open to any program: wrong sizes and foreign bytes are an error, not a crash.


@pytest.fixture
def handler_call():
    """An LSTM and what is valid to hand to the handlers for it."""
    layer = make_layer("lstm", 5, 9)
    weights = parameters_of(layer)
    shapes = tuple((name, value.shape) for name, value in weights.items())
    architecture = architecture_of("lstm", np.dtype("float32"), shapes)
    options = Options(architecture, False, False, False, 0, gw.backend())
    packed_bytes, tape_bytes = options.packed_and_tape_bytes(4, 2)
    return SimpleNamespace(
        layer=layer,
        x=jnp.ones((4, 2, 5), "float32"),
        h=jnp.zeros((1, 2, 9), "float32"),
        weights=list(weights.values()),
        options=options,
        packed_bytes=packed_bytes,
        packed=pack(options, list(weights.values())),
        tape=jnp.zeros(tape_bytes, "uint8"),
    )


def assert_refused(target, results, *operands, **attributes):
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        jax.block_until_ready(jax.ffi.ffi_call(f"gatewise_{target}", results)(*operands, **attributes))


def test_wrong_calls_of_pack_are_refused(handler_call):
    weights = handler_call.weights
    results = byte_array(handler_call.packed_bytes)
    attributes = handler_call.options.attributes(weights_only=True)
    assert_refused("pack", results, *weights[:-1], **attributes)
    assert_refused("pack", results, *weights, handler_call.x, **attributes)
    assert_refused("pack", byte_array(handler_call.packed_bytes - 64), *weights, **attributes)
    assert_refused("pack", results, weights[0][:-1], *weights[1:], **attributes)
    assert_refused("pack", results, *weights, **{**attributes, "backend": "abacus"})
    assert_refused("pack", results, *weights, **{**attributes, "cell": "abacus"})
    for numbers in (np.zeros(11, np.int64), np.full(11, -1), np.ones(3, np.int64)):
        assert_refused("pack", results, *weights, **{**attributes, "numbers": numbers})
    assert_refused("pack", results, *weights)
    empty = jnp.zeros(0, "float32")
    for sizes in ([2**62, 2**62, 0, 1, 1, 0], [5, 9, 0, 2**33, 1, 0], [1, 1, 0, 2**30, 2, 0], [2**31, 1, 0, 1, 1, 0]):
        numbers = np.array([*sizes, 0, 0, 0, 0, 0])
        assert_refused("pack", results, empty, empty, **{**attributes, "numbers": numbers})


def test_wrong_calls_of_forward_are_refused(handler_call):
    x, h, packed, options = handler_call.x, handler_call.h, handler_call.packed, handler_call.options
    results, attributes = options.result_shapes(x), options.attributes()
    assert_refused("forward", results, x, h, h, jnp.zeros(handler_call.packed_bytes, "uint8"), **attributes)
    assert_refused("forward", results, x, h, h, packed[:-64], **attributes)
    assert_refused("forward", results, x, h, packed, **attributes)
    assert_refused("forward", results, x[..., :4], h, h, packed, **attributes)
    assert_refused("forward", results, x[0], h, h, packed, **attributes)
    assert_refused("forward", results, x, h[..., :4], h, packed, **attributes)
    assert_refused("forward", results, x, h.astype("float64"), h, packed, **attributes)
    assert_refused("forward", results[:1], x, h, h, packed, **attributes)
    assert_refused("forward", [*results, byte_array(64)], x, h, h, packed, **options.attributes(record=True))


def test_wrong_calls_of_backward_are_refused(handler_call):
    x, h, packed, tape = handler_call.x, handler_call.h, handler_call.packed, handler_call.tape
    options = handler_call.options
    results = options.gradient_shapes([x, h, h, *handler_call.weights], (True, True))
    attributes = {**options.attributes(), "given": np.array([1, 0, 0]), "wanted": np.array([1, 1])}
    y = jnp.asarray(handler_call.layer(np.asarray(x))[0])
    assert_refused("backward", results[:-1], x, h, h, y, tape, y, packed, **attributes)
    assert_refused("backward", results, x, h, h, y, tape, packed, **attributes)
    assert_refused("backward", results, x, h, h, y, packed, **attributes)
    assert_refused("backward", results, x, h, h, y, tape, y, packed, **{**attributes, "given": np.array([1, 0])})
    assert_refused("backward", results, x, h, h, y, tape, y, packed, **{**attributes, "wanted": np.array([1])})
    # Bytes that are not a tape are as good as none: the core records again.
    recorded = handler_call.layer.record(np.asarray(x))
    grads = recorded.backward(np.asarray(y))
    for foreign in (tape, tape[:0], tape[:64], tape + 1):
        actual = jax.ffi.ffi_call("gatewise_backward", results)(x, h, h, y, foreign, y, packed, **attributes)
        assert_same_bits(actual, [grads.input, *grads.state, *grads.parameters.values()])


# Each struct of the core's interface to XLA: the struct of XLA's header, and the fields of both.
XLA_STRUCTS = {
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
XLA_DTYPES = [
    ("boolean", "PRED"),
    ("int32", "S32"),
    ("int64", "S64"),
    ("uint8", "U8"),
    ("float32", "F32"),
    ("float64", "F64"),
]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_interface_to_xla(tmp_path):
    """Compare each offset and constant that the handlers rely on with XLA's own header."""
    checks = [
        f"static_assert(offsetof({ours}, {our_field}) == offsetof({theirs}, {their_field}));"
        f"static_assert(sizeof({ours}::{our_field}) == sizeof({theirs}::{their_field}));"
        for ours, (theirs, fields) in XLA_STRUCTS.items()
        for our_field, their_field in fields.items()
        if (our_field, their_field) != ("version", "api_version") or ours == "Api"
    ]
    checks += [f"static_assert(int(DataType::{ours}) == XLA_FFI_DataType_{theirs});" for ours, theirs in XLA_DTYPES]
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


def bad_call(name, **changes):
    return pytest.param(changes.pop("match"), changes.pop("error", ValueError), changes, id=name)


@pytest.mark.parametrize(
    ("match", "error", "changes"),
    [
        bad_call("axes", x=np.zeros(5, "f"), match=r"x: expected shape \(T, B, 5\) or \(T, 5\), got \(5,\)"),
        bad_call("width", x=np.zeros((4, 2, 6), "f"), match=r"x: expected shape \(T, B, 5\)"),
        bad_call(
            "integers", x=np.zeros((4, 2, 5), int), match="x: expected float32 or float64, got int", error=TypeError
        ),
        bad_call("not an array", x="x", match="x: expected float32 or float64, got <U1", error=TypeError),
        bad_call("dtypes", x=np.zeros((4, 2, 5)), match="weight_ih_l0: expected float64 as x", error=TypeError),
        bad_call("not a mapping", parameters=[1], match="parameters: expected a mapping", error=TypeError),
        bad_call("no parameters", parameters={}, match="parameters: expected weight_ih_l0 among them, got none"),
        bad_call("state", state=np.zeros((1, 2, 9), "f"), match="state: expected a pair", error=TypeError),
        bad_call("three states", state=(1.0, 2.0, 3.0), match="state: expected a pair", error=TypeError),
        bad_call(
            "state's shape", state=(np.zeros((1, 3, 9), "f"),) * 2, match=r"state\[0\]: expected shape \(1, 2, 9\)"
        ),
        bad_call("state's dtype", state=(np.zeros((1, 2, 9)),) * 2, match=r"\[0\]: expected float32", error=TypeError),
        bad_call("lengths", lengths=[1, 5], match=r"lengths: expected numbers from 0 to 4 \(T\), got 5"),
        bad_call("lengths' shape", lengths=[1], match=r"lengths: expected shape \(2,\)"),
        bad_call("lengths' dtype", lengths=[1.0, 2.0], match="lengths: expected whole numbers", error=TypeError),
        bad_call("resets", resets=np.full((4, 2), 2), match="resets: expected bools"),
        bad_call("resets' shape", resets=np.zeros((4, 3), bool), match=r"resets: expected shape \(4, 2\)"),
        bad_call("order", batch_first=1, match="batch_first: expected True or False", error=TypeError),
        bad_call("checkpoints", checkpoint_every=0, match="checkpoint_every: expected a number from 1"),
    ],
)
def test_bad_calls(match, error, changes):
    layer = make_layer("lstm", 5, 9)
    arguments = {"parameters": layer.state_dict(), "x": np.zeros((4, 2, 5), "f"), **changes}
    with pytest.raises(error, match=match):
        gj.lstm(arguments.pop("parameters"), arguments.pop("x"), **arguments)


def test_bad_parameters():
    x, valid = np.zeros((4, 2, 5), "f"), make_layer("lstm", 5, 9, num_layers=2).state_dict()

    def assert_refused(match, call=gj.lstm, **changes):
        parameters = {name: value for name, value in {**valid, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=match):
            call(parameters, x)

    assert_refused("parameters: expected .*bias_hh_l1, got", bias_hh_l1=None)
    assert_refused("parameters: expected", weight_ih_l3=valid["weight_ih_l1"])
    assert_refused("parameters: expected weight_hh_l0 among them", weight_hh_l0=None)
    assert_refused(r"weight_hh_l1: expected shape \(36, 9\), got \(35, 9\)", weight_hh_l1=valid["weight_hh_l1"][1:])
    assert_refused(r"weight_ih_l0: expected shape \(4\*H, I\) of lstm", weight_ih_l0=valid["weight_ih_l0"][1:])
    assert_refused("weight_hr_l0: expected no projection of gru", gj.gru, weight_hr_l0=np.zeros((2, 9), "f"))
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'gelu'"):
        gj.rnn(valid, x, nonlinearity="gelu")
    with pytest.raises(TypeError, match="state: expected an array h, got a tuple of 2"):
        gj.gru(make_layer("gru", 5, 9).state_dict(), x, (np.zeros((1, 2, 9), "f"),) * 2)

    @jax.jit
    def traced(lengths=None, resets=None):
        return gj.lstm(valid, x, lengths=lengths, resets=resets)

    with pytest.raises(TypeError, match="lengths: expected whole numbers, got float"):
        traced(lengths=np.ones(2))
    with pytest.raises(TypeError, match="resets: expected bools, got int"):
        traced(resets=np.ones((4, 2), int))


def test_unusual_arrays():
    """Other byte orders, strides and mappings; values that are not arrays."""
    layer = make_layer("lstm", 5, 9)
    x = random((6, 3, 5), "float32")
    expected = layer(x)[0]
    swapped = {name: value.astype(value.dtype.newbyteorder()) for name, value in layer.state_dict().items()}
    for parameters, input in (
        (swapped, x.astype(x.dtype.newbyteorder())),
        (layer.parameters, np.asfortranarray(x)),
        (dict(reversed(layer.state_dict().items())), np.repeat(x, 2, 0)[::2]),
    ):
        assert_same_bits([gj.lstm(parameters, input)[0]], [expected])
    for invalid in ([["a"]], [[2**100]], [[1], [2, 3]], np.zeros((4, 2, 5), "float16"), None):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            gj.lstm(layer.parameters, invalid)
    with pytest.raises(TypeError, match="parameters: expected names, got 1"):
        gj.lstm({**layer.parameters, 1: x}, x)
    with pytest.raises(ValueError, match="nonlinearity: expected"):
        gj.rnn(layer.parameters, x, nonlinearity=np.array(["tanh"]))


def test_sizes_beyond_memory():
    """Shapes without arrays give an answer or an error at once."""
    p = make_layer("lstm", 5, 9).state_dict()
    shape = jax.ShapeDtypeStruct
    for steps, batch in ((2**30, 1), (1, 2**30)):
        x = shape((steps, batch, 5), "float32")
        assert jax.eval_shape(jax.grad(lambda x: gj.lstm(p, x)[0].sum()), x) == x
    with pytest.raises(ValueError, match="x: expected a sequence whose tape fits into memory"):
        jax.eval_shape(jax.grad(lambda x: gj.lstm(p, x)[0].sum()), shape((2**40, 2**10, 5), "float32"))


def test_without_jax():
    """The package imports without JAX, and gatewise.jax says what is missing."""
    code = "import sys; sys.modules['jax'] = None; import gatewise; import gatewise.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "ModuleNotFoundError: gatewise.jax needs JAX: pip install 'gatewise[jax]'" in done.stderr
    code = "import sys, gatewise; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_example_of_a_counter():
    command = [sys.executable, REPOSITORY / "examples" / "jax_counter.py", "--hidden", "16", "--steps", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5
