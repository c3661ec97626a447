"""Smoothed labels under optax's name."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.compat._numbers import Axes, Number, axes_of


def smooth_labels(
    labels: jax.Array, alpha: Number, *, axis: Axes = -1, where: Any = None
) -> jax.Array:
    r"""Labels mixed with the uniform distribution, $(1 - \alpha) q + \alpha / K$.

    `jaxreg.smoothed_cross_entropy` takes integer labels, and makes no such array.

    Differs from optax's: classes that `where` excludes get no share; alpha is checked.

    Args:
        labels: probabilities q, such as one-hot ones; a floating array.
        alpha: a number from 0 to 1, or a traced scalar.
        axis: of the classes, one or several; None for all.
        where: bools that broadcast with the labels: the K classes that get a share of alpha.
            Labels of which all classes are excluded stay as they are.

    Returns:
        An array of the labels' shape and dtype.

    Raises:
        ValueError: where the labels are no floating array or have no such axis, alpha is out of its
            range, or `where` does not broadcast with the labels.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> two_of_three = jnp.array([True, True, False])
    >>> compat.smooth_labels(jnp.array([1.0, 0.0, 0.0]), 0.5, where=two_of_three).tolist()
    [0.75, 0.25, 0.0]
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        accepted = "a real floating array, such as one-hot labels"
        raise _check.ArgumentError("labels", _check.describe(labels), accepted)
    alpha = _check.scalar("alpha", alpha, "a number from 0 to 1", lambda v: 0 <= v <= 1)
    q = _tree.widen(labels)
    share = jnp.asarray(alpha).astype(q.dtype)
    included = _included(where, q.shape)
    number = jnp.sum(included, axes_of(axis, q.shape), keepdims=True, dtype=q.dtype)
    uniform = jnp.where(included, 1 / jnp.maximum(number, 1), 0)
    share = jnp.where(number > 0, share, 0)  # of no class to share it among
    return ((1 - share) * q + share * uniform).astype(labels.dtype)


def _included(where: Any, shape: tuple[int, ...]) -> jax.Array:
    """Which entries are of a class that gets a share."""
    try:
        return jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), shape)
    except (TypeError, ValueError):
        accepted = f"bools that broadcast with the labels, of shape {shape}, or None"
        raise _check.ArgumentError("where", _check.describe(where), accepted) from None
