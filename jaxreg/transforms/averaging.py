"""Averages of weights, and what they do to zeros."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import as_penalties, places


def reapply(
    penalty: Penalty | Sequence[Penalty], params: Any, *, step: float | jax.Array = 1.0
) -> Any:
    r"""The penalties' proximal step on averaged weights: their zeros and constraints come back.

    An average of weights (``optax.ema``, SWA) has an exact zero only where all of them have, and
    is on no sphere that they are on. $w = \mathrm{prox}_{step}(average)$ has: with L1 of strength
    s, weights whose average is below step * s are zero again, and the others come that much
    nearer to 0. A projection is the same for every step.

    The optimizer's own step is its learning rate times its gain: under `jaxreg.prox_sgd` the
    learning rate is a natural choice, under `jaxreg.prox_adam` some multiple of it; a threshold t
    for L1 is step t / s.

    Args:
        penalty: one penalty or several. For a function of the step count give the penalty of the
            last step; for a `jaxreg.sparsity_target` its penalty times the last multiplier.
        params: a tree of averages.
        step: a scalar >= 0.

    Returns:
        A tree like params, with its dtypes.

    Raises:
        ValueError: as the penalties' ``prox`` does, and where they do not fit the tree.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.reapply(jaxreg.L1(0.25), {"kernel": jnp.array([[1.25, 0.001]])})["kernel"].tolist()
    [[1.0, 0.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    for place in places(as_penalties(penalty), params):
        moved = place.penalty.prox(place.of(leaves), step)
        for i, w in zip(jax.tree.leaves(place.leaves), jax.tree.leaves(moved), strict=True):
            leaves[i] = w
    return treedef.unflatten(leaves)
