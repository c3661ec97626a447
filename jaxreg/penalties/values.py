"""Values of penalties, to be logged or to be added to a loss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import as_penalties, places


def penalty_value(
    penalty: Penalty | Sequence[Penalty],
    params: Any,
    where: _where.Selector | str | None = None,
) -> jax.Array:
    r"""$\sum R(w)$ over the leaves of a tree: what a penalty comes to.

    To be logged, or added to a loss, where its gradient shrinks weights but makes no exact zeros:
    those need a proximal step (`jaxreg.prox_adam`). With ``jaxreg.L2(s)`` in the loss it is
    `jaxreg.l2_decay`.

    Args:
        penalty: one penalty or several, each on its own leaves (kernels by default; ``.on``).
        params: a tree of arrays.
        where: the leaves it is of, in place of the penalties' own: a selector or a path pattern.

    Returns:
        A scalar; float32 (float64 for 64-bit leaves). Infinite outside of a constraint.

    Raises:
        ValueError: where a penalty matches no leaf, or does not fit one.

    >>> import jax.numpy as jnp, jaxreg
    >>> params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([5.0])}
    >>> round(float(jaxreg.penalty_value(jaxreg.L1(0.1), params)), 6)
    0.3
    >>> float(jaxreg.penalty_value(jaxreg.L1(0.1), params, where="bias"))
    0.5
    """
    leaves, values = jax.tree.leaves(params), []
    for part in as_penalties(penalty):
        part = part if where is None else part.on(where)
        # One by one: values add up also where proximal operators do not.
        values += [place.penalty.value(place.of(leaves)) for place in places([part], params)]
    dtype = _tree.widest_dtype(values)
    return sum((value.astype(dtype) for value in values), jnp.zeros((), dtype))


def activity_penalty(activations: Any, penalty: Penalty) -> jax.Array:
    r"""$R(a_i)$ of each example's activations, to be added to its loss.

    With `L1` it is the sparse coding of hidden units; Keras' ``ActivityRegularization(l1, l2)`` is
    the mean over the batch with ``ElasticNet(l1, 2 * l2)``, whose L2 part is half of the square.

    Args:
        activations: a real floating array of shape (B, ...).
        penalty: a penalty of arrays of the shape of one example's.

    Returns:
        Shape (B,); float32 (float64 for 64-bit activations).

    Raises:
        ValueError: where the activations have no batch axis, or do not fit the penalty.

    >>> import jax.numpy as jnp, jaxreg
    >>> activations = jnp.array([[1.0, -2.0], [0.0, 3.0]])
    >>> jaxreg.activity_penalty(activations, jaxreg.L1(0.5)).tolist()
    [1.5, 1.5]
    """
    if not isinstance(penalty, Penalty):
        raise _check.ArgumentError("penalty", _check.describe(penalty), "a jaxreg penalty")
    activations = jnp.asarray(activations)
    if activations.ndim == 0:
        accepted = "an array of shape (B, ...)"
        raise _check.ArgumentError("activations", _check.describe(activations), accepted)
    with _check.of_argument("activations"):
        return jax.vmap(penalty.value)(activations)
