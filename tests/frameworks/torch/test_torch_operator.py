"""The custom operator: torch.compile, torch.export and the export to ONNX."""

import io

import numpy as np
import pytest
from torch_modules import (
    LAYERS,
    MARKS,
    NN,
    architectures,
    assert_equal_results,
    gt,
    members,
    operator,
    packing,
    state_for,
    torch,
    twins,
)

pytestmark = MARKS


def operator_arguments(module, x, state=(), *, record=True, every=0, lengths=None, resets=None):
    weights = [getattr(module, name) for name in module._flat_weights_names]
    h, c = (*state, None, None)[:2]
    sizes = [module.input_size, module.hidden_size, module.num_layers, module.proj_size, every]
    flags = [module.bias, module.bidirectional, module.batch_first]
    return x, h, c, weights, architectures.LAYER_CELLS[module.mode], sizes, flags, lengths, resets, 0.0, None, record


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("call_options", [{}, {"every": 3}, {"lengths": torch.tensor([2, 7, 0])}], ids=str)
def test_opcheck(kind, options, call_options):
    _, ours = twins(kind, 5, 9, **options)
    x = torch.randn((3, 7, 5) if ours.batch_first else (7, 3, 5), dtype=torch.float64, requires_grad=True)
    arguments = operator_arguments(ours, x, members(state_for(ours, 3)), **call_options)
    torch.library.opcheck(torch.ops.gatewise.recurrent.default, arguments)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("every", [0, 3])
def test_tape_bytes_are_those_of_the_core(kind, dtype, every):
    _, ours = twins(kind, 5, 33, 3, bidirectional=True, dtype=dtype)
    options = operator.Options(*operator_arguments(ours, None, every=every)[4:-1])
    for steps, batch in ((1, 1), (7, 3), (10, 130)):
        x = torch.zeros(steps, batch, 5, dtype=dtype)
        weights = [getattr(ours, name) for name in ours._flat_weights_names]
        packed = packing.pack(options.architecture(dtype), weights)
        assert operator.tape_bytes(options, x) == options.call(x).on(packed).tape_bytes


@pytest.mark.parametrize("kind", LAYERS)
def test_the_operator_refuses(kind):
    _, ours = twins(kind, 5, 9)
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    good = operator_arguments(ours, x, members(state_for(ours, 3, requires_grad=False)))
    _, h, _, weights, *_ = good
    bad = [
        (0, x[..., :4]),
        (0, x[0]),
        (0, x.float()),
        (0, x.int()),
        (1, h[:, :1]),
        (1, h.float()),
        (2, torch.zeros(1, 3, 8)),
        (3, weights[1:]),
        (3, [weights[0].float(), *weights[1:]]),
        (3, [weights[0][1:], *weights[1:]]),
    ]
    for index, value in bad:
        with pytest.raises(ValueError, match=r"^gatewise::recurrent: "):
            torch.ops.gatewise.recurrent(*good[:index], value, *good[index + 1 :])


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
        default = gw.backend()
        gw.use_backend(next(name for name in gw.backends() if name != default))
        with pytest.raises(RuntimeError, match="another backend"):
            y.sum().backward()
        gw.use_backend(default)


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
    """One graph gives the same numbers and gradients, for several lengths."""
    torch.manual_seed(1)
    model = gt.accelerate(Classifier(kind, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((7, 3, 5), (9, 4, 5), (6, 5)):
        x = torch.randn(shape)
        results = []
        for call in (compiled, model):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.sin().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters())])
        assert_equal_results(*results)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_compile_refuses(dynamo):
    """A compiled layer refuses what the layer itself refuses, by an error of the same type, and ignores no option."""
    model = gt.GRU(5, 9)
    compiled = torch.compile(model, fullgraph=False, backend="aot_eager")
    for x, hx in (
        (torch.zeros(4, 3, 2), None),
        (torch.zeros(4, 3, 5), torch.zeros(1, 1, 9)),
        (torch.zeros(4, 3, 5), torch.zeros(1, 3, 9, dtype=torch.float64)),
        (torch.zeros(0, 3, 5), None),
    ):
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
    """PyTorch breaks its graph at any LSTM unless told otherwise. The results are the same."""
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
    loaded = torch.export.load(file).module()
    for length in (7, 12):
        x = torch.randn(length, 3, 5)
        assert torch.allclose(loaded(x), model(x), atol=1e-6)


def onnx_outputs(model, arguments, path, **options):
    """Outputs of ONNX Runtime for a model that PyTorch's default exporter wrote."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, arguments, path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    inputs = zip(session.get_inputs(), arguments, strict=True)
    return session.run(None, {input.name: x.numpy() for input, x in inputs})


@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {}), ("GRU", {"num_layers": 2, "bidirectional": True}), ("RNN", {}), ("GRUCell", {})],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx(kind, options, tmp_path):
    """A module on gatewise is exported like torch.nn's own, with ONNX's operators."""
    _, ours = twins(kind, 5, 6, dtype=torch.float32, **options)
    x = torch.randn(*(4,) * (kind in LAYERS), 3, 5)
    outputs = onnx_outputs(ours.eval(), (x,), tmp_path / "model.onnx")
    assert np.allclose(outputs[0], members(ours(x))[0].detach().numpy(), atol=1e-5)
    assert gt.accelerated(ours) == [""]


@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx_refuses(tmp_path):
    """The export of a program is refused, and the error says what to do."""
    _, ours = twins("LSTM", 5, 6, dtype=torch.float32)
    x = torch.randn(4, 3, 5)
    program = torch.export.export(ours.eval(), (x,))
    with pytest.raises(Exception, match=r"gatewise.torch.restore\(model\) before torch.export.export"):
        onnx_outputs(program, (x,), tmp_path / "model.onnx")
    assert torch.allclose(program.module()(x)[0], ours(x)[0])
