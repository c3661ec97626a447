"""Gradients that are clipped example by example, as DP-SGD does."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.norms import AxisNames, norms_of_groups, sharding_axes, varying, varying_axes
from jaxreg.transforms.clip import POLICIES, OnNonfinite, finite, shrinking

Number = float | jax.Array
PyTree = Any


class PerExample(NamedTuple):
    """What `per_example_clip` saw in a batch.

    Attributes:
        losses: of each example, before the step.
        norms: of each example's gradient before clipping.
        clipped: the share of examples that were clipped; like all of these of a device's own
            examples inside ``shard_map``.
        nonfinite: the number of examples with an infinity or a NaN in their gradient, int32.
    """

    losses: jax.Array
    norms: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


def per_example_clip(
    loss: Callable[..., jax.Array],
    max_norm: Number,
    *,
    micro_batch: int | None = None,
    noise_multiplier: Number = 0.0,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> Callable[..., tuple[PyTree, PerExample]]:
    r"""The mean of gradients that are clipped one by one, and of Gaussian noise: DP-SGD.

    $\frac{1}{B} \left( \sum_b g_b \min(1, C / \|g_b\|) + \sigma C \, \mathcal{N}(0, I) \right)$,
    with $g_b$ the gradient of example b, C = `max_norm` and $\sigma$ = `noise_multiplier`. The
    privacy that is spent is not counted: leave that to a library that is kept for it.

    Args:
        loss: ``loss(params, *example)``, a scalar; an example has no batch axis.
        max_norm: C, a number > 0, or a traced scalar; infinite only without noise.
        micro_batch: how many examples' gradients are in memory at once; all by default.
        noise_multiplier: a number >= 0, or a traced scalar.
        axis_name: inside ``shard_map``, the mesh axes that the batch is sharded along: the sum and
            B are over all of it. The noise is the same everywhere where the key is.
        on_nonfinite: for an example with an infinity or a NaN in its gradient. "skip": it is left
            out (B stays); "zero": these entries are 0; "propagate": they go into the sum.

    Returns:
        A function ``(params, *batch, key=None) -> (gradient, PerExample)``. The batch is arrays,
        or trees of them, with a leading batch axis; `key` is a random key, needed for noise. The
        gradient is summed in float32 at least and has the dtypes of params.

    Raises:
        ValueError: where an argument is out of its range, or there is noise and no limit; when
            called, where the batch axes differ in length, or there is noise and no key.

    Source: M. Abadi et al., *Deep learning with differential privacy*, CCS 2016.

    >>> import jax.numpy as jnp, jaxreg
    >>> loss = lambda w, x, y: (x @ w - y) ** 2 / 2
    >>> gradient = jaxreg.per_example_clip(loss, max_norm=1.0, micro_batch=2)
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), jnp.array([-5.0, -0.3, 0.0])
    >>> grads, seen = gradient(jnp.zeros(2), x, y)
    >>> [round(float(g), 4) for g in grads], round(float(seen.clipped), 4)
    ([0.3333, 0.1], 0.3333)
    """
    if not callable(loss):
        accepted = "a function (params, *example) -> scalar"
        raise _check.ArgumentError("loss", _check.describe(loss), accepted)
    max_norm = _check.positive("max_norm", max_norm)
    noise_multiplier = _check.nonnegative("noise_multiplier", noise_multiplier)
    if micro_batch is not None:
        micro_batch = _check.whole_number("micro_batch", micro_batch, at_least=1)
    _check.choice("on_nonfinite", on_nonfinite, POLICIES)
    known = _check.is_host(noise_multiplier)
    noisy = not known or noise_multiplier > 0
    if known and noisy:
        accepted = "a finite number > 0, as there is noise in proportion to it"
        max_norm = _check.scalar("max_norm", max_norm, accepted, math.isfinite)

    def one(params: PyTree, example: tuple[Any, ...]) -> tuple[list[jax.Array], _Figures]:
        value, grads = jax.value_and_grad(loss)(params, *example)
        leaves = jax.tree.leaves(grads)
        norm = norms_of_groups([leaves])[0]
        is_finite = jnp.isfinite(norm)
        if on_nonfinite == "zero":
            leaves = [finite(g) for g in leaves]
            norm = norms_of_groups([leaves])[0]
        coefficient = shrinking(norm, max_norm)
        leaves = [_tree.widen(g) for g in leaves]
        clipped = [g * coefficient.astype(_tree.real_dtype(g.dtype)) for g in leaves]
        if on_nonfinite == "skip":
            clipped = [jnp.where(is_finite, g, 0) for g in clipped]
        return clipped, _Figures(value, norm, coefficient < 1, ~is_finite)

    def summed(params: PyTree, batch: tuple[Any, ...]) -> tuple[list[jax.Array], _Figures]:
        each, figures = jax.vmap(one, (None, 0))(params, batch)
        return [g.sum(0) for g in each], figures

    def gradient(
        params: PyTree, *batch: Any, key: jax.Array | None = None
    ) -> tuple[PyTree, PerExample]:
        size = _batch_size(batch)
        if noisy and key is None:
            raise _check.ArgumentError("key", "None", "a random key, as there is noise to be added")
        # The gradient of what all devices share would be summed over them before it is clipped.
        shards = frozenset().union(*map(varying_axes, jax.tree.leaves(batch)))
        own_params = jax.tree.map(lambda p: varying(p, shards), params)
        own = lambda part: summed(own_params, part)  # noqa: E731
        sums, figures = _in_parts(own, batch, size, micro_batch or size)
        names = sharding_axes(sums, axis_name)
        if names:
            sums, size = jax.lax.psum((sums, size), names)
        if noisy and key is not None:
            sigma = jnp.asarray(noise_multiplier)
            deviation = jnp.where(sigma == 0, 0, sigma * jnp.asarray(max_norm))  # of no limit, too
            keys = [jax.random.fold_in(key, i) for i in range(len(sums))]
            pairs = zip(keys, sums, strict=True)
            noises = [jax.random.normal(k, g.shape, g.dtype) for k, g in pairs]
            # Of a complex number JAX draws both parts with half of the variance.
            noises = [n * 2**0.5 if jnp.iscomplexobj(n) else n for n in noises]
            sums = [g + deviation.astype(g.dtype) * n for g, n in zip(sums, noises, strict=True)]
        leaves, treedef = jax.tree.flatten(params)
        means = [(g / size).astype(p.dtype) for g, p in zip(sums, leaves, strict=True)]
        seen = PerExample(
            figures.loss,
            figures.norm,
            jnp.mean(figures.clipped, dtype=jnp.float32),
            jnp.sum(figures.nonfinite, dtype=jnp.int32),
        )
        return treedef.unflatten(means), seen

    return gradient


class _Figures(NamedTuple):
    loss: jax.Array
    norm: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array


def _batch_size(batch: tuple[Any, ...]) -> int:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        given = f"arrays of shapes {', '.join(map(str, shapes)) or 'none'}"
        raise _check.ArgumentError("batch", given, "arrays with one leading batch axis, not empty")
    return sizes.pop()  # pyright: ignore[reportReturnType]


def _in_parts(
    summed: Callable[[Any], Any], batch: Any, size: int, part: int
) -> tuple[list[jax.Array], _Figures]:
    """The sums over micro-batches of equal size one after the other, and a last smaller one."""
    whole, rest = divmod(size, part)
    if (whole <= 1 and not rest) or not whole:
        return summed(batch)
    parts = jax.tree.map(lambda x: x[: whole * part].reshape(whole, part, *x.shape[1:]), batch)
    first = jax.eval_shape(summed, jax.tree.map(lambda x: x[0], parts))[0]
    zeros = [varying(jnp.zeros(g.shape, g.dtype), varying_axes(g)) for g in first]

    def add(total: list[jax.Array], batch: Any) -> tuple[list[jax.Array], _Figures]:
        own, figures = summed(batch)
        return [a + b for a, b in zip(total, own, strict=True)], figures

    sums, figures = jax.lax.scan(add, zeros, parts)
    figures = jax.tree.map(lambda x: x.reshape(whole * part), figures)
    if not rest:
        return sums, figures
    sums, last = add(sums, jax.tree.map(lambda x: x[whole * part :], batch))
    return sums, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), figures, last)
