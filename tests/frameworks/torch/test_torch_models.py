"""Whole models are accelerated, restored, copied and saved."""

import copy
import io
import operator
import pickle
import pickletools
import warnings

import pytest
from torch_changes import (
    in_place,
)
from torch_modules import (
    CELLS,
    LAYERS,
    MARKS,
    NAMES,
    NN,
    TOKENS,
    Mixed,
    assert_equal_results,
    gt,
    mixed,
    torch,
)

pytestmark = MARKS


def curve(model, steps=8):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = NN.functional.cross_entropy(model(TOKENS), torch.tensor([0, 1, 2, 1]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_accelerate_and_restore():
    plain, model = mixed(), mixed()
    parameters, kinds = list(model.parameters()), [type(module) for module in model.modules()]
    for _ in range(2):
        assert gt.accelerate(model) is model
        assert gt.accelerated(model) == NAMES
    assert all(map(operator.is_, model.parameters(), parameters))
    assert str(model) == str(plain)
    assert isinstance(model.gru, NN.GRU)
    expected = curve(plain)
    assert curve(model) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    assert gt.restore(model) is model
    assert gt.accelerated(model) == []
    assert [type(module) for module in model.modules()] == kinds
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-3)


def test_optimizers_and_hooks_go_on():
    plain, model = mixed(), mixed()
    calls, optimizers = [], []
    for network in (plain, model):
        network.gru.register_forward_hook(lambda module, arguments, output: calls.append(module))
        optimizers.append(torch.optim.SGD(network.parameters(), 0.1))
    gt.accelerate(model)
    for network, optimizer in zip((plain, model), optimizers, strict=True):
        network(TOKENS).sum().backward()
        optimizer.step()
    assert len(calls) == 2
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies(how):
    model = gt.accelerate(mixed())
    with torch.no_grad():
        expected = model(TOKENS)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model if how == "save" else model.state_dict(), file)
        file.seek(0)
        if how == "save":
            twin = torch.load(file, weights_only=False)
        else:
            twin = Mixed()  # on torch.nn's classes
            twin.load_state_dict(torch.load(file, weights_only=True))
    if how != "state_dict":
        assert gt.accelerated(twin) == NAMES
    with torch.no_grad():
        assert torch.allclose(twin(TOKENS), expected, atol=1e-5)
        in_place(model.rnn)
        assert torch.allclose(twin(TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_pickles_name_the_public_module(kind):
    """Files of whole modules stay readable wherever in the package a class is defined."""
    module = getattr(gt, kind)(2, 3)
    names = {argument for _, argument, _ in pickletools.genops(pickle.dumps(module, protocol=2)) if argument}
    assert [name for name in names if str(name).startswith("gatewise")] == [f"gatewise.torch {kind}"]
    assert type(pickle.loads(pickle.dumps(module))) is type(module)


def test_the_package_shows_public_names_only():
    assert {name for name in dir(gt) if not name.startswith("__")} == set(gt.__all__)
    assert {getattr(gt, name).__module__ for name in gt.__all__} == {"gatewise.torch"}


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old weight_norm", "tied"])
def test_computed_weights(kind):
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        model = NN.Sequential(NN.LSTM(5, 6), NN.Identity())
        if kind == "weight_norm":
            NN.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
        elif kind == "spectral_norm":
            NN.utils.parametrizations.spectral_norm(model[0], "weight_hh_l0")
        elif kind == "old weight_norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                NN.utils.weight_norm(model[0], "weight_hh_l0")
        else:
            model[0].bias_hh_l0 = model[0].bias_ih_l0
        # In training, spectral_norm changes whenever the weight is read, which torch.nn.LSTM does four times a call.
        models.append(model.train(kind != "spectral_norm"))
    theirs, ours = models
    gt.accelerate(ours)
    assert gt.accelerated(ours) == ["0"]
    x = torch.randn(4, 3, 5)
    for _ in range(3):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(2)
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            optimizer.zero_grad()
            y = model[0](x)[0]
            y.sum().backward()
            optimizer.step()
            results.append([y, *(p.grad for p in model.parameters())])
        assert_equal_results(*results)
        for model in (ours, theirs):
            model.eval()
        with torch.no_grad():
            assert_equal_results([ours[0](x)[0]], [theirs[0](x)[0]])
        for model in (ours, theirs):
            model.train(kind != "spectral_norm")
    gt.restore(ours)
    assert gt.accelerated(ours) == []
    assert type(ours[0]).__mro__[: len(type(theirs[0]).__mro__)][-3:] == type(theirs[0]).__mro__[-3:]


def test_subclasses_with_code_of_their_own_are_left_alone():
    class Custom(NN.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    model = gt.accelerate(NN.Sequential(Custom(5, 6)))
    assert gt.accelerated(model) == []


def test_bad_models():
    for function in (gt.accelerate, gt.restore, gt.accelerated, gt.repack, gt.freeze, gt.thaw):
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
            function(3)
