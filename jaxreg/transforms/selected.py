"""The leaves that a transformation is for, and the rate of what comes after the learning rate."""

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
    """The same, for states that depend on the parameters: these are not None, and no complex."""
    chosen = floating_leaves(selector, _check.params_given(params, "init(params)"))
    _tree.check_real("params", _only(selector, params))
    return chosen


def copies(name: str, tree: Any, selector: _where.Selector, params: Any) -> tuple[jax.Array, ...]:
    """Copies of a tree's leaves where params are chosen; "init" stands for params themselves.

    Copies, as what is given may be donated, and changed. As a tuple, which the state of any Flax
    optimizer can hold: an older ``nnx.Optimizer`` takes each variable of a tree like params for an
    array.

    Raises:
        ValueError: in the name of an argument, where there are no params or the tree is not like
            them.
    """
    if params is None:
        given = f"{_check.describe(tree)} without parameters at init"
        raise _check.ArgumentError(name, given, "a call init(params) with the parameters")
    own = isinstance(tree, str)
    leaves = jax.tree.leaves(params) if own else _tree.leaves_like(name, tree, params)
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
        return at("rate", rate, count)
    if learning_rate is None:
        raise _check.ArgumentError(
            "rate",
            "None outside of jaxreg.regularize, where no learning rate is known",
            "a number >= 0 or a schedule, such as the one the optimizer is given",
        )
    return learning_rate


def at(name: str, value: Number | optax.Schedule, count: jax.Array) -> Any:
    """A number, or a schedule's value at a step.

    Raises:
        ValueError: where the schedule gives no scalar.
    """
    found: Any = value(count) if _check.is_schedule(value) else value
    if jnp.shape(found) != ():
        given = f"a schedule that gives {_check.describe(found)}"
        raise _check.ArgumentError(name, given, "a schedule that gives one number")
    return found


def product(rate: Any, strength: Any, dtype: Any) -> jax.Array:
    """Rate * strength, which may have any dtypes, in one."""
    return jnp.asarray(rate).astype(dtype) * jnp.asarray(strength).astype(dtype)


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
