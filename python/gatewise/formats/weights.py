"""Arrays that files hold become weights of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gatewise.arguments.arrays import Array, floating, shaped
from gatewise.weights.parameters import Packable

FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}


def layer_with(kind: type[Any], weights: Mapping[str, Array], **options: Any) -> Any:
    """Make a layer that has exactly these weights, and their dtype.

    Parameters
    ----------
    kind : a class of layers
    weights : mapping
        All weights of the layer by their names, of float32 or all of float64.
    **options
        Of the class, but for `dtype`.
    """

    def source(layer: Packable[Any]) -> dict[str, Array]:
        shapes = layer.shapes()
        if shapes.keys() != weights.keys():
            raise ValueError(f"expected {', '.join(sorted(shapes))}, got {', '.join(sorted(weights))}")
        arrays = {name: shaped(name, floating(name, weights[name], layer.dtype), shapes[name]) for name in shapes}
        return {name: np.array(array, order="C") for name, array in arrays.items()}

    dtypes = {array.dtype for array in weights.values()}
    if len(dtypes) != 1 or not dtypes <= FLOATS:
        raise ValueError(f"expected weights of float32 or of float64, got {', '.join(sorted(map(str, dtypes)))}")
    return kind._from(source, {**options, "dtype": dtypes.pop().name})


def widened(array: Array, kind: str) -> Array:
    """Numbers of float16 or bfloat16 as float32; others as they are, in the machine's byte order.

    NumPy lacks bfloat16, the upper half of a float32: here its numbers are whole numbers of 16 bits.
    """
    if kind == "float16":
        return array.astype(np.float32)
    if kind == "bfloat16":
        return (array.astype(np.uint32, order="C") << 16).view(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
