r"""Proximal gradient steps as an optax transformation.

One step is $p \leftarrow \mathrm{prox}_{step}(p - lr \cdot u)$, where u is the direction's output
and step = lr * gain: the proximal operator works in the metric of the direction. With the gain
left out, the same penalty would solve another problem: under Adam, whose output has the size of 1
whatever the gradient's, thresholding by lr * strength makes the penalty vanish.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.penalties.placement import Place
from jaxreg.transforms import metric as _metric
from jaxreg.transforms import reading as _reading
from jaxreg.transforms.links import refuse_descent, refuse_learning_rate
from jaxreg.transforms.parts import Parts, as_parts, init_parts, prox_step

Number = float | jax.Array


class ProximalState(NamedTuple):
    """State of `proximal`.

    Attributes:
        count: steps taken, an int32 scalar.
        direction: the direction's own state.
        decay: the decay's own state; ``optax.EmptyState()`` where there is none.
        penalties: one state for each penalty: a `jaxreg.transforms.SparsityState` for a
            `jaxreg.sparsity_target`, else ``()``.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    direction: Any
    decay: Any
    penalties: tuple[Any, ...]


def proximal(
    direction: optax.GradientTransformation,
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    *,
    metric: Literal["auto", "block"] | _metric.Metric | _metric.Block = "auto",
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
            (kernels by default); several on one leaf are added (``a + b``). A function of the step
            count that gives one is a schedule: ``lambda count: L1(schedule(count))``. A
            `jaxreg.sparsity_target` chooses its strength itself.
        metric: "auto", which reads optax's momentum, Adam, NAdam, AMSGrad, AdaMax, RMSProp and
            Adagrad, clips and trust ratios in chains, masks and partitions, and refuses others; a
            function ``(direction_state, params) -> gain`` such as ``jaxreg.metric.adam(b2=0.99)``;
            or "block" (`jaxreg.metric.block`), one gain a leaf, for penalties without an
            elementwise step.
        decay: a transformation between the learning rate and the penalty, such as
            `jaxreg.weight_decay`, whose rate is this learning rate unless it has its own.

    Returns:
        An optax transformation with state `ProximalState`, which keeps its dtypes, whatever those
        of gradients and hyperparameters. ``update`` needs ``params``.

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
    refuse_learning_rate(_check.transformation("direction", direction))
    parts = as_parts(penalty)
    if metric == "block":
        metric = _metric.block()
    if metric != "auto" and not callable(metric) and not isinstance(metric, _metric.Block):
        accepted = "'auto', 'block', or a function (state, params) -> gain"
        raise _check.ArgumentError("metric", _check.describe(metric), accepted)
    if callable(metric) and getattr(_metric, getattr(metric, "__name__", ""), None) is metric:
        name = f"jaxreg.metric.{metric.__name__}"
        raise _check.ArgumentError("metric", f"the function {name}", f"what it returns: {name}()")
    block = isinstance(metric, _metric.Block)
    inner = metric.inner if isinstance(metric, _metric.Block) else metric
    # Without a penalty no gain is needed, and any direction will do.
    needed = parts or block
    direction, gains = _reading.read(direction, inner if needed else _metric.sgd())
    after = optax.identity() if decay is None else _check.transformation("decay", decay)
    after = optax.with_extra_args_support(after)

    def init(params: optax.Params) -> ProximalState:
        _tree.check_floating("params", params)
        refuse_descent(direction, params, _reading.KNOWN)
        direction_state = direction.init(params)
        layout = _layout(gains, direction_state, params, block) if needed else []
        states, places = init_parts(parts, params)
        for place in places:
            _refuse_gain(place, layout, params)
        zero = jnp.zeros((), jnp.int32)
        return ProximalState(zero, direction_state, after.init(params), states)

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
        found = gains(direction_state, params) if needed else []
        if block:
            moves, treedef = jax.tree.flatten(updates)
            pairs = [gain.blocked(u) for gain, u in zip(found, moves, strict=True)]
            found = [gain for gain, _ in pairs]
            updates = jax.tree.unflatten(treedef, [u for _, u in pairs])
        updates = jax.tree.map(lambda u, p: _scaled(u, rate, p), updates, params)
        updates, decay_state = after.update(
            updates, state.decay, params, **{**extra_args, "learning_rate": rate}
        )
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        targets = [_tree.widen(p) + u for p, u in zip(leaves, moves, strict=True)]

        def step(i: int) -> jax.Array:
            dtype = targets[i].dtype
            return jnp.asarray(rate).astype(dtype) * jnp.asarray(found[i].values()).astype(dtype)

        moved, states = prox_step(parts, state.penalties, state.count, params, targets, step)
        for i, w in moved.items():
            # Of numbers in p's dtype: where w and p are within a factor of 2 the difference is
            # exact, so that apply_updates gives w; and a zero is -p exactly. (A float32 update for
            # a bf16 weight would change the dtype of accumulators that are carried by lax.scan.)
            moves[i] = w - leaves[i]
        moves = [u.astype(p.dtype) for u, p in zip(moves, leaves, strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        new = ProximalState(count, direction_state, decay_state, states)
        # optax's moments take on the dtypes of gradients and hyperparameters.
        return treedef.unflatten(moves), _tree.with_dtypes_of(state, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _layout(gains: _reading.Gains, state: Any, params: Any, block: bool) -> list[Any]:
    """What each leaf has: None for no gain, "elementwise", or the number of its scalar.

    A scalar that several leaves share is one object, such as a clip's coefficient.
    """
    layout: list[Any] = []

    def look(state: Any, params: Any) -> None:
        found = gains(state, params)
        for i, gain in enumerate(found):
            if gain.factor is None:
                layout.append(None)
            elif gain.is_elementwise():
                layout.append(i if block else "elementwise")
            else:
                layout.append(min(k for k, other in enumerate(found) if other is gain))

    jax.eval_shape(look, state, params)
    return layout


def _refuse_gain(place: Place, layout: list[Any], params: Any) -> None:
    """Raises where a leaf has no gain, or an elementwise one that its penalty can't work with."""
    leaves = jax.tree.leaves(place.leaves)
    for i in leaves:
        if layout[i] is None:
            raise _check.ArgumentError(
                "metric",
                f"no gain for the leaf {_where.paths(params)[i]}",
                "a gain for each leaf with a penalty: put the penalty .on the leaves that the "
                "direction is for, or give a metric that has a gain for the others",
            )
    own = {layout[i] for i in leaves}
    if (len(own) > 1 or "elementwise" in own) and not place.penalty.elementwise_step:
        raise _check.ArgumentError(
            "penalty",
            f"{place.penalty!r}, which has no closed form in a diagonal metric",
            "such a penalty with one gain for all its numbers, as prox_sgd has, or with "
            "metric='block'; with Adam's own metric, penalties whose elementwise_step is True",
        )


def _scaled(u: jax.Array, rate: Number, p: jax.Array) -> jax.Array:
    """-rate * u in the dtype that p's steps are computed in."""
    dtype = _tree.wide_dtype(p.dtype)
    return -jnp.asarray(rate).astype(dtype) * u.astype(dtype)
