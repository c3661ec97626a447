r"""Proximal gradient steps as an optax transformation.

One step is $p \leftarrow \mathrm{prox}_{step}(p - lr \cdot u)$, where u is the direction's output
and step = lr * gain: the proximal operator works in the metric of the direction. With the gain
left out, the same penalty would solve another problem: under Adam, whose output has the size of 1
whatever the gradient's, thresholding by lr * strength makes the penalty vanish.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import Place, as_penalties, places
from jaxreg.transforms import clipping
from jaxreg.transforms import metric as _metric

Number = float | jax.Array


class ProximalState(NamedTuple):
    """State of `proximal`.

    Attributes:
        count: steps taken, an int32 scalar.
        direction: the direction's own state.
        decay: the decay's own state; ``optax.EmptyState()`` where there is none.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    direction: Any
    decay: Any


def proximal(
    direction: optax.GradientTransformation,
    learning_rate: Number | optax.Schedule,
    penalty: Penalty | Sequence[Penalty],
    *,
    metric: Literal["auto"] | _metric.Metric = "auto",
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A direction, a learning rate and penalties: exact zeros, and the right minimizer.

    $p \leftarrow \mathrm{prox}_{lr \cdot gain}(p - lr \cdot direction(g))$: its fixed points are
    the stationary points of loss + penalty. The gain is the metric's (`jaxreg.metric`) times the
    coefficient of any active `jaxreg.clip_by_global_norm` in the direction.

    The update returned is prox(p + u) - p in the dtype of p. A zero stays an exact zero through
    ``optax.apply_updates``; a learning rate of 0 changes nothing (but projects on constraints).

    Args:
        direction: an optax transformation *without* learning rate and sign, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)`` or ``optax.identity()``; or a chain of
            these with `jaxreg.clip_by_global_norm` and `jaxreg.l2_decay` before them.
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: one penalty or a sequence of them, each for the leaves it was put ``.on``
            (kernels by default); several on one leaf are added (``a + b``).
        metric: "auto", which recognises the directions named above and refuses all others; or a
            function ``(direction_state, params) -> gain`` such as ``jaxreg.metric.adam(b2=0.99)``.
        decay: a transformation between the learning rate and the penalty, such as
            `jaxreg.weight_decay`, whose rate is this learning rate unless it has its own.

    Returns:
        An optax transformation with state `ProximalState`. ``update`` needs ``params``.

    Raises:
        ValueError: where the metric can't be read; at ``init`` where a penalty matches no leaf or
            does not fit one, two on one leaf have no closed-form sum, a leaf is not real floating,
            a penalty without an elementwise step meets a metric that is elementwise, a leaf with
            a penalty has no gain, or the direction is a whole optimizer; at ``update`` without
            params.

    Sources: N. Parikh and S. Boyd, *Proximal Algorithms*, 2014; J. Yun, A. Lozano and E. Yang,
    *Adaptive proximal gradient methods for structured neural networks*, NeurIPS 2021.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.proximal(optax.identity(), 0.5, jaxreg.L1(1.0))
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    >>> optax.apply_updates(w, updates).tolist()
    [1.5, 0.0]
    """
    learning_rate = _check.number_or_schedule("learning_rate", learning_rate)
    _metric.refuse_learning_rate(_check.transformation("direction", direction))
    penalties = as_penalties(penalty)
    if metric == "auto":
        # Without a penalty no gain is needed, and any direction will do.
        metric = _metric.auto(direction) if penalties else _metric.sgd()
    elif not callable(metric):
        raise _check.ArgumentError(
            "metric", _check.describe(metric), "'auto' or a function (state, params) -> gain"
        )
    direction = optax.with_extra_args_support(direction)
    after = optax.identity() if decay is None else _check.transformation("decay", decay)
    after = optax.with_extra_args_support(after)

    def init(params: optax.Params) -> ProximalState:
        _tree.check_floating("params", params)
        _metric.refuse_descent(direction, params)
        direction_state = direction.init(params)
        gain = jax.eval_shape(metric, direction_state, params) if penalties else None
        for place in places(penalties, params):
            _refuse_gain(place, _per_leaf(gain, params), params)
        return ProximalState(jnp.zeros((), jnp.int32), direction_state, after.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProximalState]:
        params = _check.params_given(params)
        rate: Any = learning_rate
        if _check.is_schedule(learning_rate):
            rate = learning_rate(state.count)
        updates, direction_state = direction.update(updates, state.direction, params, **extra_args)
        updates = jax.tree.map(lambda u, p: _scaled(u, rate, p), updates, params)
        updates, decay_state = after.update(
            updates, state.decay, params, **{**extra_args, "learning_rate": rate}
        )
        if penalties:
            gain = metric(direction_state, params)
            step = jnp.asarray(rate) * clipping.coefficient(direction_state)
            updates = _prox_updates(penalties, updates, params, gain, step)
        updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ProximalState(count, direction_state, decay_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _per_leaf(gain: Any, params: Any) -> list[Any]:
    """The gain of each leaf: one serves all below it, and a MaskedNode stands for none."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    gains, treedef = jax.tree.flatten(gain, is_leaf=is_masked)
    subtrees = treedef.flatten_up_to(params)
    return [g for g, tree in zip(gains, subtrees, strict=True) for _ in jax.tree.leaves(tree)]


def _refuse_gain(place: Place, gains: list[Any], params: Any) -> None:
    """Raises where a leaf has no gain, or an elementwise one that its penalty can't work with."""
    leaves = jax.tree.leaves(place.leaves)
    for i in leaves:
        if isinstance(gains[i], optax.MaskedNode):
            raise _check.ArgumentError(
                "metric",
                f"no gain for the leaf {_where.paths(params)[i]}",
                "a gain for each leaf with a penalty: put the penalty .on the leaves that the "
                "direction is for, or give a metric that has a gain for the others",
            )
    one_for_all = all(gains[i] is gains[leaves[0]] for i in leaves)
    elementwise = any(jnp.shape(gains[i]) for i in leaves)
    if (elementwise or not one_for_all) and not place.penalty.elementwise_step:
        raise _check.ArgumentError(
            "penalty",
            f"{place.penalty!r}, which has no closed form in a diagonal metric",
            "such a penalty with a direction of one gain a leaf, such as prox_sgd; with Adam, "
            "penalties whose elementwise_step is True",
        )


def _prox_updates(
    penalties: tuple[Penalty, ...], updates: Any, params: Any, gain: Any, step: jax.Array
) -> Any:
    """prox(p + u) - p on each leaf with a penalty; u on the others."""
    leaves, treedef = jax.tree.flatten(params)
    moves, gains = treedef.flatten_up_to(updates), _per_leaf(gain, params)
    targets = [_tree.widen(p) + u for p, u in zip(leaves, moves, strict=True)]

    def metric_step(i: int) -> jax.Array:
        dtype = targets[i].dtype
        return step.astype(dtype) * jnp.asarray(gains[i]).astype(dtype)

    for place in places(penalties, params):
        moved = place.penalty.prox(place.of(targets), _step_of(place, metric_step, targets))
        for i, w in zip(jax.tree.leaves(place.leaves), jax.tree.leaves(moved), strict=True):
            # Rounded to p's dtype before p is taken off. Where target and p are within a factor
            # of 2 the difference is exact, so that apply_updates gives the target rounded once;
            # and a zero is -p exactly. (A float32 update for a bf16 weight would change the dtype
            # of accumulators that are carried by lax.scan.)
            moves[i] = w.astype(leaves[i].dtype) - leaves[i]
    return jax.tree.unflatten(treedef, moves)


def _step_of(
    place: Place, metric_step: Callable[[int], jax.Array], targets: list[jax.Array]
) -> Any:
    """The step of one leaf, or of several joint ones; one scalar where all have the same."""
    if isinstance(place.leaves, int):
        return metric_step(place.leaves)
    steps = {name: metric_step(i) for name, i in place.leaves.items()}
    if place.penalty.elementwise_step:
        return {n: jnp.broadcast_to(steps[n], targets[i].shape) for n, i in place.leaves.items()}
    return next(iter(steps.values()))


def _scaled(u: jax.Array, rate: Number, p: jax.Array) -> jax.Array:
    """-rate * u in the dtype that p's steps are computed in."""
    dtype = _tree.wide_dtype(p.dtype)
    return -jnp.asarray(rate).astype(dtype) * u.astype(dtype)
