"""Dtypes and checks of arrays in trees.

``None``, ``optax.MaskedNode`` and empty containers hold no leaves, so `jax.tree.map` and
`jax.tree.leaves` already pass over them; nothing here needs a special case for them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def wide_copy(tree: PyTree) -> PyTree:
    """A copy in the leaves' `wide_dtype`: one array that is there twice could not be donated."""
    return jax.tree.map(lambda x: jnp.array(x, wide_dtype(x.dtype), copy=True), tree)


def with_dtypes_of(before: PyTree, after: PyTree) -> PyTree:
    """A state after a step, in the dtypes that it had before, as the carry of a scan has to be."""

    def cast(a: Any, b: Any) -> Any:
        dtype = getattr(b, "dtype", None)
        return a if dtype == getattr(a, "dtype", None) else jnp.asarray(a, dtype)

    return jax.tree.map(cast, after, before)


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


def leaves_like(name: str, tree: PyTree, params: PyTree) -> list[Any]:
    """The leaves of a tree that stands beside the parameters, in their order.

    Leaves that ``optax.masked`` hides among the parameters may be there.

    Raises:
        ValueError: where a leaf is missing, there is one too many, or one has another shape or is
            no floating array.
    """
    check_floating(name, tree)
    own = dict(zip(where.paths(tree), jax.tree.leaves(tree), strict=True))
    wanted = dict(zip(where.paths(params), jax.tree.leaves(params), strict=True))
    extra = [] if nodes(params, optax.MaskedNode) else [path for path in own if path not in wanted]
    accepted = "a tree with the structure and shapes of the parameters"
    for path, p in wanted.items():
        if path not in own:
            given = f"a tree without the leaf {path}" if path else _check.describe(tree)
            raise _check.ArgumentError(name, given, accepted)
        if jnp.shape(own[path]) != jnp.shape(p):
            with _check.on_leaf(path):
                shapes = f"shape {jnp.shape(own[path])} for {jnp.shape(p)}"
                raise _check.ArgumentError(name, shapes, accepted)
    if extra:
        raise _check.ArgumentError(name, f"a leaf {extra[0]}, which params have not", accepted)
    return [own[path] for path in wanted]


def nodes(tree: PyTree, kinds: type | tuple[type, ...]) -> list[Any]:
    """The outermost nodes of the given types in a tree."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_one) if is_one(node)]
