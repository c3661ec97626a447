"""Whether two programs give the same outputs, up to rounding."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def noisy(inputs: Any) -> Any:
    """The inputs with noise of the scale of each floating array."""
    rng = np.random.default_rng(0)

    def with_noise(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = np.asarray(x).astype(np.float64)
        finite = values[np.isfinite(values)]
        scale = np.sqrt(np.mean(finite**2)) if finite.any() else 1.0
        return jnp.asarray(values + scale * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(with_noise, inputs)


def difference(expected: Any, found: Any) -> float:
    """The largest difference of an output, over the largest one.

    What is NaN, or the same infinity, in both is equal.
    """
    (old, tree), (new, other) = jax.tree.flatten(expected), jax.tree.flatten(found)
    if tree != other or any(np.shape(a) != np.shape(b) for a, b in zip(old, new, strict=True)):
        return float("inf")
    largest = scale = 0.0
    for first, second in zip(old, new, strict=True):
        a, b = _numbers(first), _numbers(second)
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            gap = np.where(equal, 0.0, np.abs(a - b))
        largest = max(largest, float(np.max(np.nan_to_num(gap, nan=np.inf), initial=0.0)))
        scale = max(scale, float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0)))
    return largest / (scale or 1.0)


def _numbers(output: Any) -> np.ndarray:
    if jnp.issubdtype(jnp.result_type(output), jax.dtypes.prng_key):
        output = jax.random.key_data(output)
    array = np.asarray(output)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def rounding(dtypes: Iterable[Any]) -> float:
    """The difference that rounding in the coarsest of these dtypes explains.

    Not more than in bfloat16: in 8 bits anything would be the same.
    """
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return min(max((16 * float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0), 1 / 8)
