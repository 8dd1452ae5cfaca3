"""Calls that gatewise cannot take go to PyTorch: the same results, and the same errors."""

import pytest
from torch_modules import (
    CELLS,
    LAYERS,
    MARKS,
    NN,
    assert_same_outcome,
    flat,
    members,
    plain_call,
    state_for,
    step_state,
    torch,
    twins,
)

pytestmark = MARKS


BAD_CALLS = {
    "a wrong size": lambda m: m(torch.zeros(3, 2, 4, dtype=torch.float64)),
    "one axis": lambda m: m(torch.zeros(5, dtype=torch.float64)),
    "four axes": lambda m: m(torch.zeros(1, 1, 1, 5, dtype=torch.float64)),
    "another dtype": lambda m: m(torch.zeros(3, 2, 5)),
    "integers": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.int64)),
    "no tensor": lambda m: m([[1.0]]),
    "a state of another batch": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.float64), state_for(m, 3)),
    "an unbatched state": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.float64), state_for(m)),
    "no rows": lambda m: m(torch.zeros(3, 0, 5, dtype=torch.float64)),
    "the meta device": lambda m: m.to("meta")(torch.zeros(3, 2, 5, dtype=torch.float64, device="meta")),
    "half": lambda m: m.bfloat16()(torch.ones(3, 2, 5, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_calls(kind, name):
    theirs, ours = twins(kind, 5, 9)
    if name == "the meta device":
        assert BAD_CALLS[name](ours)[0].device.type == "meta"
        return
    assert_same_outcome(ours, theirs, BAD_CALLS[name])


def test_no_steps():
    """PyTorch raises an error for a sequence without steps, and so do we."""
    theirs, ours = twins("LSTM", 5, 9)
    assert_same_outcome(ours, theirs, lambda m: m(torch.zeros(0, 2, 5, dtype=torch.float64)))


def test_autocast_and_transforms():
    theirs, ours = twins("LSTM", 5, 9, dtype=torch.float32)
    x = torch.randn(3, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outcome(ours, theirs, lambda m: m(x))
        with pytest.raises(NotImplementedError, match=r"^lengths, resets, checkpoint_every: .* got autocast"):
            ours(x, lengths=[1, 2])
    theirs, ours = twins("RNN", 5, 9)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    for transform in (
        lambda m: (torch.func.vmap(lambda x: m(x)[0], randomness="same")(x),),
        lambda m: (torch.func.grad(lambda x: m(x)[0].sum())(x[0]),),
        lambda m: (torch.func.jvp(lambda x: m(x)[0], (x[0],), (x[1],))[1],),
    ):
        assert_same_outcome(ours, theirs, transform)


def test_forward_mode_derivatives():
    theirs, ours = twins("RNN", 5, 9)
    x, tangent = torch.randn(2, 3, 2, 5, dtype=torch.float64)

    def call(module):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return (torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent,)

    assert_same_outcome(ours, theirs, call)


class Subclass(torch.Tensor):
    pass


class Counting(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Refusing(torch.overrides.TorchFunctionMode):
    """A mode that must not see the questions that gatewise asks about tensors."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        assert function is not torch.Tensor.is_neg
        return function(*arguments, **(options or {}))


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that must see operations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.operations += 1
        return function(*arguments, **(options or {}))

    def __exit__(self, *error):
        assert self.operations
        return super().__exit__(*error)


def without_memory(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def misaligned(tensor):
    memory = bytearray(b"four" + tensor.numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=4).view(tensor.shape)


def leaked(tensor):
    """A tensor of a transform that has ended."""
    tensors = []
    torch.func.grad(lambda x: (tensors.append(x), x.sum())[1])(tensor)
    return tensors[0]


ODD_TENSORS = {
    "negated": lambda t: torch._neg_view(t),
    "negated by a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "every second unit": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows between others": lambda t: torch.stack([t, t], -2)[..., 0, :],
    "one row for all": lambda t: t[:1].expand_as(t),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a Parameter": lambda t: NN.Parameter(t),
    "a tensor that needs a gradient": lambda t: t.clone().requires_grad_(),
    "a subclass": lambda t: t.as_subclass(Subclass),
    "zero by its kind": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex128),
    "integers": lambda t: t.long(),
    "sparse": lambda t: t.to_sparse(),
    "on another device": lambda t: t.to("meta"),
    "left over from a transform": leaked,
    "without memory": without_memory,
    "misaligned": misaligned,
    "too few units": lambda t: t[..., :-1].contiguous(),
    "another batch": lambda t: t[:-1],
    "without a batch": lambda t: t[0],
    "no rows": lambda t: t[:0],
    "a number": lambda t: t.flatten()[0],
    "one axis more": lambda t: t[None],
    "an array": lambda t: t.numpy(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(kind, argument) for kind in (*CELLS, *LAYERS) for argument in ("xhc" if "LSTM" in kind else "xh")],
)
@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")
def test_odd_tensors(kind, argument, odd):
    """One tensor of a call is odd, after a plain call that has packed the weights."""
    if (kind, argument, odd) == ("LSTMCell", "c", "without memory"):
        pytest.skip("PyTorch itself crashes")
    theirs, ours = twins(kind, 9, 9)
    x, state = plain_call(kind)
    arguments = dict(zip("xhc", (x, *members(state)), strict=False))

    def call(module):
        x, *state = arguments.values()
        return module(x, tuple(state) if "LSTM" in kind else state[0])

    with torch.no_grad():
        call(ours)
        arguments[argument] = ODD_TENSORS[odd](arguments[argument])
        if odd == "on another device":
            for module in (theirs, ours):
                with pytest.raises((RuntimeError, NotImplementedError)):
                    torch.equal(flat(call(module))[0], torch.zeros(()))
        elif odd == "a subclass":
            assert [type(part) for part in flat(call(ours))] == [type(part) for part in flat(call(theirs))]
        else:
            assert_same_outcome(ours, theirs, call)


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
def test_odd_states(kind):
    theirs, ours = twins(kind, 9, 9)
    x, state = plain_call(kind)
    h = members(state)[0]
    with torch.no_grad():
        ours(x, state)
        for odd in (h, (h,), (h, h), [h, h], (h, h, h), (), "state", 1, (None, None), (h, None), None):
            assert_same_outcome(ours, theirs, lambda module, odd=odd: module(x, odd))


def traced(module, x, state):
    """Trace on one input, run on another."""
    function = torch.jit.trace(
        lambda x, *state: module(x, state if len(state) > 1 else state[0]), (x * 2, *members(state))
    )
    return function(x, *members(state))


def tangents(module, x, state):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        return [torch.autograd.forward_ad.unpack_dual(part).tangent for part in flat(module(dual, state))]


def within(context):
    def call(module, x, state):
        with context():
            return module(x, state)

    return call


ODD_MOMENTS = {
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a mode of functions": within(Counting),
    "a mode that refuses": within(Refusing),
    "a mode of operations": within(Watching),
    "a default device": within(lambda: torch.device("cpu")),
    "functionalize": lambda m, x, state: torch.func.functionalize(lambda x: m(x, state))(x),
    "vmap": lambda m, x, state: torch.vmap(lambda x: m(x)[0], randomness="same")(x),
    "a trace": traced,
    "forward-mode derivatives": tangents,
    "gradients": within(torch.enable_grad),
}


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
@pytest.mark.parametrize("moment", ODD_MOMENTS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_odd_moments(kind, moment):
    theirs, ours = twins(kind, 9, 9, dtype=torch.float32)
    x, state = plain_call(kind, torch.float32)
    with torch.no_grad():
        ours(x, state)
        assert_same_outcome(ours, theirs, lambda module: ODD_MOMENTS[moment](module, x, state))


@pytest.mark.parametrize("sizes", [(0, 9), (5, 0)], ids=str)
def test_cells_of_no_size(sizes):
    theirs, ours = twins("GRUCell", *sizes)
    x, state = torch.zeros(4, sizes[0], dtype=torch.float64), step_state(ours, 4)
    with torch.no_grad():
        assert_same_outcome(ours, theirs, lambda module: module(x, state))


def test_odd_weights():
    """Other weights with the address and the version of the packed ones."""
    theirs, ours = twins("GRUCell", 6, 9)
    x, state = torch.randn(4, 6, dtype=torch.float64), step_state(ours, 4)
    with torch.no_grad():
        weight = theirs.weight_ih.detach()
        for change in (
            torch._neg_view,
            lambda weight: weight.view(6, 27).T,
            lambda weight: weight.as_subclass(Subclass),
        ):
            for value in (weight, change(weight)):
                for module in (theirs, ours):
                    module.weight_ih = NN.Parameter(value)
                assert_same_outcome(ours, theirs, lambda module: module(x, state))


ATTRIBUTES = [
    ("RNNCell", {}, "nonlinearity", "relu"),
    ("RNNCell", {}, "nonlinearity", "other"),
    ("RNN", {}, "mode", "RNN_RELU"),
    ("LSTM", {}, "bias", False),
    ("LSTM", {"num_layers": 2}, "num_layers", 1),
    ("LSTM", {"bidirectional": True}, "bidirectional", False),
    ("LSTM", {}, "hidden_size", 4),
    ("GRU", {}, "input_size", 4),
    ("GRU", {}, "hidden_size", 4),
    ("GRU", {}, "bias", False),
    ("GRUCell", {}, "input_size", 4),
    ("GRUCell", {}, "hidden_size", 4),
    ("LSTM", {}, "batch_first", True),
]


@pytest.mark.parametrize(("kind", "options", "name", "value"), ATTRIBUTES, ids=str)
def test_changed_attributes(kind, options, name, value):
    """torch.nn reads attributes at each call, and so do we."""
    theirs, ours = twins(kind, 9, 9, **options)
    x, _ = plain_call(kind)
    with torch.no_grad():
        ours(x)
        for module in (theirs, ours):
            setattr(module, name, value)
        assert_same_outcome(ours, theirs, lambda module: module(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_weights_of_other_kinds(kind):
    """Weights may be misaligned, of another shape, or without memory. Good weights keep their resizable storage."""
    theirs, ours = twins(kind, 9, 9)
    x, _ = plain_call(kind)
    name = "bias_ih" if kind in CELLS else "bias_ih_l0"
    for change in (misaligned, lambda bias: bias[:1].clone(), lambda bias: bias[:-1].clone(), without_memory):
        value = NN.Parameter(change(getattr(theirs, name).detach()))
        with torch.no_grad():
            ours(x)
            originals = [getattr(module, name) for module in (theirs, ours)]
            for module in (theirs, ours):
                setattr(module, name, value)
            assert_same_outcome(ours, theirs, lambda module: module(x))
            for module, original in zip((theirs, ours), originals, strict=True):
                setattr(module, name, original)
    flat(ours(x))[0].sum().backward()
    assert all(parameter.untyped_storage().resizable() for parameter in ours.parameters())
