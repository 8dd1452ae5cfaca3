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
    """A plain call in the core gives the same bits and layouts as the call before it, which packs the weights."""
    theirs, ours = twins(kind, 9, 9, **options)
    wide = torch.randn(6, 8, 18, dtype=torch.float64)
    with torch.no_grad():
        for x in (
            wide[:3, :4, :9],
            wide[::2, ::2, 9:],
            wide.transpose(0, 1)[:3, :4, :9],
            wide[:1, :1, :9].expand(3, 4, 9),
            wide[:1, :4, :9],
            wide[:3, :1, :9],
            wide[0, :4, :9],
            wide[0, :1, :9],
            wide[0, ::3, :9],
        ):
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
    """They can be used like any other tensor, long after their module is gone."""
    _, ours = twins("LSTM", 9, 9)
    x, state = plain_call("LSTM")
    with torch.no_grad():
        ours(x, state)
        y, (h, _) = ours(x, state)
    copy_of_y = y.clone()
    del ours
    gc.collect()
    y.add_(1).sub_(1)
    assert torch.allclose(y, copy_of_y)
    assert torch.equal(pickle.loads(pickle.dumps(h)), h)
    assert torch.equal(copy.deepcopy(h), h)
    h.numpy()[...] = 2
    assert float(h.sum()) == 2 * h.numel()
    assert y.data_ptr() % 64 == 0
    assert h.share_memory_().is_shared()
    weight = torch.ones(9, dtype=torch.float64, requires_grad=True)
    (y * weight).sum().backward()
    assert torch.allclose(weight.grad, copy_of_y.sum((0, 1)))
    ours = twins("LSTM", 9, 9)[1]
    with torch.inference_mode():
        ours(x, state)
        assert all(part.is_inference() for part in flat(ours(x, state)))


# Our name of each struct, its name in the header, and the names of its fields here and there.
STRUCTS = {
    "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
    "Device": ("DLDevice", {"type": "device_type", "number": "device_id"}),
    "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
    "Tensor": (
        "DLTensor",
        {
            "data": "data",
            "device": "device",
            "axes": "ndim",
            "dtype": "dtype",
            "shape": "shape",
            "strides": "strides",
            "byte_offset": "byte_offset",
        },
    ),
    "Owned": (
        "DLManagedTensorVersioned",
        {"version": "version", "owner": "manager_ctx", "free": "deleter", "flags": "flags", "tensor": "dl_tensor"},
    ),
    "ExchangeApi": (
        "DLPackExchangeAPI",
        {
            "version": "header.version",
            "older": "header.prev_api",
            "new_tensor": "managed_tensor_allocator",
            "tensor_of_object": "managed_tensor_from_py_object_no_sync",
            "object_of": "managed_tensor_to_py_object_no_sync",
            "look": "dltensor_from_py_object_no_sync",
            "stream": "current_work_stream",
        },
    ),
}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_the_interface_is_dlpacks(tmp_path):
    """Each offset that the core relies on is that of the header that comes with PyTorch."""
    checks = [
        f"static_assert(offsetof({ours}, {our_field}) == offsetof({theirs}, {their_field}));"
        f"static_assert(sizeof(std::declval<{ours}>().{our_field}) == sizeof(std::declval<{theirs}>().{their_field}));"
        for ours, (theirs, fields) in STRUCTS.items()
        for our_field, their_field in fields.items()
    ]
    checks += [f"static_assert(sizeof({ours}) == sizeof({theirs}));" for ours, (theirs, _) in STRUCTS.items()]
    checks += [
        "static_assert(int(cpu) == kDLCPU && version_major == DLPACK_MAJOR_VERSION);",
        "static_assert(int(unsigned_integer) == kDLUInt && int(floating) == kDLFloat);",
    ]
    source = tmp_path / "check.cpp"
    header = REPOSITORY / "cpp" / "bindings" / "frameworks" / "dlpack.hpp"
    source.write_text(
        f'#include <cstddef>\n#include <utility>\n#include "ATen/dlpack.h"\n#include "{header}"\n'
        "using namespace gatewise::dlpack;\n" + "\n".join(checks)
    )
    include = pathlib.Path(torch.__file__).parent / "include"
    done = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
