"""Steps that are left out as a whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg.norms import AxisNames, norms_of_groups
from jaxreg.transforms.clip import (
    POLICIES,
    OnNonfinite,
    finite,
    norms_of_finite,
    with_frozen,
    without_frozen,
)

Number = float | jax.Array


class SkipState(NamedTuple):
    """What `skip_step` saw in the last step, and how often it left one out.

    Attributes:
        norm: the global norm of the gradient, float32 (float64 for 64-bit parameters).
        limit: the norm above which the step would have been left out; infinite in the first ones.
        count: the number of steps, int32.
        skipped: of those left out, int32.
        nonfinite: of steps with an infinite norm or a NaN, int32.
        history: the last finite norms, a ring.
        inner: the state of the transformation inside.
    """

    norm: jax.Array
    limit: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    skipped: jax.Array
    nonfinite: jax.Array
    history: jax.Array
    inner: Any


def skip_step(
    inner: optax.GradientTransformation,
    sigmas: Number = 6.0,
    *,
    window: int = 128,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "skip",
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves out the whole step where the gradient's norm is far above the last ones.

    Where the norm exceeds mean + sigmas * standard deviation (unbiased) of the last `window` norms
    the updates are 0, and the state of `inner`, such as momentum and step counts, stays as it is.
    Until window / 2 finite norms were seen all steps are taken. Norms of steps left out are among
    the last ones too, so that a lasting change of scale is followed; and a spike lifts the limit
    for as long as it is among them.

    Args:
        inner: any optax transformation, usually the whole optimizer. For a frozen leaf, whose
            gradient is None, it is given 0, and None stays.
        sigmas: a number > 0, or a traced scalar; infinite to leave out what is not finite alone.
        window: the number of norms, >= 2.
        axis_name: as in `jaxreg.clip_by_global_norm`.
        on_nonfinite: for gradients with an infinity or a NaN. "skip": the step is left out;
            "zero": these entries are 0; "propagate": they go on to `inner`. Their norms are never
            remembered.

    Returns:
        An optax transformation with state `SkipState`. It selects between old and new state, with
        no branch: XLA on a CPU copies the state of `inner` for it, which makes the step two to
        three times as long. A clip by norms with ``on_nonfinite="skip"`` costs nothing.

    Raises:
        ValueError: where an argument is out of its range.

    Source: OLMo team, *2 OLMo 2 Furious*, 2025, arXiv:2501.00656, whose optimizer does so.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.skip_step(optax.sgd(1.0), window=4)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 2.0, 1.0, 100.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates.tolist(), int(state.skipped)
    ([0.0], 1)
    """
    _check.transformation("inner", inner)
    sigmas = _check.positive("sigmas", sigmas)
    window = _check.whole_number("window", window, at_least=2)
    _check.choice("on_nonfinite", on_nonfinite, POLICIES)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipState:
        _tree.check_floating("params", params)
        dtype = _tree.widest_dtype(params)
        norm, limit = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        count, skipped, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(3))
        history = jnp.zeros(window, dtype)
        return SkipState(norm, limit, count, skipped, nonfinite, history, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SkipState]:
        grads = with_frozen(updates, params)
        groups = [jax.tree.leaves(grads)]
        if on_nonfinite == "zero":
            norms, is_finite = norms_of_finite(groups, axis_name)
            grads = jax.tree.map(finite, grads)
        else:
            norms, is_finite = norms_of_groups(groups, axis_name), True
        norm = norms[0].astype(state.norm.dtype)
        is_finite &= jnp.isfinite(norm)  # in the dtype that it is remembered in
        remembered = state.count - state.nonfinite
        limit = _limit(state.history, remembered, sigmas)
        skipped = norm > limit
        if on_nonfinite == "skip":
            skipped |= ~is_finite
        elif on_nonfinite == "propagate":
            skipped &= is_finite
        moved, after = inner.update(grads, state.inner, params, **extra_args)
        moved = jax.tree.map(lambda u: jnp.where(skipped, 0, u), moved)
        after = _tree.with_dtypes_of(state.inner, after)
        after = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), after, state.inner)
        history = state.history.at[remembered % window].set(norm)
        return without_frozen(moved, updates), SkipState(
            norm,
            limit,
            jnp.asarray(optax.safe_increment(state.count)),
            state.skipped + skipped.astype(jnp.int32),
            state.nonfinite + (~is_finite).astype(jnp.int32),
            jnp.where(is_finite, history, state.history),
            after,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _limit(history: jax.Array, count: jax.Array, sigmas: Number) -> jax.Array:
    """Mean + sigmas * standard deviation; infinite before half of the window is filled."""
    there = jnp.arange(history.size) < count
    enough = count >= max(2, history.size // 2)
    number = jnp.clip(count, 2, history.size).astype(history.dtype)
    # Over the largest, so that the squares of large norms are finite.
    largest = jnp.max(jnp.where(there, history, 0))
    unit = jnp.where(largest > 0, largest, 1)
    shares = jnp.where(there, history / unit, 0)
    mean = jnp.sum(shares) / number
    squares = jnp.where(there, jnp.square(shares - mean), 0)
    deviation = jnp.sqrt(jnp.sum(squares) / (number - 1))
    limit = unit * (mean + jnp.asarray(sigmas).astype(history.dtype) * deviation)
    # Of infinite sigmas times a deviation of 0.
    limit = jnp.where(jnp.isnan(limit), jnp.inf, limit)
    return jnp.where(enough, limit, jnp.inf)
