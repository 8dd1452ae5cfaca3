"""The peers of gatewise, each used in the way its own documentation calls fastest; a file for each.

A peer's `make` takes a Case and returns a Party, whose `run` does the work once and is all that is timed. Its `refusal`
says why it takes no part in a workload; an exception in a workload that it does not refuse is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import NamedTuple

from ..cases import Case, Party
from ..workloads import PLAIN, Workload
from . import gatewise, jax, onnx_models, onnx_runtime, openvino, pytorch, tensorflow


class Peer(NamedTuple):
    make: Callable[[Case], Party]
    refusal: Callable[[Workload], str | None]  # why the peer takes no part in a workload; None where it does
    modules: tuple[str, ...]  # those that it needs; the first one is its own
    start: Callable[[int], None] | None = None  # called once, before anything else, with the number of threads
    is_variant: bool = False  # another use of a peer in this list, which starts in the same time
    computes_padding: bool = False  # all steps of all rows, whatever their lengths


GATEWISE = Peer(gatewise.make, gatewise.never_refuses, ("gatewise",))
PEERS = {
    PLAIN: Peer(gatewise.make_plain, gatewise.plain_refusal, ("gatewise",), is_variant=True, computes_padding=True),
    "PyTorch": Peer(pytorch.make, pytorch.refusal, ("torch",)),
    "PyTorch padded": Peer(
        pytorch.make_padded, pytorch.padded_refusal, ("torch",), is_variant=True, computes_padding=True
    ),
    "ONNX Runtime": Peer(onnx_runtime.make, onnx_models.refusal, ("onnxruntime", "onnx")),
    "ONNX Runtime bound": Peer(onnx_runtime.make_bound, onnx_models.refusal, ("onnxruntime", "onnx"), is_variant=True),
    "OpenVINO": Peer(openvino.make, openvino.refusal, ("openvino", "onnx")),
    "JAX": Peer(jax.make, jax.refusal, ("jax", "jaxlib")),
    "TensorFlow": Peer(tensorflow.make, tensorflow.refusal, ("tensorflow", "keras"), tensorflow.set_threads),
}


def peer_named(name: str) -> Peer:
    return GATEWISE if name == "gatewise" else PEERS[name]


def versions(modules: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that modules come from.

    A distribution need not have the name of its module: tensorflow-cpu, onnxruntime-openvino.

    Raises
    ------
    PackageNotFoundError
        If a module is not installed.
    """
    numbers = {}
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # a folder that is not a package has no origin
            raise PackageNotFoundError(module)
        names = _distributions().get(module, [module])
        name = module if module in names else names[0]
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:  # the module comes from a folder on the path
            numbers[name] = "unknown"
    return numbers


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
