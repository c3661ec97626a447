"""Steps on the sphere that each leaf starts on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, norms_of_groups, summed
from jaxreg.transforms.selected import move_to, numbers, rate_of, real_leaves, stepped

Number = float | jax.Array


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
        count: steps taken, an int32 scalar.
        radii: the norms that the leaves chosen have kept since ``init``, a vector.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    radii: jax.Array


def hyperball(
    rate: Number | optax.Schedule | None = None,
    *,
    where: _where.Selector | str = _where.kernels,
    axis_name: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Each leaf keeps its norm and turns by an angle of about the rate (Hyperball).

    $W \leftarrow R \, N(W - rate \, R \, N(d))$ with $N(x) = x / \|x\|_F$, d the direction and $R =
    \|W_0\|_F$: in place of weight decay, for layers whose scale is without effect. Its place is
    after the learning rate, as ``regularize(decay=...)`` or as a link behind an optimizer: the
    update $u = -lr \, d$ that comes in gives its sign and direction alone. The angle is
    $\arctan(rate)$ for a direction across the weights, and smaller along them.

    The norm is R after every step, up to the rounding of the weights: there is no drift, in bf16
    either, as each step starts anew from R. A leaf that starts at 0 stays there, and one whose
    direction is 0 stays where it is.

    Args:
        rate: a number >= 0, a traced scalar, or a schedule. None means the learning rate, which
            `jaxreg.regularize` and `jaxreg.proximal` supply (as the extra argument
            ``learning_rate`` of ``update``).
        where: the leaves it is for: a selector or a path pattern; by default kernels. The updates
            of the others pass. Layers that are stacked in one leaf have one norm.
        axis_name: inside ``shard_map``, the mesh axes that leaves are sharded along, as in
            `jaxreg.clip_by_global_norm`: norms are of whole leaves.

    Returns:
        An optax transformation with state `HyperballState`; the updates of the leaves it is for
        have their dtypes. ``update`` needs ``params``.

    Raises:
        ValueError: where the rate is negative or NaN; at ``init`` where the selector matches no
            leaf, or one that is not real floating; at ``update`` where params are missing, or
            where `rate` is None and nobody supplies the learning rate.

    Source: *Hyperball*, 2026, arXiv:2606.16899.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(0.1), jaxreg.hyperball(rate=1.0))
    >>> w = jnp.array([[3.0, 4.0]])
    >>> updates, _ = tx.update(jnp.array([[3.0, -4.0]]), tx.init(w), w)
    >>> print(optax.apply_updates(w, updates).round(4))
    [[0. 5.]]
    """
    rate = None if rate is None else _check.number_or_schedule("rate", rate)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> HyperballState:
        leaves = real_leaves(selector, params)
        radii = norms_of_groups([[p] for p in leaves], axis_name)
        return HyperballState(jnp.zeros((), jnp.int32), radii)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        learning_rate: Number | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HyperballState]:
        del extra_args
        params = _check.params_given(params)
        angle = rate_of(rate, learning_rate, state.count)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        chosen = numbers(selector, params)
        sizes = norms_of_groups([[moves[i]] for i in chosen], axis_name)
        turned = []
        for k, i in enumerate(chosen):
            dtype = _tree.wide_dtype(leaves[i].dtype)
            radius, size = state.radii[k].astype(dtype), sizes[k].astype(dtype)
            # In units of the radius, and divided by norms, whose inverse may be out of range.
            way = jnp.asarray(angle).astype(dtype) * (moves[i].astype(dtype) / _or_one(size))
            turned.append(leaves[i].astype(dtype) / _or_one(radius) + way)
        squares = [jnp.sum(jnp.square(w)).astype(state.radii.dtype) for w in turned]
        lengths = state.radii
        if chosen:
            lengths = state.radii / jnp.sqrt(_or_one(summed(squares, turned, axis_name)))
        for k, i in enumerate(chosen):
            moves[i] = move_to(lengths[k].astype(turned[k].dtype) * turned[k], leaves[i])
        return treedef.unflatten(moves), HyperballState(stepped(state.count), state.radii)

    return optax.GradientTransformationExtraArgs(init, update)


def _or_one(x: jax.Array) -> jax.Array:
    """X, and 1 where it is 0."""
    return jnp.where(x > 0, x, 1)
