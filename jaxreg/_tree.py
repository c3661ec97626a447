"""Dtypes and checks of arrays in trees.

``None``, ``optax.MaskedNode`` and empty containers hold no leaves, so `jax.tree.map` and
`jax.tree.leaves` already pass over them; nothing here needs a special case for them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, where

PyTree = Any


def wide_dtype(dtype: Any) -> Any:
    """The dtype that sums and steps are computed in: `dtype`, or float32 where it is narrower."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def real_dtype(dtype: Any) -> Any:
    """The dtype of the real part of numbers of a dtype."""
    return jnp.finfo(dtype).dtype


def widen(x: jax.Array) -> jax.Array:
    """`x` in its `wide_dtype`."""
    return x.astype(wide_dtype(x.dtype))


def widest_dtype(tree: PyTree) -> Any:
    """float64 where a leaf holds 64-bit floats, else float32."""
    wide = any(jnp.finfo(leaf.dtype).bits == 64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_floating(name: str, tree: PyTree) -> None:
    """Raises where a leaf is not a real or complex floating array."""
    for path, leaf in zip(where.paths(tree), jax.tree.leaves(tree), strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            given = _check.describe(leaf) if dtype is None else f"{dtype} values"
            place = f" on the leaf {path}" if path else ""
            raise _check.ArgumentError(name, given + place, "floating arrays")


def check_real(name: str, tree: PyTree) -> None:
    """Raises where a leaf is not a real floating array."""
    check_floating(name, tree)
    for path, leaf in zip(where.paths(tree), jax.tree.leaves(tree), strict=True):
        if jnp.iscomplexobj(leaf):
            raise _check.ArgumentError(name, f"complex values on {path}", "real floating arrays")


def nodes(tree: PyTree, kinds: type | tuple[type, ...]) -> list[Any]:
    """The outermost nodes of the given types in a tree."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_one) if is_one(node)]
