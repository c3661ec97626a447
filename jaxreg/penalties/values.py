"""Values of penalties, to be logged or to be added to a loss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _tree
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
