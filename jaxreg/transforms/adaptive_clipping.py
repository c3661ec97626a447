"""Gradient clipping whose limits follow the weights, or the norms of earlier steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import groups as _groups
from jaxreg import where as _where
from jaxreg.norms import AxisNames, norms_of_groups, varying_axes
from jaxreg.transforms.clip import (
    Clipped,
    OnNonfinite,
    Seen,
    clip,
    finite,
    shrinking,
    whole_norm,
)

Number = float | jax.Array
_LEAST_NORM = 1e-6  # of a unit's gradient, in the source's own code


def adaptive_clip(
    ratio: Number = 0.01,
    *,
    eps: Number = 1e-3,
    units: Any = _groups.units,
    where: _where.Selector | str = _where.everything,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""Adaptive gradient clipping (AGC): each unit's gradient in proportion to its weights.

    $g_u \leftarrow g_u \cdot \min(1, ratio \cdot \max(\|w_u\|, eps) / \max(\|g_u\|, 10^{-6}))$ for
    each unit u: the incoming weights of one output, and a vector or scalar as a whole.

    Args:
        ratio: the largest $\|g_u\| / \|w_u\|$, a number > 0, or a traced scalar.
        eps: the least norm of a unit's weights that counts, > 0, so that zero weights can grow.
        units: the groups of leaves of rank 2 and more (see `jaxreg.groups`): all axes but the
            last by default; an integer or a tuple of them are the axes that a unit runs along.
        where: the leaves that are clipped. The source leaves out the last layer.
        on_nonfinite: as in `jaxreg.clip_by_global_norm`; "propagate" acts on each unit.

    Returns:
        An optax transformation whose state is a `ClipState`. ``update`` needs ``params``. Units may
        be sharded under ``jit``, not inside ``shard_map``, where a device has only a piece of them.

    Raises:
        ValueError: where a number is out of its range; at ``init`` where a leaf has no such axes,
            or the selector matches none; at ``update`` where a leaf differs from device to device
            (which is not known with ``check_vma=False`` and in ``pmap``).

    Source: A. Brock, S. De, S. Smith and K. Simonyan, *High-performance large-scale image
    recognition without normalization*, ICML 2021.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.adaptive_clip(0.1)
    >>> w = jnp.array([[3.0, 30.0], [4.0, 40.0]])  # two units, of norms 5 and 50
    >>> clipped, _ = clip.update(jnp.ones_like(w) * 3, clip.init(w), w)
    >>> [round(float(x), 3) for x in clipped[0]]
    [0.354, 3.0]
    """
    ratio, eps = _check.positive_finite("ratio", ratio), _check.positive_finite("eps", eps)
    rule_of_units, selector = _groups.as_groups("units", units), _where.as_selector(where)

    def grouping(leaf: jax.Array, clipped: bool) -> _groups.Grouping:
        own = rule_of_units if clipped and leaf.ndim > 1 else _groups.whole
        try:
            return own.of(leaf.shape)
        except _check.ArgumentError as error:
            raise _check.ArgumentError("units", error.given, error.accepted) from None

    def rule(seen: Seen) -> Clipped:
        chosen = jax.tree.leaves(selector.mask(seen.params))
        weights = jax.tree.structure(seen.updates).flatten_up_to(seen.params)
        grads = [finite(g) if on_nonfinite == "zero" else g for g in seen.leaves]
        _refuse_pieces((*grads, *weights))
        units = [grouping(g, yes) for g, yes in zip(grads, chosen, strict=True)]
        sizes = [_tree.widen(_real(x)) for x in (*grads, *weights)]
        found = _groups.norms([*zip([*units, *units], sizes, strict=True)])
        before, of_weights = found[: len(grads)], found[len(grads) :]
        each = [coefficient_of(*pair) for pair in zip(before, of_weights, strict=True)]
        each = [c if yes else jnp.ones_like(c) for c, yes in zip(each, chosen, strict=True)]
        after = [c * norm for c, norm in zip(each, before, strict=True)]
        coefficients = [own.spread(c) for own, c in zip(units, each, strict=True)]
        norms = norms_of_groups([before, after])
        return Clipped(coefficients, norms[0], norms[1])

    def coefficient_of(norm: jax.Array, weight: jax.Array) -> jax.Array:
        share, least = (jnp.asarray(number).astype(norm.dtype) for number in (ratio, eps))
        limit = share * jnp.maximum(weight.astype(norm.dtype), least)
        return shrinking(jnp.maximum(norm, _LEAST_NORM), limit)

    def memory(params: Any) -> Any:
        chosen = jax.tree.leaves(selector.mask(params))
        for leaf, yes in zip(jax.tree.leaves(params), chosen, strict=True):
            grouping(leaf, yes)
        return ()

    return clip(rule, on_nonfinite, memory=memory, records=False, needs_params=True)


def _refuse_pieces(leaves: Sequence[jax.Array]) -> None:
    """Raises where devices hold different pieces of a leaf, whose units would have their norms."""
    if names := sorted(frozenset[str]().union(*map(varying_axes, leaves))):
        given = f"arrays that differ along the mesh axes {', '.join(names)}"
        accepted = "arrays that are whole on each device: sharded ones under jit, not in shard_map"
        raise _check.ArgumentError("updates", given, accepted)


def _real(x: jax.Array) -> jax.Array:
    """Real numbers with the same squares."""
    # Without need an absolute value would be written to memory, for the branch inside the norm.
    return jnp.abs(x) if jnp.iscomplexobj(x) else x


class _History(NamedTuple):
    norms: jax.Array  # a ring
    seen: jax.Array  # how many norms there were


def autoclip(
    percentile: Number = 10.0,
    *,
    window: int = 1000,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""AutoClip: the limit is a percentile of the norms seen so far.

    $g \leftarrow g \cdot \min(1, p / \|g\|)$, p the percentile of the last norms with this one.

    Args:
        percentile: in [0, 100], or a traced scalar.
        window: how many of the last norms are kept (all of them in the source), >= 1.
        axis_name: as in `jaxreg.clip_by_global_norm`.
        on_nonfinite: likewise. A norm that is not finite is not remembered.

    Returns:
        An optax transformation whose state is a `ClipState`; its memory is `window` float32.

    Raises:
        ValueError: where an argument is out of its range.

    Source: P. Seetharaman, G. Wichern, B. Pardo and J. Le Roux, *AutoClip: adaptive gradient
    clipping for source separation networks*, MLSP 2020.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.autoclip(50)
    >>> state = clip.init(jnp.zeros(1))
    >>> for g in (1.0, 2.0, 100.0):
    ...     clipped, state = clip.update(jnp.array([g]), state)
    >>> clipped.tolist()
    [2.0]
    """
    accepted = "a number from 0 to 100"
    percentile = _check.scalar("percentile", percentile, accepted, lambda v: 0 <= v <= 100)
    window = _check.whole_number("window", window, at_least=1)

    def rule(seen: Seen) -> Clipped:
        norm = seen.norms([seen.leaves])[0]
        history, count = seen.memory
        history = history.at[count % window].set(norm.astype(history.dtype))
        there = jnp.where(jnp.arange(window) <= count, history, jnp.nan)
        limit = jnp.nanpercentile(there, jnp.asarray(percentile).astype(history.dtype))
        coefficient = _of_finite(shrinking(norm, limit), norm)
        return Clipped(coefficient, norm, coefficient * norm, _History(history, count + 1))

    def memory(params: Any) -> _History:
        dtype = _tree.widest_dtype(jax.tree.leaves(params))
        return _History(jnp.zeros(window, dtype), jnp.zeros((), jnp.int32))

    return clip(rule, on_nonfinite, axis_name, memory=memory)


def _of_finite(coefficient: jax.Array, norm: jax.Array) -> jax.Array:
    """The coefficient; 0 for an infinite norm and NaN for NaN, whatever the limit became."""
    return jnp.where(jnp.isfinite(norm), coefficient, 1 / norm)


class _Moments(NamedTuple):
    mean: jax.Array
    variance: jax.Array
    seen: jax.Array


def zclip(
    z: Number = 2.5,
    *,
    decay: Number = 0.97,
    warm_up: int = 25,
    eps: Number = 1e-6,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""ZClip: norms that are outliers among the last ones are cut, the more the further out.

    With the running mean $\mu$ and standard deviation $\sigma$ of the norms, a norm n whose score
    $s = (n - \mu) / (\sigma + eps)$ exceeds z is cut to $\mu + \sigma z^2 / s$. The mean and then
    the variance follow the norms after the cut, with weight 1 - decay.

    Args:
        z: the score above which a norm is cut, > 0, or a traced scalar.
        decay: of mean and variance, in [0, 1), or a traced scalar.
        warm_up: the number of steps whose norms give the first mean and variance, >= 2; nothing is
            cut in them.
        eps: > 0.
        axis_name: as in `jaxreg.clip_by_global_norm`.
        on_nonfinite: likewise. A norm that is not finite is not remembered.

    Returns:
        An optax transformation whose state is a `ClipState`.

    Raises:
        ValueError: where an argument is out of its range, or the decay in 16 bits.

    Source: A. Kumar, L. Owen, N. Roy Chowdhury and F. Gura, *ZClip: adaptive spike mitigation for
    LLM pre-training*, 2025, arXiv:2504.02507.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.zclip(warm_up=2)
    >>> state = clip.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0, 12.0):
    ...     clipped, state = clip.update(jnp.array([g]), state)
    >>> [round(float(x), 3) for x in clipped]  # mean 2, deviation 1, score 10
    [2.625]
    """
    z, eps = _check.positive_finite("z", z), _check.positive_finite("eps", eps)
    decay = _check.decay("decay", decay)
    warm_up = _check.whole_number("warm_up", warm_up, at_least=2)

    def rule(seen: Seen) -> Clipped:
        norm = seen.norms([seen.leaves])[0]
        mean, variance, count = seen.memory
        n = norm.astype(mean.dtype)
        least, share, most = (jnp.asarray(number).astype(n.dtype) for number in (eps, decay, z))
        warm = count >= warm_up
        deviation = jnp.sqrt(variance)
        score = (n - mean) / (deviation + least)
        outlier = warm & (score > most)
        cut = mean + deviation * jnp.square(most) / jnp.where(outlier, score, 1)
        kept = jnp.where(outlier, cut, n)
        # Before: the mean and variance of all norms so far.
        rate = jnp.where(warm, 1 - share, 1 / (count.astype(n.dtype) + 1))
        new_mean = mean + rate * (kept - mean)
        spread = jnp.where(warm, jnp.square(kept - new_mean), (kept - mean) * (kept - new_mean))
        new = _Moments(new_mean, variance + rate * (spread - variance), count + 1)
        # A norm whose square overflows would make every later score NaN.
        usable = jnp.isfinite(new.variance)
        memory = jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, seen.memory)
        coefficient = _of_finite(jnp.where(outlier, shrinking(norm, cut), 1), norm)
        return Clipped(coefficient, norm, coefficient * norm, memory)

    def memory(params: Any) -> _Moments:
        dtype = _tree.widest_dtype(jax.tree.leaves(params))
        zeros = jnp.zeros((), dtype), jnp.zeros((), dtype)
        return _Moments(*zeros, jnp.zeros((), jnp.int32))

    return clip(rule, on_nonfinite, axis_name, memory=memory)


class _Gammas(NamedTuple):
    norms: jax.Array  # one a leaf; 0 before a gradient was seen
    seen: jax.Array


def adagc(
    ratio: Number = 1.05,
    *,
    decay: Number = 0.98,
    max_norm: Number = 1.0,
    warm_up: int = 100,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""AdaGC: each leaf's norm at most `ratio` times the running mean of its own clipped norms.

    $h_l = \min(1, ratio \cdot \gamma_l / \|g_l\|)$, $g_l \leftarrow h_l g_l$, then $\gamma_l
    \leftarrow decay \cdot \gamma_l + (1 - decay) \|g_l\|$. In the first steps the global norm is
    clipped to `max_norm` instead, and $\gamma_l$ is the least clipped norm of the leaf.

    A leaf without a gradient (of norm 0) keeps its $\gamma_l$: in the source it would fall to 0,
    and the leaf could not move again. The first gradient of a leaf is not clipped if it comes
    later than that.

    Args:
        ratio: a number > 1, or a traced scalar: a norm can grow by it from step to step.
        decay: of the mean, in [0, 1), or a traced scalar.
        max_norm: the limit of the global norm in the first steps, > 0.
        warm_up: the number of these steps, >= 1.
        axis_name: as in `jaxreg.clip_by_global_norm`.
        on_nonfinite: likewise. What is not finite is not remembered.

    Returns:
        An optax transformation whose state is a `ClipState` with one coefficient a leaf.

    Raises:
        ValueError: where an argument is out of its range, or the decay in 16 bits.

    Source: G. Wang et al., *AdaGC: improving training stability for large language model
    pretraining*, 2025, arXiv:2502.11034.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.adagc(warm_up=1, max_norm=10.0)
    >>> state = clip.init(jnp.zeros(1))
    >>> for g in (1.0, 5.0):
    ...     clipped, state = clip.update(jnp.array([g]), state)
    >>> [round(float(x), 3) for x in clipped]
    [1.05]
    """
    ratio, decay = _check.above_one("ratio", ratio), _check.decay("decay", decay)
    max_norm = _check.positive("max_norm", max_norm)
    warm_up = _check.whole_number("warm_up", warm_up, at_least=1)

    def rule(seen: Seen) -> Clipped:
        norms = seen.norms([[leaf] for leaf in seen.leaves])
        norm, (gammas, count) = whole_norm(norms), seen.memory
        own = norms.astype(gammas.dtype)
        grow, share = (jnp.asarray(number).astype(own.dtype) for number in (ratio, decay))
        early = count < warm_up
        first = shrinking(norm, max_norm).astype(own.dtype)
        known = gammas > 0
        later = jnp.where(known, shrinking(own, grow * gammas), 1)
        coefficients = jnp.where(early, first, later)
        after = coefficients * own
        mean = share * gammas + (1 - share) * after
        new = jnp.where(early, jnp.minimum(gammas, after), mean)
        new = jnp.where(known, new, after)
        new = jnp.where(own > 0, new, gammas)
        memory = _Gammas(new, count + 1)
        return Clipped(coefficients, norm, whole_norm(after), memory)

    def memory(params: Any) -> _Gammas:
        leaves = jax.tree.leaves(params)
        unseen = jnp.zeros(len(leaves), _tree.widest_dtype(leaves))
        return _Gammas(unseen, jnp.zeros((), jnp.int32))

    return clip(rule, on_nonfinite, axis_name, memory=memory, per_leaf=True)
