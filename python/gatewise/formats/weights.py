"""Arrays that files hold become weights of layers."""

from __future__ import annotations

import numpy as np

from gatewise.arguments.arrays import Array


def widened(array: Array, kind: str) -> Array:
    """Numbers of float32 from those of float16, or of bfloat16: float32's upper half, here as whole numbers."""
    if kind == "float16":
        return array.astype(np.float32)
    if kind == "bfloat16":
        return (array.astype(np.uint32, order="C") << 16).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
