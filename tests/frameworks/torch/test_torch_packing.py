"""Packed weights of gatewise.torch are never stale."""

import gc
import itertools
import threading

import gatewise._core as _core
import numpy as np
import pytest
from torch_changes import PARTIAL, WHOLE, assert_change_is_seen, matrices, one_number, through_numpy
from torch_modules import (
    CELLS,
    LAYERS,
    MARKS,
    NN,
    assert_equal_results,
    gt,
    members,
    packing,
    plain_call,
    tensors,
    torch,
    twins,
)

pytestmark = MARKS


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_packed_weights_are_forgotten(kind):
    """Training forgets packed weights, and so does whatever moves weights or sets an attribute."""
    _, ours = twins(kind, 9, 9)
    x, _ = plain_call(kind)
    for forget in (lambda: ours(x), lambda: ours.to(torch.float32), lambda: setattr(ours, "bias", True)):
        ours.to(torch.float64)
        with torch.no_grad():
            ours(x)
        assert id(ours) in packing.caches
        forget()
        assert id(ours) not in packing.caches


def test_packed_weights_go_with_their_module():
    _, ours = twins("GRUCell", 5, 9)
    with torch.no_grad():
        ours(torch.zeros(1, 5, dtype=torch.float64))
    key = id(ours)
    assert packing.caches[key].module() is ours
    del ours
    gc.collect()
    assert key not in packing.caches


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("change", WHOLE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rows", [1, 100])
def test_changes_are_seen(kind, change, rows):
    assert_change_is_seen(kind, change, rows)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("change", PARTIAL, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rows", [2, 63, 100])
def test_uncounted_changes_of_some_numbers_are_seen(kind, change, rows):
    assert_change_is_seen(kind, change, rows)


def test_the_least_bit_of_a_weight_is_seen():
    """The change is smaller than the tolerance of outputs, so the packed weights are compared."""
    _, ours = twins("GRUCell", 5, 9)
    with torch.no_grad():
        ours(torch.ones(1, 5, dtype=torch.float64))
        before = packing.caches[id(ours)].weights
        ours(torch.ones(1, 5, dtype=torch.float64))
        assert packing.caches[id(ours)].weights is before
        matrix = matrices(ours)[0]
        matrix[0, 0] = np.nextafter(matrix[0, 0], 2)
        ours(torch.ones(1, 5, dtype=torch.float64))
        assert packing.caches[id(ours)].weights is not before


def test_finite_differences():
    """Differences of a loss, by writes through `.data`, agree with backward."""
    torch.manual_seed(21)
    module, x, step = gt.LSTM(3, 7).double(), torch.randn(4, 2, 3, dtype=torch.float64), 1e-5

    def loss():
        return module(x)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(), module.weight_hh_l0)
    numerical, weight = torch.zeros_like(gradient), module.weight_hh_l0.data
    with torch.no_grad():
        loss()
        for index in np.ndindex(*weight.shape):
            number = weight[index].item()
            for sign in (1, -1):
                weight[index] = number + sign * step
                numerical[index] += sign * loss() / (2 * step)
            weight[index] = number
    assert torch.allclose(numerical, gradient, rtol=1e-5, atol=1e-8)


def known_weights(*weights):
    """Weights that the core compares with these; which ones it has packed does not matter."""
    packed = _core.Packed("gru", np.dtype(np.float32), 1, 1, 0, 1, 1, [[np.zeros((3, 1), "f4")] * 2 + [None] * 4])
    return _core.TensorWeights(tensors.tensor_library, ("any",) * len(weights), weights, lambda _: packed, False)


@pytest.mark.parametrize("size", [1, 3, 16, 31, 64, 65, 127, 128, 131, 300])
def test_each_bit_counts(size):
    """Fingerprints see each bit on each backend, whose blocks and last pieces differ in size."""
    import gatewise as gw

    default = gw.backend()
    rng = np.random.default_rng(size)
    for name in gw.backends():
        gw.use_backend(name)
        numbers = torch.from_numpy(rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32))
        others = torch.zeros(3)
        known, bits = known_weights(numbers, others), numbers.numpy().view(np.uint32)
        assert known.is_cacheable
        assert known.hold((numbers, others))
        for i in range(size):
            for bit in (0, 9, 23, 31):
                bits[i] ^= np.uint32(1 << bit)
                assert not known.hold((numbers, others))
                bits[i] ^= np.uint32(1 << bit)
        for i, j in itertools.combinations(range(min(size, 131)), 2):
            bits[[i, j]] = bits[[j, i]]
            assert known.hold((numbers, others)) == (bits[i] == bits[j])
            bits[[i, j]] = bits[[j, i]]
            bits[[i, j]] ^= np.uint32(1 << 31)
            assert not known.hold((numbers, others))
            bits[[i, j]] ^= np.uint32(1 << 31)
        assert known.hold((numbers, others))
        assert known.hold((numbers.clone(), others.clone()))
        assert not known.hold((numbers, others.view(1, 3)))
        assert not known.hold((numbers.double(), others))
        assert not known.hold((numbers,))
    gw.use_backend(default)


@pytest.mark.parametrize("layout", [lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w], 1)[:, : w.size(1)]])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_weights_of_any_layout_are_cached_and_seen(kind, layout):
    theirs, ours = twins(kind, 6, 9)
    x, state = torch.randn(*(1,) * (kind == "LSTM"), 4, 6, dtype=torch.float64), None
    name = "weight_hh_l0" if kind == "LSTM" else "weight_hh"
    setattr(ours, name, NN.Parameter(layout(getattr(ours, name).detach())))
    assert not getattr(ours, name).is_contiguous()
    with torch.no_grad():
        ours(x, state)
        before = packing.caches[id(ours)].weights
        ours(x, state)
        assert packing.caches[id(ours)].weights is before
        getattr(ours, name).data[3, 2] += 1
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([members(ours(x, state))[0]], [members(theirs(x, state))[0]])


def test_weights_written_while_they_are_packed_are_not_kept(monkeypatch):
    """Some of them may have been packed before they were written."""
    theirs, ours = twins("LSTM", 5, 9)
    x, original = torch.randn(2, 1, 5, dtype=torch.float64), packing.pack

    def pack(*arguments):
        packed = original(*arguments)
        ours.weight_ih_l0.data[0, 0] += 1
        return packed

    monkeypatch.setattr(packing, "pack", pack)
    with torch.no_grad():
        ours(x)
        assert id(ours) not in packing.caches
        monkeypatch.setattr(packing, "pack", original)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


@pytest.mark.parametrize("change", [lambda ours: setattr(ours, "nonlinearity", "relu"), gt.thaw], ids=["relu", "thaw"])
def test_weights_forgotten_while_they_are_packed_are_not_kept(change, monkeypatch):
    """If another thread changes the module meanwhile, the packed weights may no longer be what it would pack."""
    theirs, ours = twins("RNNCell", 5, 9)
    x, original = torch.randn(2, 5, dtype=torch.float64), packing.pack
    gt.freeze(ours)

    def pack(*arguments):
        thread = threading.Thread(target=change, args=(ours,))
        thread.start()
        thread.join()
        return original(*arguments)

    monkeypatch.setattr(packing, "pack", pack)
    with torch.no_grad():
        ours(x)
        assert id(ours) not in packing.caches
    assert not packing.packing_now
    monkeypatch.setattr(packing, "pack", original)
    theirs.nonlinearity = ours.nonlinearity
    gt.thaw(ours)
    with torch.no_grad():
        for _ in range(2):
            assert_equal_results([ours(x)], [theirs(x)])
            one_number(ours)
            theirs.load_state_dict(ours.state_dict())


def test_an_attribute_is_set_between_two_looks(monkeypatch):
    """A call while an attribute is being set must not leave packed weights that are older."""
    theirs, ours = twins("RNNCell", 5, 9)
    x, original = torch.randn(2, 5, dtype=torch.float64), NN.Module.__setattr__

    def setting(self, name, value):
        with torch.no_grad():
            ours(x)
        original(self, name, value)

    with torch.no_grad():
        monkeypatch.setattr(NN.Module, "__setattr__", setting)
        ours.nonlinearity = "relu"
        monkeypatch.undo()
        theirs.nonlinearity = "relu"
        assert_equal_results([ours(x)], [theirs(x)])


def test_a_call_after_an_attribute_is_set_packs_anew(monkeypatch):
    """Another thread may call a layer when an attribute is set, but its packed weights are not forgotten yet."""
    theirs, ours = twins("RNN", 5, 9)
    x, original = torch.randn(3, 2, 5, dtype=torch.float64), NN.Module.__setattr__
    outputs = []

    def setting(self, name, value):
        original(self, name, value)
        outputs.append(ours(x, lengths=[3, 3])[0])

    with torch.no_grad():
        ours(x)
        monkeypatch.setattr(NN.Module, "__setattr__", setting)
        ours.mode = "RNN_RELU"
        monkeypatch.undo()
        theirs.mode = "RNN_RELU"
        assert_equal_results(outputs, [theirs(x)[0]])


def test_a_thread_writes_to_weights_of_a_megabyte():
    """Large weights are read without the GIL: the memory that a parameter gives up must live until reading ends."""
    theirs, ours = twins("LSTM", 64, 160)
    ours.eval()
    x, end = torch.randn(2, 1, 64, dtype=torch.float64), threading.Event()

    def write():
        rng = np.random.default_rng(1)
        while not end.is_set():
            ours.weight_hh_l0.data[rng.integers(640), rng.integers(160)] += 0.01
            ours.weight_ih_l0.data = ours.weight_ih_l0.data * 0.999

    writer = threading.Thread(target=write)
    writer.start()
    with torch.no_grad():
        for _ in range(200):
            assert ours(x)[0].isfinite().all()
        end.set()
        writer.join()
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_the_core_refuses_invalid_weights():
    weights = (torch.zeros(3),)
    for arguments in (
        (None, ("any",), weights, lambda weights: None, False),
        (tensors.tensor_library, ("any",), weights, lambda weights: None, False),
        (tensors.tensor_library, ("any",), weights, lambda weights: 3, False),
        (tensors.tensor_library, ("any",), weights, None, False),
        (tensors.tensor_library, None, weights, lambda weights: None, False),
        (tensors.tensor_library, ("any",), (3,), lambda weights: None, False),
        (tensors.tensor_library, ("any",), (torch.zeros(3, dtype=torch.int64),), lambda weights: None, False),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
            _core.TensorWeights(*arguments)
    known = known_weights(*weights)
    assert not known.hold((3,))
    assert not known.hold((None,))
    for arguments in ((None, None, None), ({}, None, None), ({}, 3, 3)):
        assert known.step(*arguments) is None
        assert known.walk(*arguments, True) is None
    for method, count in ((known.step, 3), (known.walk, 4)):
        with pytest.raises(TypeError, match=f"expected {count} arguments, got 2"):
            method({}, None)
    for kind in (_core.TensorWeights, _core.TensorLibrary):
        with pytest.raises(TypeError):
            type("Own", (kind,), {})


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_new_weights_are_never_taken_for_old_ones(kind):
    """Freed memory is used again, at the same address with the same version."""
    _, ours = twins(kind, 8, 8)
    ours.eval()
    x = torch.randn(*(1,) * (kind == "LSTM"), 1, 8, dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    sums = set()
    with torch.no_grad():
        for i in range(20):
            fresh = {name: torch.full_like(value, 0.01 * i) for name, value in ours.named_parameters()}
            result = torch.func.functional_call(ours, fresh, (x,))
            sums.add(float(members(result)[0].sum()))
            del fresh, result
        assert len(sums) == 20
        NN.utils.parametrizations.weight_norm(ours, names[0])
        sums = set()
        for i in range(20):
            getattr(ours.parametrizations, names[0]).original0.fill_(0.1 * (i + 1))
            sums.add(float(members(ours(x))[0].sum()))
        assert len(sums) == 20


def test_writes_to_shared_memory_are_seen():
    theirs, ours = twins("LSTM", 5, 9)
    ours.eval()
    ours.share_memory()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        ours(x)
        through_numpy(ours)
        theirs.load_state_dict(ours.state_dict())
        assert_equal_results([ours(x)[0]], [theirs(x)[0]])


def test_another_backend_packs_anew():
    import gatewise as gw

    _, ours = twins("LSTM", 5, 9)
    ours.eval()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    default = gw.backend()
    with torch.no_grad():
        for name in gw.backends():
            gw.use_backend(name)
            ours(x)
            assert packing.caches[id(ours)].weights.packed.backend == name
    gw.use_backend(default)
