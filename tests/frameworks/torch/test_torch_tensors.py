"""Tensors between PyTorch and the core: any strides in, PyTorch's own tensors out, by DLPack's interface."""

import copy
import gc
import pathlib
import pickle
import shutil
import subprocess

import pytest
from torch_modules import (
    LAYERS,
    MARKS,
    REPOSITORY,
    assert_equal_results,
    flat,
    gt,
    packing,
    plain_call,
    state_for,
    torch,
    twins,
)

pytestmark = MARKS


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_plain_calls_of_any_strides(kind, options):
    """And with the bits, and without gradients the memory, of calls that go by the longer road."""
    theirs, ours = twins(kind, 9, 9, **options)
    whole = torch.randn(6, 8, 18, dtype=torch.float64)
    with torch.no_grad():
        for x in (
            whole[:3, :4, :9], whole[::2, ::2, 9:], whole.transpose(0, 1)[:3, :4, :9],
            whole[:1, :1, :9].expand(3, 4, 9), whole[:1, :4, :9], whole[:3, :1, :9], whole[0, :4, :9],
            whole[0, :1, :9], whole[0, ::3, :9],
        ):  # fmt: skip
            state = state_for(ours, *([] if x.dim() == 2 else [x.size(0 if ours.batch_first else 1)]))
            for before in (None, state):
                gt.repack(ours)
                first, second = flat(ours(x, before)), flat(ours(x, before))
                assert packing.caches[id(ours)]
                assert_equal_results(second, flat(theirs(x, before)))
                assert all(map(torch.equal, first, second))
                assert [part.shape for part in first] == [part.shape for part in second]
                assert all(part.is_contiguous() and not part.requires_grad for part in second)


def test_tensors_made_by_the_core_are_torchs():
    """What may be done with any tensor may be done with them, long after their module."""
    _, ours = twins("LSTM", 9, 9)
    x, state = plain_call("LSTM")
    with torch.no_grad():
        ours(x, state)
        found = ours(x, state)
    y, (h, _) = found
    kept = y.clone()
    del ours, found
    gc.collect()
    y.add_(1).sub_(1)
    assert torch.allclose(y, kept)
    assert torch.equal(pickle.loads(pickle.dumps(h)), h)
    assert torch.equal(copy.deepcopy(h), h)
    h.numpy()[...] = 2
    assert float(h.sum()) == 2 * h.numel()
    assert y.data_ptr() % 64 == 0
    assert h.share_memory_().is_shared()
    weight = torch.ones(9, dtype=torch.float64, requires_grad=True)
    (y * weight).sum().backward()
    assert torch.allclose(weight.grad, kept.sum((0, 1)))
    ours = twins("LSTM", 9, 9)[1]
    with torch.inference_mode():
        ours(x, state)
        assert all(part.is_inference() for part in flat(ours(x, state)))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_the_interface_is_dlpacks(tmp_path):
    """Each offset that the core relies on, against the header that comes with PyTorch."""
    names = {
        "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
        "Device": ("DLDevice", {"type": "device_type", "number": "device_id"}),
        "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
        "Tensor": (
            "DLTensor",
            {
                "data": "data", "device": "device", "axes": "ndim", "dtype": "dtype", "shape": "shape",
                "strides": "strides", "byte_offset": "byte_offset",
            },
        ),
        "Owned": (
            "DLManagedTensorVersioned",
            {"version": "version", "owner": "manager_ctx", "free": "deleter", "flags": "flags", "tensor": "dl_tensor"},
        ),
        "ExchangeApi": (
            "DLPackExchangeAPI",
            {
                "version": "header.version", "older": "header.prev_api", "new_tensor": "managed_tensor_allocator",
                "tensor_of_object": "managed_tensor_from_py_object_no_sync",
                "object_of": "managed_tensor_to_py_object_no_sync",
                "look": "dltensor_from_py_object_no_sync", "stream": "current_work_stream",
            },
        ),
    }  # fmt: skip
    checks = [
        f"static_assert(offsetof({ours}, {one}) == offsetof({theirs}, {other}));"
        f"static_assert(sizeof(std::declval<{ours}>().{one}) == sizeof(std::declval<{theirs}>().{other}));"
        for ours, (theirs, fields) in names.items()
        for one, other in fields.items()
    ]
    checks += [f"static_assert(sizeof({ours}) == sizeof({theirs}));" for ours, (theirs, _) in names.items()]
    checks += [
        "static_assert(int(cpu) == kDLCPU && version_major == DLPACK_MAJOR_VERSION);",
        "static_assert(int(unsigned_integer) == kDLUInt && int(floating) == kDLFloat);",
    ]
    source = tmp_path / "check.cpp"
    header = REPOSITORY / "cpp" / "bindings" / "dlpack.hpp"
    source.write_text(
        f'#include <cstddef>\n#include <utility>\n#include "ATen/dlpack.h"\n#include "{header}"\n'
        "using namespace gatewise::dlpack;\n" + "\n".join(checks)
    )
    include = pathlib.Path(torch.__file__).parent / "include"
    done = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
