"""Frozen modules, which compare PyTorch's counters instead of all weights."""

import copy
import gc
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_changes import (
    COUNTED,
    PARTIAL,
    WHOLE,
    assert_change_is_seen,
    by_optimizer,
    in_place,
    one_number,
)
from torch_modules import (
    CELLS,
    LAYERS,
    MARKS,
    NN,
    assert_equal_results,
    gt,
    members,
    mixed,
    packing,
    run,
    step_state,
    torch,
    twins,
    weight_of,
)

pytestmark = MARKS


def frozen_twins(kind, *sizes):
    theirs, ours = twins(kind, *sizes)
    assert gt.freeze(ours.eval()) is ours
    return theirs, ours


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("change", COUNTED, ids=lambda change: change.__name__)
def test_frozen_modules_see_what_is_counted(kind, change):
    assert_change_is_seen(kind, lambda ours: change(ours), 1, prepare=gt.freeze)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
@pytest.mark.parametrize(
    "action", [gt.thaw, gt.repack, gt.restore, lambda ours: ours.eval(), lambda ours: ours.double(), in_place]
)
def test_frozen_modules_see_uncounted_writes_later(kind, action):
    """An uncounted write goes unseen until thaw, repack or another action makes the module look at its weights."""
    theirs, ours = frozen_twins(kind, 5, 9)
    x = torch.randn(*(1,) * (kind == "LSTM"), 1, 5, dtype=torch.float64)
    with torch.no_grad():
        before = members(ours(x))[0]
        one_number(ours)
        assert torch.equal(members(ours(x))[0], before)
        action(ours)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([members(ours(x))[0]], [members(theirs(x))[0]])
        one_number(ours)
        theirs.load_state_dict(ours.state_dict())
        is_equal = torch.allclose(members(ours(x))[0], members(theirs(x))[0], rtol=0, atol=1e-12)
    assert is_equal == (action in (gt.thaw, gt.restore))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_frozen_modules_are_not_frozen(how):
    _, ours = frozen_twins("GRUCell", 5, 9)
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        other = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
        assert vars(other).keys() == vars(NN.GRUCell(5, 9)).keys()
        before = other(x)
        one_number(other)
        assert not torch.equal(other(x), before)
        before = ours(x)
        one_number(ours)
        assert torch.equal(ours(x), before)


def test_frozen_modules_compute_gradients_with_current_weights():
    theirs, ours = frozen_twins("GRU", 5, 9)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
    one_number(ours)
    theirs.load_state_dict(ours.state_dict())
    assert_equal_results(run(ours, x), run(theirs, x))
    with torch.no_grad():  # the packed weights have been forgotten
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_frozen_computed_weights_are_compared():
    """Weights that are computed from others are new tensors at each call."""
    _, ours = frozen_twins("LSTM", 5, 9)
    NN.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        before = ours(x)[0]
        packed = packing.caches[id(ours)].weights
        assert torch.equal(ours(x)[0], before)
        assert packing.caches[id(ours)].weights is packed
        ours.parametrizations.weight_hh_l0.original0.data[2] *= 2
        assert not torch.equal(ours(x)[0], before)


@pytest.mark.parametrize("hidden", [32, 128])
def test_frozen_weights_with_gaps_are_compared(hidden):
    """Their known values are a copy, and another weight may come to the address of the copy."""
    for attempt in range(60):
        torch.manual_seed(attempt)
        theirs, ours = torch.nn.GRU(hidden, hidden, bias=False), gt.GRU(hidden, hidden, bias=False)
        ours.load_state_dict(theirs.state_dict())
        ours.weight_ih_l0 = torch.nn.Parameter(torch.randn(3 * hidden, 2 * hidden)[:, :hidden])
        gt.freeze(ours)
        x = torch.randn(5, 2, hidden)
        with torch.no_grad():
            ours(x)
            for weight in [torch.randn(3 * hidden, hidden) / 10 for _ in range(4)]:
                ours.weight_ih_l0.data = weight
                theirs.weight_ih_l0.data = weight.clone()
                assert torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-4)


def test_what_can_be_frozen():
    model = gt.accelerate(mixed()).eval()
    assert gt.freeze(model) is model
    assert gt.thaw(model) is model
    assert gt.thaw(NN.Linear(2, 3)) is not None
    for model in (NN.Linear(2, 3), NN.Sequential(), mixed()):
        with pytest.raises(ValueError, match=r"^model: expected modules of gatewise.torch inside, got \w+ without any"):
            gt.freeze(model)


def test_frozen_modules_go_with_their_module():
    _, ours = frozen_twins("GRUCell", 5, 9)
    gc.collect()
    count = len(packing.frozen_modules)
    del ours
    gc.collect()
    assert len(packing.frozen_modules) == count - 1


def gradients(module):
    """A call with gradients, which changes no weight."""
    x = torch.ones(2, 5, dtype=weight_of(module).dtype, requires_grad=True)
    members(module(x))[0].sum().backward()


def restored_and_accelerated(module):
    gt.accelerate(gt.restore(module))


ACTIONS = [
    gradients,
    gt.freeze,
    gt.thaw,
    gt.repack,
    restored_and_accelerated,
    copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)),
    lambda module: module.float(),
    lambda module: module.double(),
    lambda module: module.train(),
    lambda module: module.eval(),
    lambda module: module.requires_grad_(False),
    lambda module: module.requires_grad_(True),
]


@settings(max_examples=200)
@given(
    kind=st.sampled_from([*LAYERS, *CELLS]),
    changes=st.lists(st.sampled_from([*WHOLE, *PARTIAL, *ACTIONS]), min_size=2, max_size=12),
    inference=st.booleans(),
)
def test_sequences_of_changes(kind, changes, inference):
    """Whatever is done to a module, it computes with its current weights, as torch.nn's module with the same ones."""
    theirs, ours = twins(kind, 5, 9)
    for change in [lambda module: None, *changes]:
        if change is by_optimizer:
            ours.requires_grad_(True)
        result = change(ours)
        ours = result if isinstance(result, NN.Module) else ours
        if ours in packing.frozen_modules and change not in COUNTED:
            gt.repack(ours)
        dtype = weight_of(ours).dtype
        theirs.to(dtype).load_state_dict(ours.state_dict())
        x = torch.randn(*(2,) * (kind in LAYERS), 3, 5, dtype=dtype)
        state = step_state(ours, 3, dtype=dtype) if kind in CELLS else None
        with torch.inference_mode(inference), torch.no_grad():
            for _ in range(2):
                actual, expected = members(ours(x, state))[0], members(theirs(x, state))[0]
                assert torch.allclose(actual, expected, rtol=0, atol=1e-10 if dtype is torch.float64 else 3e-3)
        assert gt.accelerated(ours) == [""]
