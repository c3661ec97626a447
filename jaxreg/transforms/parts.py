"""What an optimizer takes for a penalty, and the proximal step on a tree that it makes of it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import Place, as_tuple, places
from jaxreg.transforms.sparsity import SparsityTarget

Part = Penalty | Callable[[jax.Array], Penalty] | SparsityTarget
Parts = Part | Sequence[Part]


def as_parts(penalty: Parts) -> tuple[Part, ...]:
    """One penalty or a sequence of them as a tuple.

    Raises:
        ValueError: where one is nothing that makes a penalty.
    """
    parts = as_tuple(penalty)
    for part in parts:
        # A class is callable, too: the step count would become its strength.
        is_class = isinstance(part, type)
        if is_class or not (isinstance(part, (Penalty, SparsityTarget)) or callable(part)):
            accepted = (
                "a jaxreg penalty, a function of the step count that gives one, a "
                "jaxreg.sparsity_target, or a sequence of these"
            )
            raise _check.ArgumentError("penalty", _check.describe(part), accepted)
    return parts


def init_parts(parts: Sequence[Part], params: Any) -> tuple[tuple[Any, ...], list[Place]]:
    """The states of the parts, `()` for those that have none, and where they will act."""
    states = tuple(part.init() if isinstance(part, SparsityTarget) else () for part in parts)
    steered: set[int] = set()
    for part in (part for part in parts if isinstance(part, SparsityTarget)):
        own = {i for place in places([part.penalty], params) for i in _numbers(place)}
        if own & steered:
            path = _where.paths(params)[min(own & steered)]
            given = f"two sparsity_targets on {path}"
            raise _check.ArgumentError("penalty", given, "at most one for each leaf")
        steered |= own
    zero = jnp.zeros((), jnp.int32)
    penalties = [
        part.penalty if isinstance(part, SparsityTarget) else _given(part, zero) for part in parts
    ]
    return states, places(penalties, params)


def prox_step(
    parts: Sequence[Part],
    states: Sequence[Any],
    count: jax.Array,
    params: Any,
    targets: Sequence[jax.Array],
    step: Callable[[int], jax.Array],
) -> tuple[dict[int, jax.Array], tuple[Any, ...]]:
    """The proximal step from the targets.

    Args:
        parts: the penalties.
        states: of the parts.
        count: the number of the step.
        params: a tree.
        targets: the points it starts from, one for each leaf of params.
        step: the step of a leaf by its number: a scalar, or an array of its shape.

    Returns:
        The leaves that have a penalty, by their numbers and in their own dtypes; and the states.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]

    def moved(penalties: Sequence[Penalty], *, fixed: bool = False) -> dict[int, jax.Array]:
        found = {}
        for place in places(penalties, params):
            given = place.penalty, place.of(targets), _step_of(place, step, targets)
            penalty, x, steps = jax.lax.stop_gradient(given) if fixed else given
            w = penalty.prox(x, steps)
            pairs = zip(jax.tree.leaves(place.leaves), jax.tree.leaves(w), strict=True)
            found |= {i: part.astype(dtypes[i]) for i, part in pairs}
        return found

    def share_of_zeros(own: Penalty, others: Sequence[Penalty]) -> jax.Array:
        """Among the leaves of one penalty, with all the others in force."""
        found = moved([*others, own], fixed=True)
        leaves = [found[i] for place in places([own], params) for i in _numbers(place)]
        zeros = sum(jnp.sum(w == 0, dtype=jnp.float32) for w in leaves)
        return zeros / jnp.float32(max(1, sum(w.size for w in leaves)))

    # The targets come last, each with the multipliers before it for its own.
    penalties = [
        state.multiplier * part.penalty if isinstance(part, SparsityTarget) else _given(part, count)
        for part, state in zip(parts, states, strict=True)
    ]
    after = list(states)
    for k, part in enumerate(parts):
        if isinstance(part, SparsityTarget):
            others = [*penalties[:k], *penalties[k + 1 :]]
            share = lambda c, p=part, o=others: share_of_zeros(c * p.penalty, o)  # noqa: E731
            new = part.step(count, states[k], share)
            # A step of 0 says nothing about the strength.
            numbers = [i for place in places([part.penalty], params) for i in _numbers(place)]
            moves = jnp.stack([jnp.max(step(i), initial=0) > 0 for i in numbers]).any()
            after[k] = jax.tree.map(lambda a, b, m=moves: jnp.where(m, a, b), new, states[k])
            penalties[k] = after[k].multiplier * part.penalty
    return moved(penalties), tuple(after)


def _numbers(place: Place) -> list[int]:
    return jax.tree.leaves(place.leaves)


def _given(part: Any, count: jax.Array) -> Penalty:
    penalty = part if isinstance(part, Penalty) else part(count)
    if not isinstance(penalty, Penalty):
        given = f"a function that gives {_check.describe(penalty)}"
        raise _check.ArgumentError("penalty", given, "one that gives a jaxreg penalty")
    return penalty


def _step_of(place: Place, step: Callable[[int], jax.Array], targets: Sequence[jax.Array]) -> Any:
    """The step of one leaf, or of several joint ones; one scalar where all have the same."""
    if isinstance(place.leaves, int):
        return step(place.leaves)
    steps = {name: step(i) for name, i in place.leaves.items()}
    if place.penalty.elementwise_step:
        return {n: jnp.broadcast_to(steps[n], targets[i].shape) for n, i in place.leaves.items()}
    return next(iter(steps.values()))
