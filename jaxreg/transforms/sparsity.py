r"""A penalty whose strength is steered to a share of zeros.

The strength is the penalty's own times a multiplier c, which rises, more and more slowly, until
the share of zeros in the weights reaches its target: a strength that rises at once would take
whole layers. From then on each step takes the c that leaves the target share, which is found by
trying the proximal operator itself: no model of how zeros come and go is needed, and nothing
oscillates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _check
from jaxreg.penalties.base import Penalty

Number = float | jax.Array

_TOLERANCE = 1e-3  # of the share of zeros
_FURTHEST = 3.0  # that log c moves in one step, where the step is too short for the target
_MOST_TRIALS = 30
_APART = 1e-4  # in log c, where the share jumps
_LIMIT = 60.0  # of log c, far from where exp overflows
_LEAST_MISSING = 0.05  # so that the target is not approached for ever


class SparsityState(NamedTuple):
    """What a `sparsity_target` keeps in the optimizer's state.

    Attributes:
        multiplier: c, by which the penalty was multiplied in the last step, a float32 scalar.
        sparsity: the share of zeros after it.
        reached: whether the target was reached in some step.
    """

    multiplier: jax.Array
    sparsity: jax.Array
    reached: jax.Array


@dataclass(frozen=True)
class SparsityTarget:
    """A penalty and the share of zeros that it is for; see `sparsity_target`."""

    penalty: Penalty
    target: Number | optax.Schedule
    rate: Number

    def __repr__(self) -> str:
        return f"sparsity_target({self.penalty!r}, {self.target!r}, rate={self.rate!r})"

    def init(self) -> SparsityState:
        """The state before the first step."""
        one = jnp.ones((), jnp.float32)
        return SparsityState(one, 0 * one, jnp.zeros((), bool))

    def step(
        self, count: jax.Array, state: SparsityState, share: Callable[[jax.Array], jax.Array]
    ) -> SparsityState:
        """The multiplier of this step, where ``share(c)`` is the share of zeros that c leaves."""
        target = self.target(count) if _check.is_schedule(self.target) else self.target
        target, rate, state = jax.lax.stop_gradient((target, self.rate, state))
        target = jnp.asarray(target).astype(jnp.float32)
        start = jnp.log(state.multiplier)
        missing = jnp.maximum(target - state.sparsity, _LEAST_MISSING)
        rate = jnp.asarray(rate).astype(jnp.float32)
        higher = start + rate * missing
        # A share that is on target stays where it is.
        log_c = jnp.where(state.reached | (target == 0), start, higher)
        first = share(jnp.exp(log_c))
        rising = ~state.reached & (first < target)
        infinite = jnp.full((), jnp.inf, jnp.float32)
        width = jnp.full((), 0.02, jnp.float32)

        def off(best: jax.Array) -> jax.Array:
            return jnp.abs(best - target)

        def undecided(trial: _Trial) -> jax.Array:
            apart = trial.high - trial.low > _APART
            return (off(trial.best) > _TOLERANCE) & apart & (trial.tries < _MOST_TRIALS)

        def next_trial(trial: _Trial) -> _Trial:
            # Outward in steps that double until the target is between two trials, then bisection.
            between = jnp.isfinite(trial.low) & jnp.isfinite(trial.high)
            outward = jnp.where(
                jnp.isfinite(trial.low), trial.low + trial.width, trial.high - trial.width
            )
            log_c = jnp.where(between, (trial.low + trial.high) / 2, outward)
            log_c = jnp.clip(log_c, start - _FURTHEST, start + _FURTHEST)
            found = share(jnp.exp(log_c))
            better = off(found) < off(trial.best)
            return _Trial(
                trial.tries + 1,
                jnp.where(found < target, log_c, trial.low),
                jnp.where(found < target, trial.high, log_c),
                2 * trial.width,
                jnp.where(better, log_c, trial.log_c),
                jnp.where(better, found, trial.best),
            )

        given = _Trial(
            jnp.int32(0),
            jnp.where(first < target, log_c, -infinite),
            jnp.where(first < target, infinite, log_c),
            width,
            log_c,
            first,
        )
        held = jax.lax.while_loop(lambda trial: undecided(trial) & ~rising, next_trial, given)
        # Where even the largest c leaves too few zeros, weights are too far from 0 for one step:
        # c goes on as it does before the target is reached. Where the least one leaves too many it
        # is taken, and between two trials the best.
        short = jnp.isinf(held.high) & (held.best < target - _TOLERANCE) & ~rising
        excess = jnp.isinf(held.low) & (held.best > target + _TOLERANCE)
        log_c = jnp.where(short, start + rate * missing, held.log_c)
        log_c = jnp.where(excess, start - _FURTHEST, log_c)
        log_c = jnp.clip(log_c, -_LIMIT, _LIMIT)
        return SparsityState(jnp.exp(log_c), held.best, state.reached | ~rising)


class _Trial(NamedTuple):
    tries: jax.Array
    low: jax.Array  # log c with too few zeros; -inf before one was tried
    high: jax.Array  # log c with enough of them; inf likewise
    width: jax.Array
    log_c: jax.Array  # of the best trial
    best: jax.Array  # its share


def sparsity_target(
    penalty: Penalty, target: Number | optax.Schedule, *, rate: Number = 0.05
) -> SparsityTarget:
    r"""A penalty whose strength reaches and holds a share of zeros.

    The penalty is multiplied by c. It starts at 1, and log c rises by rate * (target - share) in
    each step until the share of zeros, in all the leaves that the penalty is for, reaches the
    target. Then each step takes the c that leaves the target share, to within 0.1 percentage
    points, or as near as whole groups allow. So the penalty's own strength only says where to
    begin: choose it small, but not 0. The strength in force is c times it:
    ``state.penalties[0].multiplier`` of a `jaxreg.prox_adam` state with one penalty is c, and
    ``.sparsity`` the share, and ``.reached`` whether the target was ever met; watch it: a target
    that the steps left can't reach is not an error. One more proximal step is computed for each
    trial: one while c rises, then a few.

    The share is that of a penalized solution, whose kept weights are shrunk too: for very high
    targets a penalty that shrinks large weights less (`jaxreg.MCP`) loses less accuracy, but its
    zeros come with a root of c: give it a higher rate. The share is of all leaves together: in a
    small network a high target may take a whole layer, and with it the accuracy; then lower the
    rate, or give each layer a target: ``sparsity_target(L1(s).on("first/kernel"), 0.5)``.

    Args:
        penalty: one whose prox gives exact zeros (its ``sparse`` is True) and that has a strength.
        target: the share of zeros, in [0, 1), a traced scalar, or a schedule.
        rate: how fast log c rises before the target is reached, > 0. At 0.05 it takes some 50 to
            100 steps for a factor of 10 far from the target. Too high a rate overshoots the
            strength of the solution and may cost whole layers.

    Returns:
        What `jaxreg.proximal` and the optimizers made of it take for a penalty. Their state holds
        its `SparsityState`.

    Raises:
        ValueError: where the penalty has no strength, one of 0, or gives no zeros, the target is
            outside [0, 1), or the rate is not positive.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_sgd(0.1, jaxreg.sparsity_target(jaxreg.L1(0.01), 0.5, rate=1.0))
    >>> w = jnp.array([0.1, 0.2, 1.0, 2.0])
    >>> state = tx.init(w)
    >>> for _ in range(9):
    ...     updates, state = tx.update(jnp.zeros(4), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> (w == 0).tolist()
    [True, True, False, False]
    """
    if not isinstance(penalty, Penalty) or not penalty.sparse or penalty.scales == ():
        accepted = "a penalty with a strength whose prox gives exact zeros, such as L1"
        raise _check.ArgumentError("penalty", _check.describe(penalty), accepted)
    if not _check.is_schedule(target):
        target = _check.fraction("target", target)
    # A squared norm, called l2, makes none.
    names = [name for name in penalty.scales or ("strength",) if name != "l2"]
    strengths = [getattr(penalty, name, None) for name in names]
    if all(_check.is_concrete(s) and not np.any(s) for s in strengths):
        accepted = "one whose strength is not 0: no multiple of it gives zeros"
        raise _check.ArgumentError("penalty", repr(penalty), accepted)
    return SparsityTarget(penalty, target, _check.positive_finite("rate", rate))
