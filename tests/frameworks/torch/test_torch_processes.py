"""Modules of gatewise.torch in several threads and processes."""

import os
import subprocess
import sys
import threading

import gatewise._core as _core
import pytest
from torch_modules import LAYERS, MARKS, assert_equal_results, eligibility, gt, members, modules, torch, twins

pytestmark = MARKS


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("grad", [False, True])
def test_another_thread_restores_a_module_during_a_call(kind, grad, monkeypatch):
    """The module's class changes at each of the points where another thread may run."""
    theirs, ours = twins(kind, 5, 9)
    x = torch.randn(*(2,) * (kind in LAYERS), 3, 5, dtype=torch.float64)
    points = (
        (modules, "unsupported_mode"),
        (modules, "in_forward_mode"),
        (modules, "_needs_gradients"),
        (modules, "packed_weights"),
        (eligibility, "is_plain"),
        (eligibility, "have_shapes_of"),
    )
    for module, name in points:
        gt.accelerate(ours)
        original = getattr(module, name)

        def restoring(*arguments, original=original):
            gt.restore(ours)
            return original(*arguments)

        with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
            patch.setattr(module, name, restoring)
            assert_equal_results([members(ours(x))[0]], [members(theirs(x))[0]])
    gt.accelerate(ours)
    if kind in LAYERS:
        monkeypatch.setattr(modules, "unsupported_mode", lambda: gt.restore(ours) and eligibility.INVALID_FOR_TORCH)
        with pytest.raises(NotImplementedError, match=r"another thread called gatewise\.torch\.restore"):
            ours(x, lengths=[1, 2, 2])


def test_two_threads_use_one_module():
    _, ours = twins("LSTM", 16, 33)
    ours.eval()
    x = torch.randn(50, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(x)[0]
    differences = []

    def work():
        for _ in range(30):
            with torch.no_grad():
                y = ours(x)[0]
            if not torch.equal(y, expected):
                differences.append(y - expected)
            leaf = x.clone().requires_grad_()
            ours(leaf)[0].sum().backward(inputs=[leaf])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differences


class Rows(torch.utils.data.Dataset):
    """Items from a layer that has already run in the parent process."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((200, 64, 16), float(index)))[0][-1, 0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")  # by JAX, if other tests have used it
def test_data_loaders(context):
    """Workers do not hang after the parent has run the layer on several threads."""
    torch.manual_seed(1)
    layer = gt.LSTM(16, 64).eval()
    data = Rows(layer)
    expected = torch.stack([data[index] for index in range(6)])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert torch.allclose(torch.cat(list(loader)), expected, atol=1e-6)  # a spawned worker picks its own backend


def test_calls_keep_to_torchs_number_of_threads(monkeypatch):
    """A worker of a DataLoader, for example, sets it to one."""
    thread_counts = []
    original = _core.Foreign

    def foreign(*arguments):
        thread_counts.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(_core, "Foreign", foreign)
    _, ours = twins("LSTM", 5, 9)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours(torch.zeros(3, 2, 5, dtype=torch.float64))
    assert thread_counts == [1, 2]


RACE = """
import sys, threading, time, torch, gatewise.torch as gt
sys.setswitchinterval(1e-6)
layer, cell, x = gt.LSTM(8, 8).eval(), gt.GRUCell(8, 8).eval(), torch.randn(1, 1, 8)
end = time.monotonic() + 2

def change():
    while time.monotonic() < end:
        for module, name in ((layer, "weight_ih_l0"), (cell, "weight_ih")):
            setattr(module, name, torch.nn.Parameter(torch.randn_like(getattr(module, name))))

def use():
    state = h = None
    with torch.no_grad():
        while time.monotonic() < end:
            _, state = layer(x, state)
            h = cell(x[0], h)

errors = []
threading.excepthook = errors.append
threads = [threading.Thread(target=target) for target in (change, use, use)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""


def test_parameters_are_replaced_during_a_call():
    """A parameter may lose its last owner while the core reads it. No thread crashes, hangs or raises."""
    subprocess.run([sys.executable, "-c", RACE], check=True, timeout=120)


THREADS = """
import os, sys, torch, gatewise, gatewise.torch as gt
from gatewise.torch.packing import caches
torch.set_num_threads(1)
gatewise.set_num_threads(2)
module, x = gt.LSTM(128, 128).eval(), torch.zeros(50, 32, 128)
with torch.no_grad():
    module(x[:1, :1])  # packs the weights
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(int(sys.argv[1]))
    module(x)
    assert caches[id(module)]
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
@pytest.mark.skipif(not _core.configuration()["openmp"], reason="built without OpenMP")
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_calls_keep_to_torchs_number_of_threads(threads):
    done = subprocess.run([sys.executable, "-c", THREADS, str(threads)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads - 1


def test_the_import_is_lazy():
    code = "import sys, gatewise; assert 'torch' not in sys.modules; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "fine\n"
