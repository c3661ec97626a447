"""The leaves that a transformation is for, and the rate of what comes after the learning rate."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where

Number = float | jax.Array


def numbers(selector: _where.Selector, params: Any) -> list[int]:
    """The numbers of the leaves that a selector chooses.

    Raises:
        ValueError: where it matches no leaf.
    """
    chosen = jax.tree.leaves(selector.mask(params))
    return [i for i, yes in enumerate(chosen) if yes]


def floating_leaves(selector: _where.Selector, params: Any) -> list[jax.Array]:
    """The leaves chosen, at ``init``.

    Raises:
        ValueError: where the selector matches no leaf, or one that is no floating array.
    """
    chosen = _only(selector, params)
    _tree.check_floating("params", chosen)
    return jax.tree.leaves(chosen)


def real_leaves(selector: _where.Selector, params: Any) -> list[jax.Array]:
    """The same, where complex leaves are refused, too."""
    chosen = floating_leaves(selector, params)
    _tree.check_real("params", _only(selector, params))
    return chosen


def copies(
    selector: _where.Selector, params: Any, leaves: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Copies of leaves where params are chosen: params may be donated, and changed.

    As a tuple, which the state of any Flax optimizer can hold: an older ``nnx.Optimizer`` takes
    each variable of a tree like params for an array.
    """
    return tuple(jnp.copy(leaves[i]) for i in numbers(selector, params))


def _only(selector: _where.Selector, params: Any) -> Any:
    """The tree with the leaves chosen alone."""
    return jax.tree.map(lambda p, yes: p if yes else None, params, selector.mask(params))


def rate_of(
    rate: Number | optax.Schedule | None, learning_rate: Number | None, count: jax.Array
) -> Any:
    """The rate at a step: a transformation's own, or the learning rate.

    Raises:
        ValueError: where neither is known.
    """
    if rate is not None:
        return at(rate, count)
    if learning_rate is None:
        raise _check.ArgumentError(
            "rate",
            "None outside of jaxreg.regularize, where no learning rate is known",
            "a number >= 0 or a schedule, such as the one the optimizer is given",
        )
    return learning_rate


def at(value: Number | optax.Schedule, count: jax.Array) -> Any:
    """A number, or a schedule's value at a step."""
    return value(count) if _check.is_schedule(value) else value


def stepped(count: jax.Array) -> jax.Array:
    """The next count."""
    return jnp.asarray(optax.safe_increment(count))


def moved(p: jax.Array, u: jax.Array) -> jax.Array:
    """The weights after the step, p + u, in the dtype that p's steps are computed in."""
    return _tree.widen(p) + u.astype(_tree.wide_dtype(p.dtype))


def move_to(w: jax.Array, p: jax.Array) -> jax.Array:
    """The update that takes p to w.

    Of numbers in p's dtype: where w and p are within a factor of 2 the difference is exact, so that
    ``optax.apply_updates`` gives w; and to a zero it is -p exactly.
    """
    return w.astype(p.dtype) - p
