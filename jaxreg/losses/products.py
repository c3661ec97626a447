"""Products of matrices, accumulated in another dtype or on top of a sum."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def with_product(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Total + a^T b."""
    # XLA on a CPU writes a product down before it adds it, an array as large as the kernel: there
    # it is made in parts, that stay in the cache. Elsewhere products are added in their place.
    parts = math.gcd(8, total.shape[0]) if jax.default_backend() == "cpu" else 1
    width = total.shape[0] // parts

    def add(part: jax.Array, total: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(a, part * width, width, axis=1)
        own = jax.lax.dynamic_slice_in_dim(total, part * width, width)
        added = own + product(rows, b, (0, 0), total.dtype)
        return jax.lax.dynamic_update_slice_in_dim(total, added, part * width, axis=0)

    return jax.lax.fori_loop(0, parts, add, total)


def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """A product of matrices along these axes, accumulated and given in a dtype."""
    narrow = jnp.promote_types(a.dtype, b.dtype)
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        a.astype(narrow), b.astype(narrow), dimensions, preferred_element_type=dtype
    )
