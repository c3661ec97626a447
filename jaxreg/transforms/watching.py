"""What a step does to the weights as a whole, for the log."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, summed
from jaxreg.transforms.selected import floating_leaves, numbers


class WatchState(NamedTuple):
    """What `watch` saw in the last step: numbers in float32 (float64 for 64-bit weights).

    Attributes:
        weight_norm: the norm of the weights after the step.
        update_norm: the norm of the step.
        ratio: of the two.
        angle: between the weights before and after, in radians.
        zeros: the share of weights that are exactly 0 after the step.
    """

    weight_norm: jax.Array
    update_norm: jax.Array
    ratio: jax.Array
    angle: jax.Array
    zeros: jax.Array


def watch(
    *, where: _where.Selector | str = _where.kernels, axis_name: AxisNames | None = None
) -> optax.GradientTransformation:
    r"""Records how far a step moves the weights, for `jaxreg.metrics`: the last link of a chain.

    With p' = p + u, rounded to the weights' dtype, u the step that is asked for, and all chosen
    leaves taken as one vector: the norms of p' and u; their ratio
    $\|u\| / \|p'\|$; the angle between p and p', which is what a step does to weights in front of
    a normalization, whose length does not matter; and the share of zeros in p'. Updates pass.
    The angle of a step that is nearly along the weights is right to 1/2000 of the ratio.

    On a GPU the sums are taken while the step is written. On a CPU XLA reads the step's inputs once
    more for each of them; ``bench/results`` has what it costs.

    Args:
        where: the leaves: a selector or a path pattern; by default kernels, as for decay.
        axis_name: as in `jaxreg.clip_by_global_norm`.

    Returns:
        An optax transformation with state `WatchState`. ``update`` needs ``params``.

    Raises:
        ValueError: where `where` is no selector; at ``init`` where it matches no leaf, or one that
            is not a floating array; at ``update`` where params are missing.

    Source: for the angle A. Kosson, B. Messmer and M. Jaggi, *Rotational equilibrium: how weight
    decay balances learning across neural networks*, ICML 2024, arXiv:2305.17212.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(1.0), jaxreg.watch())
    >>> w = jnp.array([3.0, 0.0])
    >>> _, state = tx.update(jnp.array([0.0, -4.0]), tx.init(w), w)
    >>> {name: round(float(value), 3) for name, value in jaxreg.metrics(state).items()}
    {'weights.norm': 5.0, 'weights.update_norm': 4.0, 'weights.update_ratio': 0.8,
     'weights.angle': 0.927, 'weights.zeros': 0.0}
    """
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> WatchState:
        dtype = _tree.widest_dtype(floating_leaves(selector, params))
        return WatchState(*(jnp.zeros((), dtype) for _ in WatchState._fields))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, WatchState]:
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        chosen, all_moves = numbers(selector, params), treedef.flatten_up_to(updates)
        before, moves = [leaves[i] for i in chosen], [all_moves[i] for i in chosen]
        # As apply_updates leaves them.
        after = [
            (p + u.astype(jnp.promote_types(p.dtype, u.dtype))).astype(p.dtype)
            for p, u in zip(before, moves, strict=True)
        ]
        dtype = state.ratio.dtype
        own = [_sums(w, u, dtype) for w, u in zip(after, moves, strict=True)]
        total = summed(own, after, axis_name).sum(0) if own else jnp.zeros(5, dtype)
        squares, squares_of_update, dot, zeros, number = total
        weight_norm, update_norm = jnp.sqrt(squares), jnp.sqrt(squares_of_update)
        length = jnp.where(weight_norm == 0, 1, weight_norm)
        along = dot / length
        across = jnp.sqrt(jnp.maximum(update_norm**2 - along**2, 0))
        figures = (
            weight_norm,
            update_norm,
            update_norm / length,
            jnp.atan2(across, weight_norm - along),
            zeros / jnp.maximum(number, 1),
        )
        # Figures for the log: angles have no derivative at 0.
        return updates, WatchState(*jax.lax.stop_gradient(figures))

    return optax.GradientTransformation(init, update)


def _sums(w: jax.Array, u: jax.Array, dtype: Any) -> jax.Array:
    """Of squares of both, of their product, of zeros and of entries.

    Plain ones, unlike those of a norm that something depends on: a second pass for what is out of
    range would have XLA write the step to memory first.
    """
    wide = _tree.wide_dtype(jnp.promote_types(w.dtype, u.dtype))
    w, u = w.astype(wide), u.astype(wide)
    squares = [jnp.sum(jnp.real(jnp.conj(a) * b), dtype=dtype) for a, b in ((w, w), (u, u), (w, u))]
    return jnp.stack([*squares, jnp.sum(w == 0, dtype=dtype), jnp.asarray(float(w.size), dtype)])
