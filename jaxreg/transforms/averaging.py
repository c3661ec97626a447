"""Averages of weights, and what they do to zeros.

An average is a link that comes last in a chain: it changes no update, and keeps the average of the
weights in its state, where `averaged_params` finds it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.placement import as_penalties, places
from jaxreg.transforms.selected import stepped

Number = float | jax.Array
Transformation = optax.GradientTransformationExtraArgs
# (steps with this one, sum of weights so far) -> this step's share of the average, the new sum.
Share = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class AverageState(NamedTuple):
    """State of `ema_of_params` and `swa`; `averaged_params` reads it.

    Attributes:
        count: steps taken, an int32 scalar.
        total: the sum of what each step weighs, float32 (float64 for 64-bit parameters): 0 before
            the first one that counts.
        average: of the weights, a tree like params in float32 at least; before the first step that
            counts the initial weights.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    total: jax.Array
    average: Any


def ema_of_params(decay: Number | optax.Schedule, *, debias: bool = True) -> Transformation:
    r"""Keeps the exponential moving average of the weights after each step.

    $m_t = d_t m_{t-1} + (1 - d_t) \, p_t$, where $p_t$ is what ``optax.apply_updates`` gives, the
    rounding of 16-bit weights included. The average is $m_t$ over the sum of the weights so far,
    which starts at 0 (`debias`); or m starts at the initial weights.

    Args:
        decay: d, a number in [0, 1), a traced scalar, or a schedule: of d for step t = 0, 1, ...
        debias: whether the initial weights count for nothing. If not, they are the average before
            the first step, as in most other libraries.

    Returns:
        An optax transformation with state `AverageState`, the last of a chain; updates pass
        unchanged. ``update`` needs ``params``. `jaxreg.averaged_params` gives the average. Put it
        inside of ``optax.MultiSteps``: outside, steps that only accumulate would count too; and
        behind `jaxreg.stochastic_rounding`, not inside.

    Raises:
        ValueError: where the decay is outside [0, 1) or NaN; at ``init`` where a leaf is not a
            floating array; at ``update`` without params.

    Source: B. T. Polyak and A. B. Juditsky, *Acceleration of stochastic approximation by
    averaging*, SIAM J. Control Optim. 30, 1992.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(1.0), jaxreg.ema_of_params(0.5))
    >>> w = jnp.array([0.0])
    >>> state = tx.init(w)
    >>> for _ in range(2):  # to 1, and to 2
    ...     updates, state = tx.update(jnp.array([-1.0]), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> round(float(jaxreg.averaged_params(state, w)[0]), 6)  # (0.25 * 1 + 0.5 * 2) / 0.75
    1.666667
    """
    if not _check.is_schedule(decay):
        decay = _check.decay("decay", decay)

    def share(count: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept: Any = decay(count - 1) if _check.is_schedule(decay) else decay
        new = jnp.asarray(1 - kept).astype(total.dtype)  # of a Python float in all its digits
        after = jnp.asarray(kept).astype(total.dtype) * total + new
        return new / jnp.where(after > 0, after, 1), after

    return average_of_params(share, 0.0 if debias else 1.0)


def swa(start: int = 0, every: int = 1) -> Transformation:
    r"""Stochastic weight averaging: keeps the plain mean of the weights after some steps.

    $\frac{1}{n} \sum_{i=1}^n p_{start + i \cdot every}$, with $p_t$ the weights after t steps, as
    ``optax.apply_updates`` gives them.

    Args:
        start: a whole number >= 0; the weights after this many steps, and before, do not count.
        every: a whole number >= 1: the length of a cycle of the learning rate, where it has some.

    Returns:
        An optax transformation with state `AverageState`, as `jaxreg.ema_of_params` is. Under
        ``optax.inject_hyperparams`` all arguments are static.

    Raises:
        ValueError: as `jaxreg.ema_of_params` does, and where start or every are out of range.

    Source: P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov and A. G. Wilson, *Averaging weights
    leads to wider optima and better generalization*, UAI 2018, arXiv:1803.05407. (Statistics of
    batch normalization are not weights: take them anew with the average.)

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(1.0), jaxreg.swa(start=1))
    >>> w = jnp.array([0.0])
    >>> state = tx.init(w)
    >>> for _ in range(3):  # to 1, 2 and 3
    ...     updates, state = tx.update(jnp.array([-1.0]), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> jaxreg.averaged_params(state, w).tolist()
    [2.5]
    """
    start = _check.whole_number("start", start, at_least=0)
    every = _check.whole_number("every", every, at_least=1)

    def share(count: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts = (count > start) & ((count - start) % every == 0)
        after = total + counts.astype(total.dtype)
        return counts.astype(total.dtype) / jnp.maximum(after, 1), after

    return average_of_params(share, 0.0)


def average_of_params(share: Share, initial: float) -> Transformation:
    """A link that moves the average by a share of its distance from the weights after the step."""

    def init(params: optax.Params) -> AverageState:
        _tree.check_floating("params", params)
        total = jnp.full((), initial, _tree.widest_dtype(params))
        return AverageState(jnp.zeros((), jnp.int32), total, _tree.wide_copy(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AverageState]:
        del extra_args
        count = stepped(state.count)
        part, total = share(count, state.total)

        def moved(p: jax.Array, u: jax.Array, average: jax.Array) -> jax.Array:
            w = _applied(p, u)
            near = average + part.astype(_tree.real_dtype(w.dtype)) * (w - average)
            # By selects: the first of all is the weights themselves, and a step that does not
            # count leaves no trace of an infinity.
            return jnp.where(part >= 1, w, jnp.where(part > 0, near, average))

        average = jax.tree.map(moved, _check.params_given(params), updates, state.average)
        return updates, AverageState(count, total, average)

    return optax.GradientTransformationExtraArgs(init, update)


def _applied(p: jax.Array, u: jax.Array) -> jax.Array:
    """What `optax.apply_updates` gives, in float32 at least."""
    # The same operations, so that XLA, which may keep more digits than asked for, makes them one.
    dtype = jnp.promote_types(p.dtype, u.dtype)
    after = (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)
    if _tree.wide_dtype(p.dtype) == p.dtype:
        return after
    # Without the barrier XLA takes the two conversions, and the rounding, for nothing.
    return _tree.widen(jax.lax.optimization_barrier(after))


def averaged_params(opt_state: Any, params: Any) -> Any:
    """The average of the weights that an optimizer's state holds, to evaluate or to keep.

    Args:
        opt_state: the state of an optimizer with one `jaxreg.ema_of_params` or `jaxreg.swa` in
            it, in whatever chains and wrappers.
        params: the weights now, of an NNX model ``nnx.state(model, nnx.Param)``. They are the
            result where there is no average: for leaves that ``optax.masked`` leaves out, and
            before the first step that counts.

    Returns:
        A tree like params, with its dtypes; debiased. Exact zeros of a penalty are averaged away:
        `jaxreg.reapply` brings them back.

    Raises:
        ValueError: where the state holds no average, or several, or one of another tree; for a
            transformation in place of its state.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.adam(0.1), jaxreg.swa())
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> jaxreg.averaged_params(tx.init(params), params)["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    accepted = "an optimizer's state with one average of weights (jaxreg.ema_of_params or swa)"
    if _check.is_transformation(opt_state):
        raise _check.ArgumentError("opt_state", "a transformation", accepted)
    found = _tree.nodes(opt_state, AverageState)
    if len(found) != 1:
        given = f"a state with {len(found) or 'no'} averages"
        raise _check.ArgumentError("opt_state", given, accepted)
    average, (total,) = found[0].average, jax.tree.leaves(found[0].total)
    left_out = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    if not _tree.nodes(average, optax.MaskedNode):
        # By their order: nnx.Optimizer wraps each array of its state in a variable.
        leaves, treedef = jax.tree.leaves(average), jax.tree.structure(params)
        if [jnp.shape(a) for a in leaves] == [jnp.shape(p) for p in jax.tree.leaves(params)]:
            average = treedef.unflatten(leaves)

    def chosen(a: Any, p: Any) -> Any:
        return p if left_out(a) else jnp.where(total > 0, a, _tree.widen(p)).astype(p.dtype)

    try:
        return jax.tree.map(chosen, average, params, is_leaf=left_out)
    except (TypeError, ValueError) as error:
        accepted = "the tree of weights that the optimizer was initialized with"
        raise _check.ArgumentError("params", "another tree", accepted) from error


def reapply(
    penalty: Penalty | Sequence[Penalty], params: Any, *, step: float | jax.Array = 1.0
) -> Any:
    r"""The penalties' proximal step on averaged weights: their zeros and constraints come back.

    An average of weights (``optax.ema``, SWA) has an exact zero only where all of them have, and
    is on no sphere that they are on. $w = \mathrm{prox}_{step}(average)$ has: with L1 of strength
    s, weights whose average is below step * s are zero again, and the others come that much
    nearer to 0. A projection is the same for every step.

    The optimizer's own step is its learning rate times its gain: under `jaxreg.prox_sgd` the
    learning rate is a natural choice, under `jaxreg.prox_adam` some multiple of it; a threshold t
    for L1 is step t / s.

    Args:
        penalty: one penalty or several. For a function of the step count give the penalty of the
            last step; for a `jaxreg.sparsity_target` its penalty times the last multiplier.
        params: a tree of averages.
        step: a scalar >= 0.

    Returns:
        A tree like params, with its dtypes.

    Raises:
        ValueError: as the penalties' ``prox`` does, and where they do not fit the tree.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.reapply(jaxreg.L1(0.25), {"kernel": jnp.array([[1.25, 0.001]])})["kernel"].tolist()
    [[1.0, 0.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    for place in places(as_penalties(penalty), params):
        moved = place.penalty.prox(place.of(leaves), step)
        for i, w in zip(jax.tree.leaves(place.leaves), jax.tree.leaves(moved), strict=True):
            leaves[i] = w
    return treedef.unflatten(leaves)
