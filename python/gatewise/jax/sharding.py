"""Which arrays vary over the devices of a mesh.

Inside shard_map an array either varies over axes of the mesh or is the same on all devices. All operands of a call must
be alike in this, as those of an addition must, and so are its results. Where weights are made to vary, JAX sums their
gradients over the devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from gatewise.jax.options import Operands


def _varying_axes(abstract_value: Any) -> frozenset[Any]:
    if hasattr(abstract_value, "mat"):  # JAX 0.10
        return frozenset(getattr(abstract_value.mat, "varying", ()))
    return frozenset(getattr(abstract_value, "vma", ()))


def make_varying_alike(operands: Operands) -> list[Any]:
    """Let all operands vary over the axes that any of them varies over."""
    if not hasattr(jax, "typeof"):  # JAX 0.5, which makes no difference between them
        return list(operands)
    varying = [_varying_axes(jax.typeof(operand)) for operand in operands]
    all_axes = frozenset().union(*varying)
    vary = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else getattr(jax.lax, "pvary", None)
    return [
        vary(operand, tuple(all_axes - axes)) if vary and all_axes - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    ]


def abstract_result(result: jax.ShapeDtypeStruct, operand: Any) -> Any:
    """The abstract value of a result, which varies over the axes that an operand varies over."""
    if not _varying_axes(operand):
        return jax.core.ShapedArray(result.shape, result.dtype)
    spec = jax.sharding.PartitionSpec(*(None for _ in result.shape))
    return operand.update(
        shape=result.shape, dtype=np.dtype(result.dtype), weak_type=False, sharding=operand.sharding.update(spec=spec)
    )
