"""gatewise and its peers, each used in the way its own documentation calls fastest; one function a peer.

A peer's function takes a Case and returns a Party: `run`, which does the work once and is all that is timed, and
`collect`, which turns what `run` returned into NumPy arrays under canonical names, for the check. `run` of a single
step keeps its state from call to call. A peer that cannot do a case raises NotImplementedError with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .workloads import (
    CELL,
    DENSE,
    EMBEDDING,
    FORWARD,
    GATES,
    HOMES,
    LAYER,
    NETWORK,
    ONE_STEP,
    PACKED,
    PLAIN,
    POOL,
    RESETS,
    RUN,
    STEP,
    TRAIN,
    Workload,
)

Array = npt.NDArray[Any]
# A graph of one call hands these over from call to call.
WITH_STATES = (*ONE_STEP, RUN)


@dataclass(frozen=True)
class Case:
    """A workload with its data, in PyTorch's names and shapes.

    `x` is (T, B, I), `grad_output` (T, B, D * H). Of a single step, x has one step. Of a network the parameters have
    the number of their layer before their names; tokens are (N, 1), one for each of N steps, and then from the first.
    """

    workload: Workload
    threads: int
    parameters: Mapping[str, Array]
    x: Array
    grad_output: Array

    @property
    def schedule(self) -> dict[str, Array]:
        """What gatewise's calls take beside x."""
        given = {"lengths": self.workload.lengths, "resets": self.workload.resets}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def outputs(self) -> int:
        w = self.workload
        return w.blocks[-1].outputs if w.blocks else w.directions * w.hidden

    def tokens(self) -> Iterator[int] | None:
        """Without end, where a network takes them."""
        return cycle(self.x[:, 0].tolist()) if self.workload.takes_tokens else None

    def places(self) -> Iterable[tuple[int, str]]:
        """Layers and directions with the suffix that their parameters have."""
        for layer in range(self.workload.layers):
            for direction in range(self.workload.directions):
                yield layer, f"l{layer}" + "_reverse" * direction


class Party(NamedTuple):
    run: Callable[[], Any]
    collect: Callable[[Any], dict[str, Array]]  # "output" (T, B, D * H), and of training "input" and the parameters


def numpy_of(value: Any) -> Array:
    return np.array(value, copy=True)


# ---- gatewise


def gatewise(case: Case) -> Party:
    """The layer called with `out`; record and backward after a change of the weights; stream.step(x, out) and
    stream.run(block, out); for many streams pool.step(x, slots, out); of a network the stream of a Sequential.

    In PyTorch: the module that the peer has, on gatewise by gatewise.torch.accelerate; frozen where the workload is. In
    JAX: gatewise.jax instead of the scan.
    """
    home = HOMES.get(case.workload.mode)
    if home == "PyTorch":
        import gatewise as gw
        import gatewise.torch

        gw.set_num_threads(case.threads)

        def accelerated(module: Any) -> Any:
            module = gatewise.torch.accelerate(module)
            return gatewise.torch.freeze(module) if case.workload.frozen else module

        return _in_pytorch(case, accelerated)
    if home == "JAX":
        return _gatewise_in_jax(case)
    if case.workload.mode == NETWORK:
        return _gatewise_network(case)
    return _gatewise(case, case.schedule, case.workload.checkpoint_every or None)


def gatewise_plain(case: Case) -> Party:
    """The same as if all rows had all steps, without resets and checkpoints: what these cost, or save.

    Instead of a pool, a stream each, one after the other. Of a block, one step after the other. Of a network the
    recurrent layers alone.
    """
    outside_of_frameworks(case)
    if case.workload.mode == NETWORK:
        return _gatewise_network(recurrent_alone(case))
    if case.workload.mode == POOL:
        return _one_by_one(case)
    if case.workload.mode == RUN:
        return _step_by_step(case)
    if not case.schedule and not case.workload.checkpoint_every:
        raise NotImplementedError("the same as gatewise")
    return _gatewise(case, {}, None)


def _layer(case: Case) -> Any:
    import gatewise as gw

    w = case.workload
    layer = getattr(gw, w.cell)(w.input, w.hidden, w.layers, bidirectional=w.directions == 2, dtype=w.dtype, seed=1)
    layer.load_state_dict(case.parameters)
    return layer


def _one_by_one(case: Case) -> Party:
    layer = _layer(case)
    streams = [layer.stream().step for _ in range(case.workload.batch)]
    rows, out = list(case.x[0]), list(np.empty((case.workload.batch, case.workload.hidden), case.workload.dtype))

    def run() -> None:
        for step, x, y in zip(streams, rows, out, strict=True):
            step(x, y)

    return Party(run, lambda _: {"output": np.stack(out)[None]})


def _step_by_step(case: Case) -> Party:
    step = _stream(case).step
    out = _out(case)
    pairs = list(zip(_rows(case), out, strict=True))

    def run() -> None:
        for x, y in pairs:
            step(x, y)

    return Party(run, lambda _: {"output": out.reshape(case.workload.steps, case.workload.batch, -1).copy()})


def _stream(case: Case) -> Any:
    return _layer(case).stream(None if case.workload.batch == 1 else case.workload.batch)


def _rows(case: Case) -> Array:
    """x as a stream takes it: (T, I), of several rows (T, B, I)."""
    return case.x[:, 0].copy() if case.workload.batch == 1 else case.x


def _out(case: Case) -> Array:
    """For the output of some steps of a stream."""
    w = case.workload
    return np.empty((w.steps, *(() if w.batch == 1 else (w.batch,)), case.outputs), w.dtype)


def recurrent_alone(case: Case) -> Case:
    """The recurrent layers of a network, in their order, from what comes into the first of them."""
    w = case.workload
    kept = [i for i, block in enumerate(w.blocks) if block.is_recurrent]
    parameters = {}
    for key, value in case.parameters.items():
        number, name = key.split(".", 1)
        if int(number) in kept:
            parameters[f"{kept.index(int(number))}.{name}"] = value
    x = case.parameters["0.weight"][case.x[:1]] if w.takes_tokens else case.x
    return replace(case, workload=replace(w, blocks=tuple(w.blocks[i] for i in kept)), parameters=parameters, x=x)


def _gatewise_network(case: Case) -> Party:
    import gatewise as gw

    gw.set_num_threads(case.threads)
    layers: list[Any] = []
    for kind, inputs, outputs, activation in case.workload.blocks:
        options = {"activation": activation} if kind == DENSE else {}
        layers.append(getattr(gw, kind)(inputs, outputs, dtype=case.workload.dtype, seed=1, **options))
    model = gw.Sequential(layers)
    model.load_state_dict(case.parameters)
    step, tokens = model.stream().step, case.tokens()
    out = np.empty(case.outputs, case.workload.dtype)

    def step_on(tokens: Iterator[int], out: Array) -> None:
        step(next(tokens), out)

    run = partial(step, case.x[0, 0], out) if tokens is None else partial(step_on, tokens, out)
    return Party(run, lambda _: {"output": out[None, None].copy()})


def _gatewise(case: Case, schedule: Mapping[str, Array], checkpoint_every: int | None) -> Party:
    import gatewise as gw

    w, layer = case.workload, _layer(case)
    gw.set_num_threads(case.threads)
    if w.mode == FORWARD:
        out = np.empty((w.steps, w.batch, case.outputs), w.dtype)
        return Party(partial(layer, case.x, out=out, **schedule), lambda result: {"output": numpy_of(result[0])})
    if w.mode in (STEP, RUN):
        stream, x, out = _stream(case), _rows(case), _out(case)
        run = partial(stream.run, x, out) if w.mode == RUN else partial(stream.step, x[0], out[0])
        return Party(run, lambda _: {"output": out.reshape(w.steps, w.batch, -1).copy()})
    if w.mode == POOL:
        pool = layer.pool(w.batch)
        slots = np.array([pool.open() for _ in range(w.batch)])
        out = np.empty((w.batch, w.hidden), w.dtype)
        return Party(partial(pool.step, case.x[0], slots, out), lambda _: {"output": out[None].copy()})

    bias = case.parameters["bias_ih_l0"]

    def train() -> tuple[Array, Any]:
        layer.parameters["bias_ih_l0"] = bias  # as an optimizer would: packed weights are made anew
        tape = layer.record(case.x, **schedule, checkpoint_every=checkpoint_every)
        return tape.output, tape.backward(case.grad_output)

    return Party(train, lambda result: {"output": result[0], "input": result[1].input, **result[1].parameters})


# ---- PyTorch


def pytorch(case: Case) -> Party:
    """torch.nn.LSTM or GRU under inference_mode; autograd.grad of the module; LSTMCell or GRUCell for a step. Of a
    block the layer, with the state of the block before.

    Rows of different lengths as packed sequences; packing and padding again are timed with it, except where a module
    in PyTorch is given a packed sequence and returns one. A network is a module of cells, torch.nn.Linear and
    torch.nn.Embedding.
    """
    if HOMES.get(case.workload.mode) == "PyTorch":
        return _in_pytorch(case, lambda module: module)
    outside_of_frameworks(case)
    if case.workload.mode == NETWORK:
        return _pytorch_network(case)
    return _pytorch(case, packed=case.workload.lengths is not None)


def pytorch_padded(case: Case) -> Party:
    """The same without packing: all steps of the longest row are computed, and what lies behind an end is left out."""
    outside_of_frameworks(case)
    if case.workload.lengths is None:
        raise NotImplementedError("the same as PyTorch")
    if case.workload.directions == 2:
        raise NotImplementedError("the reverse direction would begin in the padding")
    return _pytorch(case, packed=False)


def _in_pytorch(case: Case, change: Callable[[Any], Any]) -> Party:
    """A module of torch.nn, perhaps changed: zero_grad, forward, backward; or one step under no_grad."""
    import torch

    w = case.workload
    torch.set_num_threads(case.threads)
    dtype = getattr(torch, w.dtype)
    parameters = {name: torch.from_numpy(value) for name, value in case.parameters.items()}
    if w.mode == CELL:
        cell = change(getattr(torch.nn, f"{w.cell}Cell")(w.input, w.hidden, dtype=dtype)).eval()
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in parameters.items()})
        return _step_of_cell(case, cell)
    module = change(
        getattr(torch.nn, w.cell)(w.input, w.hidden, w.layers, bidirectional=w.directions == 2, dtype=dtype)
    )
    module.load_state_dict(parameters)
    return _step_of_layer(case, module.eval()) if w.mode == LAYER else _training(case, module)


def _step_of_cell(case: Case, cell: Any) -> Party:
    import torch

    is_lstm, now = case.workload.cell == "LSTM", torch.from_numpy(case.x)[0]
    zero = now.new_zeros(case.workload.batch, case.workload.hidden)
    state: Any = (zero, zero) if is_lstm else zero

    def step() -> Any:
        nonlocal state
        with torch.no_grad():
            state = cell(now, state)
        return state[0] if is_lstm else state

    return Party(step, lambda h: {"output": numpy_of(h)[None]})


def _step_of_layer(case: Case, module: Any) -> Party:
    import torch

    x, state = torch.from_numpy(case.x), None

    def step() -> Any:
        nonlocal state
        with torch.no_grad():
            y, state = module(x, state)
        return y

    return Party(step, lambda y: {"output": numpy_of(y)})


def _training(case: Case, module: Any) -> Party:
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    x, grad_output, lengths = torch.from_numpy(case.x), torch.from_numpy(case.grad_output), case.workload.lengths

    def pack(rows: Any) -> Any:
        return pack_padded_sequence(rows, torch.from_numpy(lengths), enforce_sorted=False)

    def pad(rows: Any) -> Any:
        return pad_packed_sequence(rows)[0]

    is_packed = case.workload.rows == PACKED
    if is_packed:
        packed, grad_output = pack(x), pack(grad_output).data
        x = packed.data

    def forward() -> Any:
        if is_packed:
            return module(packed)[0].data
        return module(x)[0] if lengths is None else pad(module(pack(x))[0])

    def as_given(rows: Any) -> Any:
        return pad(packed._replace(data=rows)) if is_packed else rows

    x.requires_grad_()

    def train() -> Any:
        module.zero_grad()
        x.grad = None
        y = forward()
        y.backward(grad_output)
        return y

    return Party(
        train,
        lambda y: {
            "output": numpy_of(as_given(y.detach())),
            "input": numpy_of(as_given(x.grad)),
            **{name: numpy_of(parameter.grad) for name, parameter in module.named_parameters()},
        },
    )


def _pytorch(case: Case, packed: bool) -> Party:
    import torch

    w = case.workload
    if w.rows == RESETS:
        raise NotImplementedError("no resets within a sequence")
    torch.set_num_threads(case.threads)
    dtype = getattr(torch, w.dtype)
    parameters = {name: torch.from_numpy(value) for name, value in case.parameters.items()}
    x = torch.from_numpy(case.x)

    if w.mode in ONE_STEP:
        cell = getattr(torch.nn, f"{w.cell}Cell")(w.input, w.hidden, dtype=dtype)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in parameters.items()})
        zero = torch.zeros(w.batch, w.hidden, dtype=dtype)
        state = (zero, zero) if w.cell == "LSTM" else zero

        def step() -> Any:
            nonlocal state
            with torch.inference_mode():
                state = cell(x[0], state)
            return state[0] if w.cell == "LSTM" else state

        return Party(step, lambda h: {"output": numpy_of(h)[None]})

    module = getattr(torch.nn, w.cell)(w.input, w.hidden, w.layers, bidirectional=w.directions == 2, dtype=dtype)
    module.load_state_dict(parameters)
    lengths = w.lengths

    def output_of(x: Any) -> Any:
        if not packed:
            return module(x)[0]
        sequences = torch.nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(sequences)[0])[0]

    if w.mode == RUN:
        after: Any = None

        def go_on() -> Any:
            nonlocal after
            with torch.inference_mode():
                y, after = module(x, after)
            return y

        return Party(go_on, lambda y: {"output": numpy_of(y)})
    if w.mode == FORWARD:
        module.eval()

        def forward() -> Any:
            with torch.inference_mode():
                return output_of(x)

        return Party(forward, lambda y: {"output": numpy_of(y)})

    x.requires_grad_()
    grad_output = torch.from_numpy(case.grad_output)
    names = [name for name, _ in module.named_parameters()]
    leaves = [x, *module.parameters()]

    def train() -> Any:
        y = output_of(x)
        return y, torch.autograd.grad(y, leaves, grad_output)

    return Party(
        train,
        lambda result: {
            "output": numpy_of(result[0].detach()),
            **dict(zip(["input", *names], map(numpy_of, result[1]), strict=True)),
        },
    )


def _network_module(case: Case, *, is_eager: bool) -> Any:
    """From x and the states before a step, in the order of the layers, to y and those after it.

    For calls as they come, of cells on x (1, I), which take half the time of layers; to be exported, of layers on
    x (1, 1, I), since each of these becomes one operator.
    """
    import torch

    w = case.workload
    suffix = "Cell" if is_eager else ""
    names = {DENSE: "Linear", EMBEDDING: "Embedding", **{cell: f"{cell}{suffix}" for cell in GATES}}

    class Network(torch.nn.ModuleList):  # type: ignore[misc]  # of Any, where PyTorch is not looked at
        def forward(self, x: Any, *states: Any) -> Any:
            before, after = iter(states), []
            for block, layer in zip(w.blocks, self, strict=True):
                if block.is_recurrent:
                    given = (next(before), next(before)) if block.kind == "LSTM" else next(before)
                    result = layer(x, given)
                    new = result if is_eager else result[1]
                    after += list(new) if block.kind == "LSTM" else [new]
                    x = new[0] if block.kind == "LSTM" else new  # h is the output of the one step
                else:
                    # ONNX Runtime would put a Reshape before and behind each product of three axes: 2 to 4 %.
                    x = layer(x.squeeze(0) if block.kind == DENSE and x.dim() == 3 else x)
                    x = x if block.activation == "linear" else getattr(torch, block.activation)(x)
            return (x, *after)

    dtype = getattr(torch, w.dtype)
    module = Network(
        getattr(torch.nn, names[kind])(inputs, outputs, dtype=dtype) for kind, inputs, outputs, _ in w.blocks
    )
    module.load_state_dict(
        {
            name.removesuffix("_l0") if is_eager else name: torch.from_numpy(value)
            for name, value in case.parameters.items()
        }
    )
    return module.eval()


def _pytorch_network(case: Case) -> Party:
    import torch

    torch.set_num_threads(case.threads)
    module = _network_module(case, is_eager=True)
    states = [torch.from_numpy(value[0]) for value in _zero_states(case).values()]
    inputs = cycle(list(torch.from_numpy(case.x)))

    def step() -> Any:
        nonlocal states
        with torch.inference_mode():
            y, *states = module(next(inputs), *states)
        return y

    return Party(step, lambda y: {"output": numpy_of(y)[None]})


# ---- ONNX, for ONNX Runtime and OpenVINO


def _exported_network(case: Case) -> bytes:
    """By PyTorch. Inputs x and the states in the order of the layers, outputs y and the states after the step."""
    import torch

    torch.set_num_threads(1)  # none of its own beside those of who is measured
    states = {name: torch.from_numpy(value) for name, value in _zero_states(case).items()}
    file = BytesIO()
    torch.onnx.export(
        _network_module(case, is_eager=False),
        (torch.from_numpy(case.x[:1]), *states.values()),
        file,
        input_names=["x", *states],
        output_names=["y", *(f"{name}_after" for name in states)],
        opset_version=17,
        dynamo=False,  # the other exporter needs more packages
    )
    return file.getvalue()


def onnx_model(case: Case) -> bytes:
    """The layers as LSTM or GRU operators. Inputs x and, of a step or a block, the state h (and c); outputs alike."""
    if case.workload.blocks:
        return _exported_network(case)
    from onnx import TensorProto, checker, helper, numpy_helper

    w = case.workload
    order = [0, 3, 1, 2] if w.cell == "LSTM" else [1, 0, 2]  # i o f c, z r h
    states = ["h", "c"] if w.cell == "LSTM" else ["h"]
    element = TensorProto.DOUBLE if w.dtype == "float64" else TensorProto.FLOAT
    nodes, weights = [], []

    def constant(name: str, value: Array) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def gates(kind: str, layer: int) -> Array:
        ways = [suffix for of_layer, suffix in case.places() if of_layer == layer]
        turned = [np.split(case.parameters[f"{kind}_{way}"], GATES[w.cell]) for way in ways]
        return np.stack([np.concatenate([parts[gate] for gate in order]) for parts in turned])

    source = "x"
    for layer in range(w.layers):
        inputs = [
            source,
            constant(f"W{layer}", gates("weight_ih", layer)),
            constant(f"R{layer}", gates("weight_hh", layer)),
            constant(f"B{layer}", np.concatenate([gates("bias_ih", layer), gates("bias_hh", layer)], axis=1)),
        ]
        if w.mode in WITH_STATES:
            inputs += ["", *states]
        outputs = [f"Y{layer}", *(f"{state}_after" if w.mode in WITH_STATES else "" for state in states)]
        options = {"linear_before_reset": 1} if w.cell == "GRU" else {}
        direction = "bidirectional" if w.directions == 2 else "forward"
        nodes.append(helper.make_node(w.cell, inputs, outputs, hidden_size=w.hidden, direction=direction, **options))
        # [T, D, B, H] -> [T, B, D * H]
        if w.directions == 1:
            axis = constant(f"axis{layer}", np.array([1]))
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", axis], [f"y{layer}"]))
        else:
            shape = constant(f"shape{layer}", np.array([w.steps, w.batch, case.outputs]))
            nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t{layer}", shape], [f"y{layer}"]))
        source = f"y{layer}"
    nodes[-1].output[0] = "y"

    info = partial(helper.make_tensor_value_info, elem_type=element)
    of_state = [1, w.batch, w.hidden]
    graph = helper.make_graph(
        nodes,
        w.cell,
        [info("x", shape=case.x.shape), *(info(s, shape=of_state) for s in states if w.mode in WITH_STATES)],
        [
            info("y", shape=[w.steps, w.batch, case.outputs]),
            *(info(f"{s}_after", shape=of_state) for s in states if w.mode in WITH_STATES),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def inference_only(case: Case) -> None:
    if case.workload.mode == TRAIN:
        raise NotImplementedError("inference only")
    even_rows_only(case)


def outside_of_frameworks(case: Case) -> None:
    if case.workload.mode in HOMES:
        raise NotImplementedError(f"measured in {HOMES[case.workload.mode]} only")


def no_blocks(case: Case) -> None:
    if case.workload.mode == RUN:
        raise NotImplementedError("measured without blocks of a stream")


def single_layers_only(case: Case) -> None:
    if case.workload.mode == NETWORK:
        raise NotImplementedError("measured with layers by themselves only")


def even_rows_only(case: Case) -> None:
    outside_of_frameworks(case)
    if case.schedule:
        raise NotImplementedError("measured without lengths and resets")


def _onnxruntime_session(case: Case) -> Any:
    import onnxruntime

    inference_only(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx_model(case), options, providers=["CPUExecutionProvider"])


def _zero_states(case: Case) -> dict[str, Array]:
    w = case.workload
    if w.blocks:
        cells = [(f"{i}", block.kind, block.outputs) for i, block in enumerate(w.blocks) if block.is_recurrent]
    else:
        cells = [("", w.cell, w.hidden)] if w.mode in WITH_STATES else []
    return {
        f"{name}{number}": np.zeros((1, w.batch, hidden), w.dtype)
        for number, cell, hidden in cells
        for name in ("hc" if cell == "LSTM" else "h")
    }


def onnxruntime(case: Case) -> Party:
    """InferenceSession.run of the ONNX operator, all graph optimizations on, NumPy arrays in and out.

    Of a network the graph that torch.onnx.export makes, with the states as inputs and outputs.
    """
    session = _onnxruntime_session(case)
    feed = {"x": case.x, **_zero_states(case)}
    names = [name for name in feed if name != "x"]
    tokens = cycle(list(case.x[:, None])) if case.workload.takes_tokens else None

    def run() -> Any:
        if tokens is not None:
            feed["x"] = next(tokens)
        y, *after = session.run(None, feed)
        feed.update(zip(names, after, strict=True))
        return y

    return Party(run, lambda y: {"output": numpy_of(y).reshape(case.workload.steps, case.workload.batch, -1)})


def onnxruntime_bound(case: Case) -> Party:
    """InferenceSession.run_with_iobinding: inputs and outputs bound once, a step's state bound in place."""
    import onnxruntime

    session = _onnxruntime_session(case)
    binding = session.io_binding()
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    states = {name: wrap(value) for name, value in _zero_states(case).items()}
    w, tokens = case.workload, case.tokens()
    rows = (w.batch,) if w.blocks else (w.steps, w.batch)
    output = wrap(np.zeros((*rows, case.outputs), w.dtype))
    x = case.x if tokens is None else case.x[:1].copy()  # whose memory is the session's, too
    binding.bind_ortvalue_input("x", wrap(x))
    binding.bind_ortvalue_output("y", output)
    for name, value in states.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"{name}_after", value)

    def step_on(tokens: Iterator[int]) -> None:
        x[0, 0] = next(tokens)
        session.run_with_iobinding(binding)

    run = partial(session.run_with_iobinding, binding) if tokens is None else partial(step_on, tokens)
    return Party(run, lambda _: {"output": numpy_of(output.numpy()).reshape(w.steps, w.batch, -1)})


def openvino(case: Case) -> Party:
    """A model compiled with the latency hint and float32 kept, tensors shared with NumPy, InferRequest.infer."""
    import openvino as ov

    inference_only(case)
    single_layers_only(case)
    if case.workload.dtype != "float32":
        raise NotImplementedError("computes in float32 only")
    core = ov.Core()
    model = core.read_model(onnx_model(case), b"")
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    x = np.ascontiguousarray(case.x)
    request.set_tensor("x", ov.Tensor(x, shared_memory=True))
    # Two buffers for each state, exchanged after each step: input and output must not be the same.
    states = {name: [value, value.copy()] for name, value in _zero_states(case).items()}
    tensors = {name: [ov.Tensor(buffer, shared_memory=True) for buffer in pair] for name, pair in states.items()}
    turn = 0

    def run() -> Any:
        nonlocal turn
        for name, pair in tensors.items():
            request.set_tensor(name, pair[turn])
            request.set_tensor(f"{name}_after", pair[1 - turn])
        turn = 1 - turn
        request.infer()
        return request

    # x must live as long as the tensor that shares its memory.
    return Party(run, lambda result: {"output": numpy_of(result.get_tensor("y").data).reshape(*x.shape[:2], -1)})


# ---- JAX


def jax(case: Case) -> Party:
    """lax.scan over one fused cell, jit, arguments on the device; value_and_grad for training; a jitted cell.

    Rows of different lengths with a mask in each step.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    single_layers_only(case)
    no_blocks(case)
    w = case.workload
    if HOMES.get(w.mode) != "JAX":
        outside_of_frameworks(case)
    if w.rows == RESETS or (w.lengths is not None and w.directions == 2):
        raise NotImplementedError("measured with lengths in one direction only")
    jax.config.update("jax_enable_x64", w.dtype == "float64")
    active = None if w.lengths is None else jnp.asarray(np.arange(w.steps)[:, None, None] < w.lengths[:, None])
    parameters = {name: jnp.asarray(value) for name, value in case.parameters.items()}
    x = jnp.asarray(case.x)

    def lstm_cell(weight: Any, bias: Any, state: Any, sums: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(sums + h @ weight.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru_cell(weight: Any, bias: Any, state: Any, sums: Any) -> Any:
        (h,) = state
        sum_r, sum_z, sum_n = jnp.split(sums, 3, axis=-1)
        hidden_r, hidden_z, hidden_n = jnp.split(h @ weight.T + bias, 3, axis=-1)
        r, z = jax.nn.sigmoid(sum_r + hidden_r), jax.nn.sigmoid(sum_z + hidden_z)
        h = (1 - z) * jnp.tanh(sum_n + r * hidden_n) + z * h
        return (h,), h

    cell = lstm_cell if w.cell == "LSTM" else gru_cell

    def masked(body: Any, state: Any, sums_and_active: Any) -> Any:
        sums, active = sums_and_active
        after, h = body(state, sums)
        return tuple(jnp.where(active, new, old) for new, old in zip(after, state)), jnp.where(active, h, 0)  # noqa: B905

    def input_sums(p: Any, way: str, x: Any) -> Any:
        sums = x @ p[f"weight_ih_{way}"].T + p[f"bias_ih_{way}"]
        return sums + p[f"bias_hh_{way}"] if w.cell == "LSTM" else sums

    zero = jnp.zeros((w.batch, w.hidden), x.dtype)
    state = (zero, zero) if w.cell == "LSTM" else (zero,)

    def layers(p: Any, x: Any) -> Any:
        for layer in range(w.layers):
            ways = []
            for of_layer, way in case.places():
                if of_layer == layer:
                    body = partial(cell, p[f"weight_hh_{way}"], p[f"bias_hh_{way}"])
                    sums = input_sums(p, way, x)
                    if active is None:
                        ways.append(jax.lax.scan(body, state, sums, reverse=way.endswith("_reverse"))[1])
                    else:
                        ways.append(jax.lax.scan(partial(masked, body), state, (sums, active))[1])
            x = jnp.concatenate(ways, axis=-1)
        return x

    if w.mode in ONE_STEP:

        def lone_cell(p: Any, state: Any, x: Any) -> Any:
            return cell(p["weight_hh_l0"], p["bias_hh_l0"], state, input_sums(p, "l0", x))

        one_step = jax.jit(lone_cell)
        first = x[0]

        def step() -> Any:
            nonlocal state
            state, h = one_step(parameters, state, first)
            return h.block_until_ready()

        return Party(step, lambda h: {"output": numpy_of(h)[None]})
    if w.mode == FORWARD:
        forward = jax.jit(layers)
        return Party(lambda: forward(parameters, x).block_until_ready(), lambda y: {"output": numpy_of(y)})

    return _trained_in_jax(case, layers)


def _gatewise_in_jax(case: Case) -> Party:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import gatewise as gw
    import gatewise.jax
    import jax

    gw.set_num_threads(case.threads)
    jax.config.update("jax_enable_x64", case.workload.dtype == "float64")
    layer = getattr(gatewise.jax, case.workload.cell.lower())
    return _trained_in_jax(case, lambda parameters, x: layer(parameters, x, **case.schedule)[0])


def _trained_in_jax(case: Case, layers: Callable[[Any, Any], Any]) -> Party:
    """value_and_grad of what takes parameters and x and gives the output."""
    import jax
    import jax.numpy as jnp

    parameters = {name: jnp.asarray(value) for name, value in case.parameters.items()}
    x, grad_output = jnp.asarray(case.x), jnp.asarray(case.grad_output)

    def loss(p: Any, x: Any) -> Any:
        y = layers(p, x)
        return jnp.vdot(y, grad_output), y

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def collect(result: Any) -> dict[str, Array]:
        (_, y), (grads, grad_x) = result
        return {"output": numpy_of(y), "input": numpy_of(grad_x), **{n: numpy_of(g) for n, g in grads.items()}}

    return Party(lambda: jax.block_until_ready(gradients(parameters, x)), collect)


# ---- TensorFlow


def tensorflow(case: Case) -> Party:
    """keras.layers.LSTM or GRU in a tf.function, GradientTape for training; the layer's cell for a step."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import keras
    import tensorflow as tf

    even_rows_only(case)
    single_layers_only(case)
    no_blocks(case)
    w = case.workload
    if not tf.config.list_logical_devices("CPU"):
        raise NotImplementedError("no device")
    # Rows of a gate in Keras' order: i f c o, as PyTorch's; z r h for GRU.
    order = [0, 1, 2, 3] if w.cell == "LSTM" else [1, 0, 2]

    def reordered(value: Array) -> Array:
        parts = np.split(value, GATES[w.cell])
        return np.concatenate([parts[gate] for gate in order])

    def keras_weights(way: str) -> list[Array]:
        weight_ih, weight_hh, bias_ih, bias_hh = (
            reordered(case.parameters[f"{kind}_{way}"]) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        bias = bias_ih + bias_hh if w.cell == "LSTM" else np.stack([bias_ih, bias_hh])
        return [weight_ih.T, weight_hh.T, bias]

    def make() -> Any:
        return getattr(keras.layers, w.cell)(w.hidden, return_sequences=True, dtype=w.dtype)

    stack = [
        keras.layers.Bidirectional(make(), dtype=w.dtype) if w.directions == 2 else make() for _ in range(w.layers)
    ]
    x = tf.constant(case.x.swapaxes(0, 1))  # (B, T, I)
    value = x
    for layer, module in enumerate(stack):
        value = module(value)
        module.set_weights([v for of, way in case.places() if of == layer for v in keras_weights(way)])

    def layers(x: Any) -> Any:
        for module in stack:
            x = module(x)
        return x

    if w.mode in ONE_STEP:
        cell = stack[0].cell
        zero = tf.zeros((w.batch, w.hidden), w.dtype)
        state = [zero, zero] if w.cell == "LSTM" else [zero]
        one_step = tf.function(lambda x, state: cell(x, state))
        first = x[:, 0]

        def step() -> Any:
            nonlocal state
            y, state = one_step(first, state)
            return y.numpy()

        return Party(step, lambda h: {"output": h[None].copy()})
    if w.mode == FORWARD:
        forward = tf.function(layers)
        return Party(lambda: forward(x).numpy(), lambda y: {"output": y.swapaxes(0, 1)})

    grad_output = tf.constant(case.grad_output.swapaxes(0, 1))
    variables = [variable.value for module in stack for variable in module.trainable_variables]

    def gradients() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layers(x)
        return y, tape.gradient(y, [x, *variables], grad_output)

    train = tf.function(gradients)

    def run() -> Any:
        y, grads = train()
        return y.numpy(), grads

    def collect(result: Any) -> dict[str, Array]:
        y, (grad_x, *grads) = result
        back = np.argsort(order)
        named = {"output": y.swapaxes(0, 1), "input": grad_x.numpy().swapaxes(0, 1)}
        for (_, way), (kernel, recurrent, _) in zip(case.places(), zip(*[iter(grads)] * 3, strict=True), strict=True):
            for kind, grad in (("weight_ih", kernel), ("weight_hh", recurrent)):
                parts = np.split(grad.numpy().T, GATES[w.cell])
                named[f"{kind}_{way}"] = np.concatenate([parts[gate] for gate in back])
        return named

    return Party(run, collect)


def _set_tensorflow_threads(threads: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


class Peer(NamedTuple):
    make: Callable[[Case], Party]
    packages: tuple[str, ...]  # modules that it needs
    start: Callable[[int], None] | None = None  # called once, before anything else, with the number of threads


PEERS = {
    PLAIN: Peer(gatewise_plain, ("gatewise",)),
    "PyTorch": Peer(pytorch, ("torch",)),
    "PyTorch padded": Peer(pytorch_padded, ("torch",)),
    "ONNX Runtime": Peer(onnxruntime, ("onnxruntime", "onnx")),
    "ONNX Runtime bound": Peer(onnxruntime_bound, ("onnxruntime", "onnx")),
    "OpenVINO": Peer(openvino, ("openvino", "onnx")),
    "JAX": Peer(jax, ("jax", "jaxlib")),
    "TensorFlow": Peer(tensorflow, ("tensorflow", "keras"), _set_tensorflow_threads),
}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions that modules come from; PackageNotFoundError where a module is missing.

    A distribution need not have the name of its module: tensorflow-cpu, onnxruntime-openvino.
    """
    found = {}
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # of a folder that is no package
            raise PackageNotFoundError(package)
        names = _distributions().get(package, [package])
        name = package if package in names else names[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # it comes from a folder on the path
            found[name] = "unknown"
    return found


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
