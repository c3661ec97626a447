"""Norms and dtypes of arrays in trees.

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


def _sum_of_squares(parts: list[jax.Array], divisor: jax.Array) -> jax.Array:
    """Sum (x / divisor)^2 over every entry, accumulated in the dtype of `divisor`.

    Divided, not multiplied by the reciprocal, which overflows for denormal entries.
    """
    squares = [jnp.square(x.astype(divisor.dtype) / divisor) for x in parts]
    return sum(map(jnp.sum, squares), jnp.zeros((), divisor.dtype))


def _norm(leaves: list[jax.Array]) -> jax.Array:
    parts = [part for x in leaves for part in _real_parts(x)]
    dtype = widest_dtype(parts)
    one = jnp.ones((), dtype)
    plain = _sum_of_squares(parts, one)
    # Where some squares over- or underflow, a second pass works on the entries over the largest.
    # The bounds are far inside the range of the dtype: what underflows beside a sum above the
    # lower one is lost to rounding anyway.
    info = jnp.finfo(dtype)
    lower, upper = float(info.tiny) ** 0.5, float(info.max)

    def scaled() -> jax.Array:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)).astype(dtype) for x in parts]))
        usable = jnp.isfinite(largest) & (largest > 0)
        divisor = jnp.where(usable, largest, one)
        return jnp.where(usable, divisor * jnp.sqrt(_sum_of_squares(parts, divisor)), largest)

    in_range = (plain > lower) & (plain < upper)
    return jax.lax.cond(in_range, lambda: jnp.sqrt(plain), scaled)


def _real_parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


@jax.custom_jvp
def _safe_norm(leaves: list[jax.Array]) -> jax.Array:
    return _norm(leaves)


@_safe_norm.defjvp
def _safe_norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """d||x|| = <x, dx> / ||x||, and 0 at x = 0, where the norm has no gradient."""
    (leaves,), (dots,) = primals, tangents
    norm = _safe_norm(leaves)
    divisor = jnp.where(norm > 0, norm, 1)
    tangent = jnp.zeros_like(norm)
    for x, dx in zip(leaves, dots, strict=True):
        for part, dpart in zip(_real_parts(x), _real_parts(dx), strict=True):
            unit = part.astype(norm.dtype) / divisor
            tangent += jnp.sum(unit * dpart.astype(norm.dtype))
    return norm, tangent


def global_norm(tree: PyTree) -> jax.Array:
    r"""Euclidean norm of every entry of a tree, $\|x\| = \sqrt{\sum_i |x_i|^2}$.

    Accumulated in float32 at least, right where squares overflow or underflow, with gradient 0
    at 0. An infinite entry gives infinity, a NaN gives NaN.

    Args:
        tree: real or complex floating arrays of any shapes.

    Returns:
        A scalar: float64 where a leaf holds 64-bit floats, else float32. 0 for an empty tree.

    Raises:
        ValueError: where a leaf is not floating.

    >>> import jax.numpy as jnp, jaxreg
    >>> float(jaxreg.global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
    5.0
    >>> f"{jaxreg.global_norm(jnp.full(4, 1e-30)):.3g}"
    '2e-30'
    """
    tree = jax.tree.map(jnp.asarray, tree)
    check_floating("tree", tree)
    leaves = [x for x in jax.tree.leaves(tree) if x.size]
    return _safe_norm(leaves) if leaves else jnp.zeros((), jnp.float32)
