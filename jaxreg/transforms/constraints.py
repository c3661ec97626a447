"""Projections after the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.constraints import Constraint
from jaxreg.penalties.joint import Joint
from jaxreg.penalties.placement import places
from jaxreg.transforms.parts import prox_step
from jaxreg.transforms.selected import move_to, moved


def constrain(*constraints: Penalty) -> optax.GradientTransformation:
    r"""Projects the weights after the step on constraints, $p' = \Pi(p + u)$.

    The nearest point in the Euclidean sense, as Keras's constraints are: max-norm, non-negative,
    unit norm. Its place is last in a chain, behind an optimizer. Under Adam, whose metric is
    another one, `jaxreg.proximal` projects in that metric, so that it stops at the minimizer among
    the weights allowed, which a Euclidean projection may miss.

    Through ``optax.apply_updates`` a zero is exact, and other bounds hold up to rounding.

    Args:
        *constraints: such as ``jaxreg.MaxNorm(3.0)``, ``NonNegative()``, ``UnitNorm()``, each for
            the leaves it was put ``.on`` (kernels by default). Several on one leaf need a sum in
            closed form.

    Returns:
        An optax transformation without a state. The updates of the leaves that are constrained
        have their dtypes. ``update`` needs ``params``.

    Raises:
        ValueError: where there is none, or one is no constraint; at ``init`` where one matches no
            leaf or does not fit one, or two on one leaf have no closed-form sum; at ``update``
            where params are missing.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.adam(0.1), jaxreg.constrain(jaxreg.NonNegative()))
    >>> w = jnp.array([0.05, 1.0])
    >>> updates, _ = tx.update(jnp.array([1.0, 0.0]), tx.init(w), w)
    >>> optax.apply_updates(w, updates).tolist()
    [0.0, 1.0]
    """
    if not constraints:
        raise _check.ArgumentError("constraints", "none", "one constraint or more")
    for one in constraints:
        inner = one.penalty if isinstance(one, Joint) else one
        if not isinstance(inner, Constraint):
            accepted = (
                "constraints, such as jaxreg.MaxNorm(3.0) or jaxreg.NonNegative(); a penalty has a "
                "step, which jaxreg.proximal and jaxreg.regularize(penalty=...) know"
            )
            raise _check.ArgumentError("constraints", _check.describe(one), accepted)

    def init(params: optax.Params) -> optax.EmptyState:
        try:
            places(constraints, params)
        except _check.ArgumentError as error:
            if error.name != "penalty":
                raise
            raise _check.ArgumentError("constraints", error.given, error.accepted) from None
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        chosen = {i for place in places(constraints, params) for i in jax.tree.leaves(place.leaves)}
        pairs = enumerate(zip(leaves, moves, strict=True))
        targets = [moved(p, u) if i in chosen else p for i, (p, u) in pairs]
        # A projection is the same for every step.
        step = lambda i: jnp.zeros((), targets[i].dtype)  # noqa: E731
        count = jnp.zeros((), jnp.int32)
        projected, _ = prox_step(
            constraints, ((),) * len(constraints), count, params, targets, step
        )
        for i, w in projected.items():
            moves[i] = move_to(w, leaves[i])
        return treedef.unflatten(moves), state

    return optax.GradientTransformation(init, update)
