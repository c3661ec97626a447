r"""Regularized dual averaging: each step starts from the average of all gradients so far.

$$w_{t+1} = \operatorname{argmin}_w \; \langle V_t, w \rangle + \alpha_t R(w) + \frac{1}{2} \|w -
w_0\|^2_{P_t} \;=\; \mathrm{prox}_{\alpha_t / P_t}(w_0 - V_t / P_t)$$

with sums $V_t = \sum_k s_k g_k$ and $\alpha_t = \sum_k s_k$, and a scale P of the coordinates. The
noise of single gradients averages out of V, so the set of zeros settles; under proximal SGD or
Adam it keeps changing with each batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg._roots import cube_root
from jaxreg.transforms.parts import Parts, as_parts, init_parts, prox_step

Number = float | jax.Array


class DualAveragingState(NamedTuple):
    r"""State of `rda`, `rmda` and `ramda`.

    Attributes:
        count: steps taken, an int32 scalar.
        weight: $\alpha$, the sum of the gradients' weights, a scalar of float32 at least.
        start: the parameters at the start, in float32 at least.
        gradients: V, the weighted sum of gradients.
        squares: the weighted sum of squared gradients; None where it is not used.
        penalties: as in `jaxreg.transforms.ProximalState`.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    weight: jax.Array
    start: Any
    gradients: Any
    squares: Any
    penalties: tuple[Any, ...]


def rda(learning_rate: Number, penalty: Parts) -> optax.GradientTransformationExtraArgs:
    r"""Regularized dual averaging (RDA): stable exact zeros for convex problems.

    $w_{t+1} = \mathrm{prox}_{lr \sqrt t}(w_0 - lr \sqrt t \; \bar g_t)$ with the mean $\bar g_t$
    of all gradients: every gradient has the same weight.

    Args:
        learning_rate: the inverse of the paper's $\gamma$, a number >= 0, or a traced scalar.
        penalty: as in `jaxreg.proximal`.

    Returns:
        A whole optimizer with state `DualAveragingState`. ``update`` needs ``params``. To begin
        again from other parameters, as is done when a learning rate drops, call ``init`` on them.

    Raises:
        ValueError: where the learning rate is negative; at ``init`` as `jaxreg.proximal` does; at
            ``update`` without params.

    Source: L. Xiao, *Dual averaging methods for regularized stochastic learning and online
    optimization*, JMLR 11, 2010.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.rda(1.0, jaxreg.L1(1.0))
    >>> w = jnp.array([0.0, 0.0])
    >>> updates, _ = tx.update(jnp.array([-3.0, 0.5]), tx.init(w), w)
    >>> (w + updates).tolist()
    [2.0, 0.0]
    """
    if _check.is_schedule(learning_rate):
        accepted = "a number >= 0: all gradients have the same weight; rmda takes a schedule"
        raise _check.ArgumentError("learning_rate", "a schedule", accepted)
    rate = _check.nonnegative("learning_rate", learning_rate)

    def gain(count: jax.Array, squares: Any) -> jax.Array:
        del squares
        return rate / jnp.sqrt(count)

    return _dual_averaging(penalty, jnp.ones_like, gain)


def rmda(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    momentum: Number | optax.Schedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Regularized modernized dual averaging (RMDA): `rda` for training networks.

    $s_t = lr_t \sqrt t$, $\tilde w_{t+1} = \mathrm{prox}_{\alpha_t / \sqrt t}(w_0 - V_t / \sqrt
    t)$ and $w_{t+1} = momentum \; w_t + (1 - momentum) \, \tilde w_{t+1}$. Later gradients weigh
    more, so that a network may leave its start far behind.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: as in `jaxreg.proximal`.
        momentum: in [0, 1), a traced scalar, or a schedule. Above 0, zeros are reached only in the
            limit, so a schedule should end at 0.

    Returns:
        A whole optimizer, as `rda` is.

    Raises:
        ValueError: as `rda` does, or where momentum is out of its range.

    Source: Z.-S. Huang and C.-p. Lee, *Training structured neural networks through manifold
    identification and variance reduction*, ICLR 2022.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.rmda(1.0, jaxreg.L1(1.0))
    >>> w = jnp.array([1.0, 0.0])
    >>> updates, _ = tx.update(jnp.array([-3.0, 0.5]), tx.init(w), w)
    >>> (w + updates).tolist()
    [3.0, 0.0]
    """

    def gain(count: jax.Array, squares: Any) -> jax.Array:
        del squares
        return 1 / jnp.sqrt(count)

    return _dual_averaging(penalty, _growing(learning_rate), gain, momentum=_momentum(momentum))


def ramda(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    momentum: Number | optax.Schedule = 0.0,
    eps: Number = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    r"""Regularized adaptive momentum dual averaging (RAMDA): `rmda` with a scale a coordinate.

    $s_t = lr_t \sqrt t$, $U_t = \sum_k s_k g_k^2$, $P_t = \sqrt[3]{U_t} + eps$, $\tilde w_{t+1}
    = \mathrm{prox}_{\alpha_t / P_t}(w_0 - V_t / P_t)$ and $w_{t+1} = momentum \; w_t + (1 -
    momentum) \, \tilde w_{t+1}$. Without a penalty it is MADGRAD.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: as in `jaxreg.proximal`, with an elementwise step.
        momentum: as in `rmda`.
        eps: added to the scale, > 0.

    Returns:
        A whole optimizer, as `rda` is.

    Raises:
        ValueError: as `rmda` does, where eps is not positive, or at ``init`` where a penalty has
            no elementwise step.

    Sources: Z.-S. Huang and C.-p. Lee, *Regularized adaptive momentum dual averaging with an
    efficient inexact subproblem solver for training structured neural network*, NeurIPS 2024; A.
    Defazio and S. Jelassi, *A momentumized, adaptive, dual averaged gradient method*, JMLR 23,
    2022.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.ramda(1.0, jaxreg.L1(1.0))
    >>> w = jnp.array([1.0, 0.0])
    >>> updates, _ = tx.update(jnp.array([-8.0, 0.5]), tx.init(w), w)
    >>> [round(float(x), 3) for x in w + updates]
    [2.75, 0.0]
    """
    eps = _check.positive_finite("eps", eps)

    def gain(count: jax.Array, squares: Any) -> jax.Array:
        del count
        return 1 / (cube_root(squares) + jnp.asarray(eps).astype(squares.dtype))

    return _dual_averaging(
        penalty, _growing(learning_rate), gain, momentum=_momentum(momentum), elementwise=True
    )


def _growing(learning_rate: Number | optax.Schedule) -> Callable[[jax.Array], jax.Array]:
    """The weight of the gradient of step t, counted from 1: lr_t sqrt(t)."""
    given = _check.number_or_schedule("learning_rate", learning_rate)

    def weight(count: jax.Array) -> jax.Array:
        # optax's schedules count from 0.
        rate = given(count.astype(jnp.int32) - 1) if _check.is_schedule(given) else given
        return jnp.asarray(rate).astype(count.dtype) * jnp.sqrt(count)

    return weight


def _momentum(momentum: Number | optax.Schedule) -> Number | optax.Schedule:
    return momentum if _check.is_schedule(momentum) else _check.decay("momentum", momentum)


def _dual_averaging(
    penalty: Parts,
    weight_of: Callable[[jax.Array], jax.Array],
    gain: Callable[[jax.Array, Any], jax.Array],
    *,
    momentum: Number | optax.Schedule = 0.0,
    elementwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The step of the module's head.

    Args:
        penalty: as in `jaxreg.proximal`.
        weight_of: ``weight_of(t)`` is s, for the step t = 1, 2, ... as a float.
        gain: ``gain(t, squares)`` is 1 / P, a scalar or an array.
        momentum: a number or a schedule.
        elementwise: whether P is made of the squared gradients, for each coordinate.
    """
    parts = as_parts(penalty)

    def init(params: optax.Params) -> DualAveragingState:
        check = _tree.check_real if elementwise else _tree.check_floating
        check("params", params)
        states, places = init_parts(parts, params)
        for place in places:
            if elementwise and not place.penalty.elementwise_step:
                raise _check.ArgumentError(
                    "penalty",
                    f"{place.penalty!r}, which has no closed form in a diagonal metric",
                    "penalties whose elementwise_step is True; rmda takes this one",
                )
        # A copy, since params may be donated to the first step.
        start = jax.tree.map(lambda p: jnp.array(_tree.widen(p), copy=True), params)
        gradients = jax.tree.map(jnp.zeros_like, start)
        squares = jax.tree.map(jnp.zeros_like, start) if elementwise else None
        weight = jnp.zeros((), _tree.widest_dtype(start))
        zero = jnp.zeros((), jnp.int32)
        return DualAveragingState(zero, weight, start, gradients, squares, states)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, DualAveragingState]:
        del extra_args
        params = _check.params_given(params)
        count = jnp.asarray(optax.safe_increment(state.count))
        t = count.astype(state.weight.dtype)
        s = weight_of(t)
        total = state.weight + s

        def added(to: jax.Array, g: jax.Array) -> jax.Array:
            return to + s.astype(to.dtype) * g.astype(to.dtype)

        gradients = jax.tree.map(added, state.gradients, updates)
        squares = None
        if elementwise:
            powers = jax.tree.map(lambda g, v: jnp.square(g.astype(v.dtype)), updates, gradients)
            squares = jax.tree.map(added, state.squares, powers)
        leaves, treedef = jax.tree.flatten(params)
        starts, sums = jax.tree.leaves(state.start), jax.tree.leaves(gradients)
        scales: list[Any] = jax.tree.leaves(squares) if elementwise else [None] * len(leaves)
        gains = [
            jnp.asarray(gain(t.astype(v.dtype), u)).astype(v.dtype)
            for v, u in zip(sums, scales, strict=True)
        ]
        targets = [w0 - v * by for w0, v, by in zip(starts, sums, gains, strict=True)]

        def step(i: int) -> jax.Array:
            return total.astype(targets[i].dtype) * gains[i]

        moved, states = prox_step(parts, state.penalties, state.count, params, targets, step)
        share = momentum(state.count) if _check.is_schedule(momentum) else momentum

        def change(i: int, p: jax.Array) -> jax.Array:
            w = (moved[i] if i in moved else targets[i]).astype(targets[i].dtype)
            m = jnp.asarray(share).astype(w.dtype)
            return (m * p.astype(w.dtype) + (1 - m) * w).astype(p.dtype) - p

        changes = treedef.unflatten([change(i, p) for i, p in enumerate(leaves)])
        after = DualAveragingState(count, total, state.start, gradients, squares, states)
        return changes, after

    return optax.GradientTransformationExtraArgs(init, update)
