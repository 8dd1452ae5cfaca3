"""Which operands and results vary over the devices of a mesh."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from gatewise.jax.options import Operands

# Inside shard_map an array may vary over the axes of a mesh or be the same on all its devices. All operands of a call
# must be of one kind, as those of an addition must, and their results are; where the weights are made to vary, their
# gradients are summed over the devices.


def _varying(abstract: Any) -> frozenset[Any]:
    of = getattr(abstract, "mat", abstract)  # JAX 0.10; before that, the abstract value itself
    return frozenset(getattr(of, "varying" if of is not abstract else "vma", ()))


def alike(operands: Operands) -> list[Any]:
    if not hasattr(jax, "typeof"):  # JAX 0.5, which does not tell them apart
        return list(operands)
    own = [_varying(jax.typeof(one)) for one in operands]
    axes = frozenset().union(*own)
    vary = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else getattr(jax.lax, "pvary", None)
    return [
        vary(one, tuple(axes - varying)) if vary and axes - varying else one
        for one, varying in zip(operands, own, strict=True)
    ]


def abstract(one: jax.ShapeDtypeStruct, like: Any) -> Any:
    if not _varying(like):
        return jax.core.ShapedArray(one.shape, one.dtype)
    spec = jax.sharding.PartitionSpec(*(None for _ in one.shape))
    return like.update(
        shape=one.shape, dtype=np.dtype(one.dtype), weak_type=False, sharding=like.sharding.update(spec=spec)
    )
