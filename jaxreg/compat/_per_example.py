"""optax's clips of per-example gradients; they are part of `jaxreg.compat.optax`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree, norms
from jaxreg.compat._numbers import Number, floating, limit
from jaxreg.transforms.clip import shrinking, times

PyTree = Any


def per_example_global_norm_clip(grads: PyTree, l2_norm_clip: Number) -> tuple[PyTree, jax.Array]:
    """The sum of gradients that are clipped one by one to the global norm `l2_norm_clip`.

    `jaxreg.per_example_clip` makes such gradients from a loss, without all of them in memory.

    Differs from optax's: an example whose squares overflow is clipped, not dropped; the sum does
    not depend on the accelerator's default precision of products.

    Args:
        grads: a tree of arrays, each with a leading batch axis.
        l2_norm_clip: a number >= 0, or a traced scalar.

    Returns:
        The sum, in the dtypes of `grads`, and the number of examples that were clipped, int32.

    Raises:
        ValueError: where the batch axes differ in length, or there are none.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> grads = [jnp.array([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0], [4.0, 0.0, 3.0], [3.0, 4.0, 0.0]])]
    >>> total, clipped = compat.per_example_global_norm_clip(grads, 1.25)
    >>> total[0].tolist(), int(clipped)
    ([1.75, 1.75, 1.75], 3)
    """
    leaves, treedef = _examples(grads)
    sums, clipped = _clipped_sums(leaves, limit("l2_norm_clip", l2_norm_clip))
    return treedef.unflatten(sums), clipped


def per_example_layer_norm_clip(
    grads: PyTree, global_l2_norm_clip: Number, uniform: bool = True
) -> tuple[PyTree, PyTree]:
    r"""The sum of gradients of which each leaf is clipped one by one.

    Leaf k of K, with a share $D_k / D$ of the entries, is clipped to the norm $C / \sqrt K$, or,
    unless `uniform`, to $C \sqrt{D_k / D}$, where C is `global_l2_norm_clip`.

    Differs from optax's: as `per_example_global_norm_clip` does.

    Args:
        grads: a tree of arrays, each with a leading batch axis.
        global_l2_norm_clip: C, a number >= 0, or a traced scalar.
        uniform: whether all leaves have the same limit.

    Returns:
        The sum, in the dtypes of `grads`, and a tree like it of the numbers of examples that were
        clipped, int32.

    Raises:
        ValueError: as `per_example_global_norm_clip` does.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> grads = [jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[8.0, 6.0], [0.0, 0.0]])]
    >>> total, clipped = compat.per_example_layer_norm_clip(grads, 2.5 * 2**0.5)
    >>> [[round(float(x), 5) for x in leaf] for leaf in total], [int(n) for n in clipped]
    ([[1.5, 3.0], [2.0, 1.5]], [1, 1])
    """
    leaves, treedef = _examples(grads)
    most = limit("global_l2_norm_clip", global_l2_norm_clip)
    sizes = [1 if uniform else math.prod(leaf.shape[1:]) for leaf in leaves]
    shares = [(size / max(1, sum(sizes))) ** 0.5 for size in sizes]
    found = [_clipped_sums([leaf], most * s) for leaf, s in zip(leaves, shares, strict=True)]
    sums = treedef.unflatten([total for (total,), _ in found])
    return sums, treedef.unflatten([clipped for _, clipped in found])


def _examples(grads: PyTree) -> tuple[list[jax.Array], Any]:
    leaves, treedef = jax.tree.flatten(jax.tree.map(floating, grads))
    if len({leaf.shape[:1] or None for leaf in leaves} | {None}) != 2:
        given = f"arrays of shapes {', '.join(str(x.shape) for x in leaves) or 'none'}"
        raise _check.ArgumentError("grads", given, "arrays with one leading batch axis")
    return leaves, treedef


def _clipped_sums(leaves: Sequence[jax.Array], most: Number) -> tuple[list[jax.Array], jax.Array]:
    """The sum over the examples of each leaf, and how many were clipped."""
    found = jax.vmap(lambda example: norms.global_norm(example))(leaves)
    coefficients = shrinking(found, most)

    def total(leaf: jax.Array) -> jax.Array:
        each = jax.vmap(times)(_tree.widen(leaf), coefficients)
        return jnp.sum(each, axis=0).astype(leaf.dtype)

    # Not by the coefficient, which may round to 1.
    clipped = found > jnp.asarray(most).astype(found.dtype)
    return [total(leaf) for leaf in leaves], jnp.sum(clipped, dtype=jnp.int32)
