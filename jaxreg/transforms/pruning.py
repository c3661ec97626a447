r"""Pruning: a mask of the weights that are kept, and zeros in the others.

A pruning transformation comes last in a chain, after the learning rate. Its update takes a pruned
weight to zero and keeps it there, and is the one it was given for the others. A weight that was
pruned stays so. Masks are chosen by the weights before the step: by those after it, every step
would write its update to memory once more.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.penalties.cardinality import NM, largest, ranks

Number = float | jax.Array
Keep = Callable[[jax.Array, list[jax.Array]], list[jax.Array]]


class PruningState(NamedTuple):
    """State of `magnitude_pruning` and `n_m_pruning`.

    Attributes:
        count: steps taken, an int32 scalar.
        masks: arrays of bools, True where a weight is kept: one for each leaf that is pruned, in
            the order of the leaves.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: tuple[jax.Array, ...]


def magnitude_pruning(
    sparsity: Number | optax.Schedule,
    *,
    scope: Literal["global", "layer", "erk"] = "global",
    every: int = 1,
    where: _where.Selector | str = _where.kernels,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the largest weights and zeros the others: magnitude pruning during training.

    For gradual pruning give a schedule; that of Zhu and Gupta, which rises from 0 to the final
    sparsity as $1 - (1 - t / T)^3$, is ``optax.polynomial_schedule(0.0, final, 3, T, begin)``.

    Args:
        sparsity: the share of zeros, in [0, 1), a traced scalar, or a schedule.
        scope: "global" compares all weights with each other; "layer" prunes each leaf to the same
            share; "erk" (Erdos-Renyi-kernel) keeps in a leaf a share of the weights proportional
            to the sum of its axes' lengths over their product, so that small layers stay dense,
            with the given share of zeros in all.
        every: masks are chosen anew in every so many steps, the first one included.
        where: the leaves that are pruned: a selector or a path pattern; by default kernels.

    A leaf that starts at 0 (of LoRA, say) is not told apart by magnitude: give it a schedule that
    starts at 0 too.

    Returns:
        An optax transformation with state `PruningState`, the last of a chain: what comes after it
        would move pruned weights. ``update`` needs ``params``. Under ``optax.inject_hyperparams``
        give ``static_args=("scope", "every", "where")``.

    Raises:
        ValueError: where an argument is out of its range; at ``init`` where the selector matches
            no leaf or one that is not real floating; at ``update`` without params.

    Sources: M. Zhu and S. Gupta, *To prune, or not to prune*, ICLR 2018 workshop; U. Evci, T.
    Gale, J. Menick, P. Castro and E. Elsen, *Rigging the lottery*, ICML 2020 (for "erk").

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(0.1), jaxreg.magnitude_pruning(0.5))
    >>> w = jnp.array([0.1, -2.0, 3.0, 0.2])
    >>> updates, _ = tx.update(jnp.zeros(4), tx.init(w), w)
    >>> optax.apply_updates(w, updates).tolist()
    [0.0, -2.0, 3.0, 0.0]
    """
    if not _check.is_schedule(sparsity):
        sparsity = _check.fraction("sparsity", sparsity)
    _check.choice("scope", scope, ("global", "layer", "erk"))

    def keep(count: jax.Array, sizes: list[jax.Array]) -> list[jax.Array]:
        share = sparsity(count) if _check.is_schedule(sparsity) else sparsity
        dense = 1 - jnp.asarray(share, jnp.float32)
        if scope == "global":
            return largest(sizes, _rounded(dense * sum(x.size for x in sizes)))
        counts = [dense * x.size for x in sizes] if scope == "layer" else _erk(dense, sizes)
        return [largest([x], _rounded(n))[0] for x, n in zip(sizes, counts, strict=True)]

    return _pruning(keep, every, where)


def n_m_pruning(
    n: int | optax.Schedule,
    m: int,
    *,
    axis: int = -2,
    every: int = 1,
    where: _where.Selector | str = _where.kernels,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the n largest weights of each block of m along an axis, such as 2:4, in training.

    A ramp is a schedule of n that falls from m: ``optax.linear_schedule(4, 2, 1000)`` keeps 4,
    then 3, then 2 of 4; what it gives is rounded up.

    Args:
        n: a whole number from 0 to m, or a schedule.
        m: a whole number >= 1, a divisor of the axis' length.
        axis: along which the blocks lie; by default the input axis of a Flax kernel.
        every: as in `magnitude_pruning`.
        where: as in `magnitude_pruning`.

    Returns:
        An optax transformation, as `magnitude_pruning` is. Under ``optax.inject_hyperparams`` all
        arguments are static: ``static_args=("n", "m", "axis", "every", "where")``.

    Raises:
        ValueError: as `magnitude_pruning` does; and where n > m, m does not divide the axis, or a
            leaf has no such axis.

    Source: A. Zhou et al., *Learning N:M fine-grained structured sparse neural networks from
    scratch*, ICLR 2021.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(0.1), jaxreg.n_m_pruning(2, 4, axis=0))
    >>> w = jnp.array([0.1, -2.0, 3.0, 0.2])
    >>> updates, _ = tx.update(jnp.zeros(4), tx.init(w), w)
    >>> optax.apply_updates(w, updates).tolist()
    [0.0, -2.0, 3.0, 0.0]
    """
    fixed: Any = m if _check.is_schedule(n) else n
    pattern = NM(fixed, m, axis=axis)

    def keep(count: jax.Array, sizes: list[jax.Array]) -> list[jax.Array]:
        kept: Any = jnp.ceil(jnp.asarray(n(count))) if _check.is_schedule(n) else n
        masks = []
        for size in sizes:
            blocks, inner = pattern.blocks(size)
            masks.append((ranks(blocks, inner) < kept).reshape(size.shape))
        return masks

    return _pruning(keep, every, where)


def _pruning(
    keep: Keep, every: int, where: _where.Selector | str
) -> optax.GradientTransformationExtraArgs:
    """A pruning transformation, where ``keep(count, sizes)`` chooses the masks of the leaves."""
    every = _check.whole_number("every", every, at_least=1)
    selector = _where.as_selector(where)

    def chosen(params: Any) -> list[bool]:
        return jax.tree.leaves(selector.mask(params))

    def init(params: optax.Params) -> PruningState:
        pruned = jax.tree.map(lambda p, yes: p if yes else None, params, selector.mask(params))
        _tree.check_real("params", pruned)
        zero = jnp.zeros((), jnp.int32)
        # What does not fit a leaf is an error before the first step.
        for path, leaf in zip(_where.paths(pruned), jax.tree.leaves(pruned), strict=True):
            with _check.on_leaf(path):
                jax.eval_shape(keep, zero, [_tree.widen(leaf)])
        return PruningState(zero, tuple(jnp.ones_like(p, bool) for p in jax.tree.leaves(pruned)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PruningState]:
        del extra_args
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        moves, pruned = treedef.flatten_up_to(updates), chosen(params)
        numbers = [i for i, yes in enumerate(pruned) if yes]
        masks = state.masks
        dtype = _tree.widest_dtype([leaves[i] for i in numbers])

        def choose() -> tuple[jax.Array, ...]:
            # What was pruned before is smaller than any zero that was not.
            least = jnp.finfo(dtype).tiny
            sizes = [
                jnp.where(m, jnp.maximum(jnp.abs(leaves[i].astype(dtype)), least), 0)
                for m, i in zip(masks, numbers, strict=True)
            ]
            kept = keep(state.count, sizes)
            return tuple(m & new for m, new in zip(masks, kept, strict=True))

        masks = jax.lax.cond(state.count % every == 0, choose, lambda: masks)
        for i, mask in zip(numbers, masks, strict=True):
            # In the weight's dtype: a narrower -p would not take it to 0.
            moves[i] = jnp.where(mask, moves[i].astype(leaves[i].dtype), -leaves[i])
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(moves), PruningState(count, masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _rounded(count: jax.Array) -> jax.Array:
    return jnp.round(count).astype(jnp.int32)


def _erk(dense: jax.Array, sizes: list[jax.Array]) -> list[jax.Array]:
    """How many weights each leaf keeps: min(size, c * sum of its axes), adding up to the share.

    The leaves that keep all are found from the smallest size / sum on.
    """
    total = dense * sum(x.size for x in sizes)
    sums = [max(1, sum(x.shape)) for x in sizes]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].size / sums[i])
    rest, weight = total, float(sum(sums))
    counts: list[Any] = [None] * len(sizes)
    for i in order:
        counts[i] = jnp.minimum(sizes[i].size, rest * (sums[i] / max(weight, 1.0)))
        rest, weight = rest - counts[i], weight - sums[i]
    return counts
