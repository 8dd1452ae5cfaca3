"""A look inside: gates and states of every layer and direction, slices of weights, how far back a layer remembers."""

import dataclasses

import gatewise as gw
import numpy as np
import pytest
from conftest import (
    assert_same_bits,
    cell_of,
    make_data,
    make_layer,
    map_state,
    output_width,
    random,
)
from gatewise import reference
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "proj_size": 9},
        {"num_layers": 2, "dropout": 0.9},
    ],
    ids=str,
)
# What the reference keeps of a step, by our names; then the state after it.
NAMES = {
    "lstm": ("input_gate", "forget_gate", "candidate", "output_gate"),
    "gru": ("reset_gate", "update_gate", "candidate"),
    "rnn_tanh": (),
    "rnn_relu": (),
}


def reference_traces(layer, data, **options):
    """By the name of the layer and direction: each value (T, B, H), zero where a row has no step."""

    def double(value):
        return map_state(lambda v: v.astype(np.float64), value)

    _, _, tape = reference.forward(
        cell_of(layer), double(data.x), double(data.state), layer.state_dict(), num_layers=layer.num_layers,
        bidirectional=layer.bidirectional, **options,
    )  # fmt: skip
    directions = 1 + layer.bidirectional
    traces = {}
    for place, steps in enumerate(tape.steps):
        steps = sorted(steps, key=lambda step: step.t)
        traces[f"l{place // directions}" + ("_reverse" if place % directions else "")] = {
            name: np.stack([np.where(step.active, step.intermediates[index], 0) for step in steps])
            for index, name in enumerate(NAMES[cell_of(layer)])
        }
    return traces


@OPTIONS
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_traces(cell, dtype, options, ragged):
    if cell != "lstm" and "proj_size" in options:
        pytest.skip("only an LSTM has projections")
    layer = make_layer(cell, 5, 17, dtype=dtype, **options)
    data = make_data(layer, 7, 4)
    options = {"lengths": [3, 6, 0, 5], "resets": random((7, 4), dtype) > 1} if ragged else {}
    trace = layer.trace(data.x, data.state, **options)
    assert_same_bits((trace.output, trace.state), layer(data.x, data.state, **options))
    assert layer.call_count == 0
    expected_traces = reference_traces(layer, data, **options)
    assert list(trace) == list(expected_traces)
    for name, gates in expected_traces.items():
        for gate, values in gates.items():
            assert_close(getattr(trace[name], gate), values, dtype, f"{name} {gate}")
        assert trace[name].hidden.shape == (7, 4, output_width(layer))
    last = [trace[name].hidden for name in trace if name.startswith(f"l{layer.num_layers - 1}")]
    assert_same_bits(np.concatenate(last, axis=-1), trace.output)
    if ragged:
        for layer_trace in trace.values():
            for array in dataclasses.asdict(layer_trace).values():
                assert not array[6:].any()
                assert not array[:, 2].any()
                assert not array[3:, 0].any()


def test_cells_and_hidden_states(dtype):
    """Each follows from the gates and the step before, in either direction."""
    layer = make_layer("lstm", 5, 17, 2, bidirectional=True, dtype=dtype)
    data = make_data(layer, 7, 4)
    trace = layer.trace(data.x, data.state)
    for place, (name, layer_trace) in enumerate(trace.items()):
        way = slice(None, None, -1) if name.endswith("_reverse") else slice(None)
        before = np.concatenate([data.state[1][place][None], layer_trace.cell[way][:-1]])[way]
        assert_close(
            layer_trace.cell, layer_trace.forget_gate * before + layer_trace.input_gate * layer_trace.candidate, dtype
        )
        assert_close(layer_trace.hidden, layer_trace.output_gate * np.tanh(layer_trace.cell), dtype)
        assert_same_bits(trace.state[1][place], layer_trace.cell[way][-1])
        assert_same_bits(trace.state[0][place], layer_trace.hidden[way][-1])


def test_hidden_states_of_gru_and_rnn(dtype):
    layer = make_layer("gru", 5, 17, dtype=dtype)
    data = make_data(layer, 7, 4)
    layer_trace = layer.trace(data.x, data.state)["l0"]
    before = np.concatenate([data.state, layer_trace.hidden[:-1]])
    assert_close(
        layer_trace.hidden,
        (1 - layer_trace.update_gate) * layer_trace.candidate + layer_trace.update_gate * before,
        dtype,
    )
    rnn = make_layer("rnn_tanh", 5, 17, dtype=dtype)
    trace = rnn.trace(data.x)
    assert_same_bits(trace["l0"].hidden, trace.output)


def test_axes_of_traces():
    layer, turned = (make_layer("gru", 5, 17, 2, bidirectional=True, batch_first=first) for first in (False, True))
    data = make_data(layer, 6, 3)
    trace = layer.trace(data.x, data.state)
    other = turned.trace(data.x.swapaxes(0, 1), data.state)
    row = layer.trace(data.x[:, 0], data.state[:, 0])
    for name in trace:
        assert_same_bits(other[name].update_gate.swapaxes(0, 1), trace[name].update_gate)
        assert_same_bits(row[name].hidden, trace[name].hidden[:, 0])


def test_traces_know_the_floating_point_mode():
    """Denormals are flushed as in the call."""
    layer = make_layer("lstm", 2, 3)
    layer.parameters.update({name: np.zeros_like(value) for name, value in layer.parameters.items()})
    state = np.zeros((1, 1, 3), "float32"), np.full((1, 1, 3), 1.2e-38, "float32")
    trace = layer.trace(np.zeros((1, 1, 2), "float32"), state)
    assert_same_bits(trace["l0"].cell, trace.state[1])
    assert not trace["l0"].cell.any()


def test_traces_are_compared_by_identity():
    layer = make_layer("lstm", 2, 3)
    first, other = (layer.trace(random((2, 1, 2), "float32")) for _ in range(2))
    assert first == first
    assert first != other
    assert len({first, other, first["l0"], other["l0"]}) == 4


def test_lengths_are_asked_for_once():
    class Once:
        asked = 0

        def __array__(self, dtype=None, copy=None):
            self.asked += 1
            return np.array([2, 0])

    lengths = Once()
    trace = make_layer("gru", 2, 3).trace(random((3, 2, 2), "float32"), lengths=lengths)
    assert lengths.asked == 1
    assert trace.lengths.tolist() == [2, 0]


def test_a_trace_explains_itself():
    trace = make_layer("lstm", 5, 7, 2, bidirectional=True).trace(random((3, 2, 5), "float32"))
    assert list(trace) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert "l1_reverse: input_gate forget_gate candidate output_gate cell hidden" in repr(trace)
    with pytest.raises(KeyError, match=r"l2.*expected one of l0, l0_reverse"):
        trace["l2"]


def test_what_training_and_a_look_inside_give_is_shown_by_its_shapes():
    layer = gw.LSTM(5, 7, bias=False)
    tape = layer.record(random((3, 2, 5), "float32"))
    states = "((1, 2, 7), (1, 2, 7))"
    assert repr(tape) == f"Tape(output=(3, 2, 7), state={states}, nbytes={tape.nbytes})"
    parameters = "{'weight_ih_l0': (28, 5), 'weight_hh_l0': (28, 7)}"
    gradients = tape.backward(np.ones((3, 2, 7)))
    assert repr(gradients) == f"Gradients(input=(3, 2, 5), state={states}, parameters={parameters})"
    assert repr(tape) == f"Tape(output=(3, 2, 7), state={states}, nbytes=0)"
    trace = gw.GRU(5, 7, 2).trace(random((3, 5), "float32"))
    shapes = ", ".join(f"{name}=(3, 7)" for name in ("reset_gate", "update_gate", "candidate", "hidden"))
    assert repr(trace["l1"]) == f"GRUTrace({shapes})"


def test_a_layer_counts_its_parameters():
    assert gw.GRU(5, 7).num_parameters == 3 * 7 * (5 + 7 + 2)
    model = gw.Sequential([gw.Embedding(9, 5), gw.GRU(5, 7), gw.Dropout(0.5), gw.TimeDistributed(gw.Dense(7, 2))])
    assert [layer.num_parameters for layer in model] == [9 * 5, 3 * 7 * (5 + 7 + 2), 0, 2 * (7 + 1)]
    assert model.num_parameters == sum(array.size for array in model.parameters.values())


@pytest.mark.parametrize(("steps", "batch"), [(0, 2), (3, 0)], ids=str)
def test_empty_traces(cell, steps, batch):
    trace = make_layer(cell, 5, 7).trace(np.empty((steps, batch, 5), "float32"))
    assert trace["l0"].hidden.shape == (steps, batch, 7)


# -----------------------------------------------------------------------------------------------------------
# Slices of the weights


def test_gate_slices(cell):
    """A gate with no weights and a large bias is open, the others are not touched."""
    layer = make_layer(cell, 5, 7)
    names = {"lstm": ["input", "forget", "candidate", "output"], "gru": ["reset", "update", "candidate"]}
    for place, name in enumerate(names.get(cell, ["candidate"])):
        rows = layer.gate(name)
        assert (rows.start, rows.stop) == (7 * place, 7 * place + 7)
        if cell.startswith("rnn_"):
            continue
        with layer.edit() as weights:
            for kind in ("weight_ih", "weight_hh", "bias_hh"):
                weights[f"{kind}_l0"][rows] = 0
            weights["bias_ih_l0"][rows] = 50
        layer_trace = layer.trace(random((4, 2, 5), "float32"))["l0"]
        assert (getattr(layer_trace, "candidate" if name == "candidate" else f"{name}_gate") == 1).all()


# -----------------------------------------------------------------------------------------------------------
# How far back


@pytest.mark.parametrize("unit", [None, 0, -1])
def test_input_gradient(cell, unit):
    layer = make_layer(cell, 3, 5, 2, bidirectional=True, dtype="float64")
    data = make_data(layer, 6, 2)
    gradient = layer.input_gradient(data.x, 2, data.state, unit=unit)
    assert gradient.shape == data.x.shape
    places = slice(None) if unit is None else unit
    for row in (0, 1):  # each row by central differences of its own
        for t in range(6):
            for i in range(3):
                up, down = data.x.copy(), data.x.copy()
                up[t, row, i] += 1e-5
                down[t, row, i] -= 1e-5
                change = layer(up, data.state)[0] - layer(down, data.state)[0]
                assert_close(gradient[t, row, i], change[2, row, places].sum() / 2e-5, "finite_difference")


def test_input_gradient_stops(cell):
    layer = make_layer(cell, 3, 5, 2)
    x, resets = random((8, 2, 3), "float32"), np.zeros((8, 2))
    resets[3, 0] = 1
    gradient = layer.input_gradient(x, 5, resets=resets, lengths=[8, 4])
    assert gradient[3:6, 0].all(axis=-1).any()
    assert not gradient[:3, 0].any()
    assert not gradient[6:].any()
    assert not gradient[:, 1].any()  # this row has no step 5
    assert_same_bits(layer.input_gradient(x, -1), layer.input_gradient(x, 7))


# -----------------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    from gatewise import plot

    return plot


def texts(axes):
    return axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")


def saved(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    assert figure.get_suptitle()
    assert figure.get_figwidth() * figure.dpi == 800
    return figure.axes


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("shape", [(30, 3, 5), (30, 5), (1, 2, 5)], ids=str)
def test_figures(cell, plot, tmp_path, shape, ragged):
    layer = make_layer(cell, 5, 12, 2, bidirectional=True)
    x = random(shape, "float32")
    lengths = ([shape[0], *[shape[0] // 2] * (shape[1] - 1)] if len(shape) == 3 else 20) if ragged else None
    trace = layer.trace(x, lengths=lengths)
    axes = saved(plot.cells(trace, "l1_reverse"), tmp_path)
    name = "cell state c" if cell == "lstm" else "hidden state h"
    assert texts(axes[0]) == ("time step", name, "")
    axes = saved(plot.cells(trace, "l0", units=[3, 1]), tmp_path)
    assert [line.get_label() for line in axes[0].get_lines()][:2] == ["unit 3", "unit 1"]
    axes = saved(plot.memory(layer.input_gradient(x, 0), 0), tmp_path)
    assert texts(axes[0])[:2] == ("time step of the input", "norm of the gradient")
    if cell.startswith("rnn_"):
        for function in (plot.gates, plot.saturation):
            with pytest.raises(ValueError, match=r"^trace: expected a layer with gates, got RNNTrace"):
                function(trace)
        return
    axes = saved(plot.gates(trace, "l0"), tmp_path)
    titles = [panel.get_title(loc="left") for panel in axes if panel.get_title(loc="left")]
    assert sorted(titles) == sorted(name.replace("_", " ") for name in NAMES[cell])
    axes = saved(plot.saturation(trace), tmp_path)
    assert [panel.get_xlabel() for panel in axes] == ["activation"] * len(axes)


def test_figures_show_the_row(plot):
    layer = make_layer("lstm", 5, 12, batch_first=True)
    trace = layer.trace(random((3, 20, 5), "float32"), lengths=[20, 7, 0])
    image = plot.gates(trace, "l0", row=1).axes[0].images[0]
    assert image.get_array().shape == (12, 7)
    np.testing.assert_array_equal(image.get_array(), trace["l0"].input_gate[1, :7].T)
    heights = plot.saturation(trace).axes[0].patches
    assert sum(patch.get_height() for patch in heights if patch.get_width() < 0.04) == pytest.approx(100)


def colours_of(figure):
    return {axes.get_title(loc="left"): axes.images[0].get_clim() for axes in figure.axes if axes.images}


def test_limits_of_the_colours(plot, tmp_path):
    """By default all that a gate can be, so that figures can be compared; else as asked for, or as the data are."""
    layer = gw.GRU(5, 12, seed=1)
    trace = layer.trace(random((20, 3, 5), "float32"))
    usual = {"reset gate": (0, 1), "update gate": (0, 1), "candidate": (-1, 1)}
    assert colours_of(plot.gates(trace)) == usual
    narrow = {"reset gate": (0.4, 0.6), "update gate": (0.4, 0.6), "candidate": (-1, 1)}
    assert colours_of(plot.gates(trace, limits=(0.4, 0.6))) == narrow
    figure = plot.gates(trace, row=1, limits="data")
    saved(figure, tmp_path)
    gate, candidate = trace["l0"].update_gate[:, 1], trace["l0"].candidate[:, 1]
    shown = colours_of(figure)
    assert shown["update gate"] == (gate.min(), gate.max())
    assert shown["candidate"] == (-np.abs(candidate).max(), np.abs(candidate).max())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_limits_of_data_that_are_all_the_same_or_not_numbers(plot, tmp_path, value):
    layer = gw.LSTM(5, 12, seed=1)
    layer.load_state_dict({name: np.zeros(array.shape) for name, array in layer.parameters.items()})
    saved(plot.gates(layer.trace(np.full((20, 3, 5), value, "f")), limits="data"), tmp_path)


def test_limits_are_checked(plot):
    trace = gw.GRU(5, 12).trace(random((9, 3, 5), "float32"))
    for error, limits in [
        (TypeError, "all"), (TypeError, 0.5), (TypeError, (0.1, "b")), (TypeError, (0, 0.5, 1)),
        (ValueError, (0.5, 0.5)), (ValueError, (0.6, 0.4)), (ValueError, (0, np.nan)),
    ]:  # fmt: skip
        with pytest.raises(error, match=r"^limits"):
            plot.gates(trace, limits=limits)


def test_figures_refuse(plot):
    layer = make_layer("lstm", 5, 12)
    trace = layer.trace(random((9, 3, 5), "float32"))
    gradient = layer.input_gradient(random((9, 3, 5), "float32"), 3)
    for error, match, function, arguments in [
        (TypeError, "^trace: ", plot.gates, (np.zeros(3),)),
        (ValueError, "^layer: expected one of l0, got 'l1'", plot.gates, (trace, "l1")),
        (ValueError, "^row: ", plot.cells, (trace, "l0", 3)),
        (TypeError, "^row: ", plot.cells, (trace, "l0", 1.5)),
        (TypeError, "^units: ", plot.cells, (trace, "l0", 0, [0.5])),
        (ValueError, "^units: ", plot.cells, (trace, "l0", 0, [12])),
        (ValueError, "^gradient: ", plot.memory, (np.zeros(3), 0)),
        (ValueError, "^step: ", plot.memory, (gradient, 9)),
        (TypeError, "^gradient: ", plot.memory, (np.array([["a"]]), 0)),
        (ValueError, "^layer: ", plot.gates, (trace, ["l0"])),
        (ValueError, "^row: expected a row with steps", plot.gates, (layer.trace(np.zeros((0, 2, 5), "f")),)),
    ]:
        with pytest.raises(error, match=match):
            function(*arguments)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300, 0.0])
def test_extreme_gradients_are_drawn(plot, tmp_path, value):
    gradient = np.full((6, 2, 3), value)
    gradient[:2] = np.inf
    saved(plot.memory(gradient, 3, row=1), tmp_path)


def test_figures_of_no_rows(plot, tmp_path):
    trace = make_layer("gru", 5, 12).trace(np.zeros((3, 0, 5), "float32"), lengths=[])
    saved(plot.saturation(trace), tmp_path)


def test_no_matplotlib_is_said(monkeypatch):
    import builtins
    import sys

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "gatewise.plot", raising=False)
    monkeypatch.delattr(gw, "plot", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gatewise\[plot\]'"):
        import gatewise.plot  # noqa: F401
