"""Clips that look at a direction: at its updates, or at the second moments that it keeps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg.norms import AxisNames, entries
from jaxreg.transforms import reading as _reading
from jaxreg.transforms.clip import (
    POLICIES,
    Clipped,
    NonfiniteState,
    OnNonfinite,
    Rule,
    Seen,
    clip,
    finite,
    nonfinite_state,
    policed,
    shrinking,
    times,
    whole_norm,
    with_frozen,
    without_frozen,
)

Number = float | jax.Array
Transformation = optax.GradientTransformation


class ClippedDirectionState(NamedTuple):
    """The states of a direction and of the clip of its updates or gradients."""

    direction: Any
    clip: Any


def clip_update_rms(
    max_rms: Number = 1.0,
    *,
    direction: Transformation | None = None,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> Transformation:
    r"""Scales each leaf's update down so that its root mean square is at most `max_rms`.

    $u_l \leftarrow u_l / \max(1, rms_l / max\_rms)$. Alone it is a link that comes after the
    direction, and $rms_l$ is that of the update $u_l$: Adafactor's clip. With a `direction` of
    Adam's family it is that direction, and $rms_l$ is that of $g / d$, the gradient over the
    direction's own divisor $d = \sqrt{\hat v} + eps$: StableAdamW's, which sees a gradient that
    the second moment has not caught up with.

    Args:
        max_rms: a number > 0, or a traced scalar; 1 in both sources.
        direction: such as ``optax.scale_by_adam()``, or None. For a frozen leaf, whose gradient is
            None, it is given 0.
        axis_name: as in `jaxreg.clip_by_global_norm`.
        on_nonfinite: likewise; with a direction it is the gradient that is skipped, or whose
            entries are zero.

    Returns:
        An optax transformation; its state is a `ClipState` with one coefficient a leaf, beside
        the direction's where there is one.

    Raises:
        ValueError: where max_rms is out of its range, or the direction keeps no second moments
            that can be read (see `jaxreg.proximal`).

    Sources: N. Shazeer and M. Stern, *Adafactor: adaptive learning rates with sublinear memory
    cost*, ICML 2018; M. Wortsman et al., *Stable and low-precision training for large-scale
    vision-language models*, NeurIPS 2023.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> clip = jaxreg.clip_update_rms(1.0)
    >>> u = jnp.array([2.0, 2.0])
    >>> clip.update(u, clip.init(u))[0].tolist()
    [1.0, 1.0]
    >>> tx = jaxreg.regularize(
    ...     jaxreg.clip_update_rms(direction=optax.scale_by_adam()), 1e-3, decay=0.1
    ... )
    """
    max_rms = _check.positive("max_rms", max_rms)

    def rule_of(ratios: list[jax.Array] | None) -> Rule:
        """The coefficients are those of the ratios, by default of the updates themselves."""

        def rule(seen: Seen) -> Clipped:
            norms = seen.norms([[leaf] for leaf in seen.leaves])
            judged = norms if ratios is None else seen.norms([[ratio] for ratio in ratios])
            counts = [max(1.0, entries([leaf], axis_name)) for leaf in seen.leaves]
            roots = jnp.sqrt(jnp.asarray(counts, judged.dtype))
            limit = jnp.asarray(max_rms).astype(judged.dtype) * roots
            each = shrinking(judged, limit).astype(norms.dtype)
            return Clipped(each, whole_norm(norms), whole_norm(each * norms))

        return rule

    def clip_of(ratios: list[jax.Array] | None) -> Transformation:
        return clip(rule_of(ratios), on_nonfinite, axis_name, per_leaf=True)

    if direction is None:
        return clip_of(None)
    read = _reading.read(_check.transformation("direction", direction), "auto")

    def init(params: optax.Params) -> ClippedDirectionState:
        state = read.direction.init(params)
        _refuse_without_moments(read, state, params)
        return ClippedDirectionState(state, clip_of(None).init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClippedDirectionState]:
        whole = with_frozen(updates, params)
        grads, treedef = jax.tree.flatten(whole)
        # Before the direction, whose moments would keep what is not finite.
        counted = NonfiniteState(state.clip.nonfinite)
        if on_nonfinite == "zero":
            grads = [*map(finite, grads)]
        grads, counted = policed(grads, grads, counted, on_nonfinite, axis_name)
        moved, inner = read.direction.update(
            treedef.unflatten(grads), state.direction, params, **extra_args
        )
        ratios = [
            _over(_tree.widen(g), d)
            for g, d in zip(grads, _divisors(read, inner, moved), strict=True)
        ]
        seen: Any
        clipped, seen = clip_of(ratios).update(moved, state.clip, params)
        if on_nonfinite == "skip":
            seen = seen._replace(nonfinite=counted.nonfinite)
        new = _tree.with_dtypes_of(state, ClippedDirectionState(inner, seen))
        return without_frozen(clipped, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def spike_aware_clip(
    direction: Transformation,
    threshold: Number = 5000.0,
    *,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Cuts entries of the gradient that are spikes beside their own second moment (SPAM).

    $|g_i| \leftarrow \min(|g_i|, \sqrt{threshold} \, d_i)$ with $d = \sqrt{\hat v} + eps$, the
    direction's divisor before this step. Where no gradient has been seen nothing is cut.

    Args:
        direction: of Adam's family, such as ``optax.scale_by_adam()``. For a frozen leaf, whose
            gradient is None, it is given 0.
        threshold: the largest $g_i^2 / \hat v_i$, a number > 0, or a traced scalar.
        axis_name: as in `jaxreg.clip_by_global_norm`; needed for "skip" alone.
        on_nonfinite: as in `jaxreg.clip_by_value`.

    Returns:
        An optax transformation to stand in the direction's place. (SPAM resets the moments now
        and then besides; that is not done here.)

    Raises:
        ValueError: as `jaxreg.clip_update_rms` does.

    Source: T. Huang et al., *SPAM: spike-aware Adam with momentum reset for stable LLM training*,
    ICLR 2025.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.spike_aware_clip(optax.scale_by_adam(b1=0.0), threshold=4.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, 1000.0]):
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> [round(float(u), 3) for u in updates]  # 2 / sqrt(2.5), as if that spike had been 2
    [1.0, 1.265]
    """
    threshold = _check.positive("threshold", threshold)
    _check.choice("on_nonfinite", on_nonfinite, POLICIES)
    read = _reading.read(_check.transformation("direction", direction), "auto")

    def init(params: optax.Params) -> ClippedDirectionState:
        state = read.direction.init(params)
        _refuse_without_moments(read, state, params)
        return ClippedDirectionState(state, nonfinite_state(on_nonfinite))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ClippedDirectionState]:
        whole = with_frozen(updates, params)
        grads, treedef = jax.tree.flatten(whole)
        divisors = _divisors(read, state.direction, whole)
        cut = [_cut(g, d, threshold) for g, d in zip(grads, divisors, strict=True)]
        cut, seen = policed(cut, grads, state.clip, on_nonfinite, axis_name)
        moved, inner = read.direction.update(
            treedef.unflatten(cut), state.direction, params, **extra_args
        )
        new = _tree.with_dtypes_of(state, ClippedDirectionState(inner, seen))
        return without_frozen(moved, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def _cut(g: jax.Array, divisor: jax.Array, threshold: Number) -> jax.Array:
    limit = jnp.sqrt(jnp.asarray(threshold).astype(divisor.dtype)) * divisor
    limit = jnp.where(divisor > 0, limit, jnp.inf)
    size = jnp.abs(_tree.widen(g)).astype(limit.dtype)
    return jnp.where(size > limit, times(jnp.sign(g), limit), g)


def _divisors(read: _reading.Reading, state: Any, like: Any) -> list[jax.Array]:
    return [jnp.asarray(gain.scale) for gain in read.gains(state, like)]


def _over(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """The quotient, 0 where the divisor is."""
    safe = jnp.where(divisor > 0, divisor, 1)
    return jnp.where(divisor > 0, x / safe.astype(_tree.real_dtype(x.dtype)), 0)


def _refuse_without_moments(read: _reading.Reading, state: Any, params: Any) -> None:
    seen: list[bool] = []

    def look(state: Any, params: Any) -> None:
        seen.extend(gain.scale is not None for gain in read.gains(state, params))

    jax.eval_shape(look, state, params)
    if not all(seen):
        accepted = "one with a second moment for each entry of each leaf, as optax.scale_by_adam()"
        raise _check.ArgumentError("direction", "one without", accepted)
