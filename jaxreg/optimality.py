"""How far parameters are from a stationary point of loss + penalty."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import global_norm
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import as_penalties, places


class Certificate(NamedTuple):
    """The result of `certificate`, a pytree.

    Attributes:
        total: the norm of all, a scalar.
        leaves: the norm of each leaf, scalars in the structure of the parameters; None for a leaf
            that was not looked at.
    """

    total: jax.Array
    leaves: Any


def certificate(
    params: Any,
    grads: Any,
    penalty: Penalty | Sequence[Penalty],
    where: _where.Selector | str | None = None,
    *,
    step: float | jax.Array = 1.0,
) -> Certificate:
    r"""How far from stationary: the Euclidean norm, per leaf and in total, in the gradient's units.

    On a leaf with a penalty that has one it is the norm of ``subdiff_distance``, the distance of
    $-grad$ to $\partial R$; for other penalties the norm of ``residual`` at `step`; on a leaf
    without a penalty the norm of the gradient. All are 0 exactly at a stationary point of loss +
    penalties. A leaf outside a constraint's set counts as infinite where there is a distance.

    Args:
        params: a tree of arrays.
        grads: the loss's gradients at params, without the penalty's; of the same structure.
        penalty: one penalty or several, as in `jaxreg.proximal`.
        where: the leaves to look at, a selector or path pattern; all by default.
        step: the step of ``residual``, > 0. For what is not convex, such as `NM`, take the step of
            the training: a larger one may leave a point where training stays.

    Returns:
        A `Certificate`. Under a joint penalty the leaves of a group have their own shares.

    Raises:
        ValueError: where the structures differ, or the penalties do not fit the tree.

    >>> import jax.numpy as jnp, jaxreg
    >>> params = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.array([1.0, 1.0])}
    >>> grads = {"kernel": jnp.array([[0.5, -1.0]]), "bias": jnp.array([0.0, 3.0])}
    >>> found = jaxreg.certificate(params, grads, jaxreg.L1(1.0))
    >>> float(found.total), {name: float(norm) for name, norm in found.leaves.items()}
    (3.0, {'bias': 3.0, 'kernel': 0.0})
    """
    leaves, treedef = jax.tree.flatten(params)
    if jax.tree.structure(grads) != treedef:
        given = f"a tree of structure {jax.tree.structure(grads)}"
        raise _check.ArgumentError("grads", given, f"the structure of params, {treedef}")
    errors: list[Any] = [_tree.widen(jnp.asarray(g)) for g in jax.tree.leaves(grads)]
    for place in places(as_penalties(penalty), params):
        x, grad = place.of(leaves), place.of(jax.tree.leaves(grads))
        if place.penalty.has_subdiff_distance:
            found = place.penalty.subdiff_distance(x, grad)
        else:
            found = place.penalty.residual(x, grad, step)
        for i, error in zip(jax.tree.leaves(place.leaves), jax.tree.leaves(found), strict=True):
            errors[i] = error
    selector = _where.everything if where is None else _where.as_selector(where)
    counted = jax.tree.leaves(selector.mask(params))
    kept = [error if yes else None for error, yes in zip(errors, counted, strict=True)]
    norms = [None if error is None else global_norm(error) for error in kept]
    return Certificate(global_norm(kept), jax.tree.unflatten(treedef, norms))
