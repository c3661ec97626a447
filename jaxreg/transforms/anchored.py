"""Decay toward weights that were there before: of a pretrained model, or of earlier tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, summed
from jaxreg.transforms.selected import at, copies, moved, numbers, real_leaves, stepped

Number = float | jax.Array
PyTree = Any


class SelectiveProjectionState(NamedTuple):
    """State of `selective_projection_decay`.

    Attributes:
        count: steps taken, an int32 scalar: what schedules are called with.
        anchor: copies of the weights that the leaves chosen are drawn to, one for each of these.
        inner: the optimizer's state.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    anchor: tuple[jax.Array, ...]
    inner: Any


def selective_projection_decay(
    inner: optax.GradientTransformation,
    strength: Number | optax.Schedule = 1.0,
    *,
    toward: PyTree = "init",
    where: _where.Selector | str = _where.kernels,
    axis_name: AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Selective projection decay (SPD), for fine-tuning: decay of steps that lead away.

    With $p_0$ the anchor, p a leaf before and $p'$ after the optimizer's step, $d = \|p - p_0\|$
    and $d' = \|p' - p_0\|$: where $\sum g \, (p - p_0) > 0$ for the gradient g that comes in, so
    that descent would take the leaf back,

    $$p' \leftarrow p' - strength \cdot \mathrm{clip}((d' - d) / d', 0, 1) \, (p' - p_0).$$

    So it acts where the optimizer, by its momentum say, goes further away all the same. Strength 1
    puts the leaf back to the distance d; it may be larger.

    Args:
        inner: a whole optimizer, such as ``optax.adamw(1e-4)``. It is wrapped because the decay
            needs the raw gradient: let this come first in any chain.
        strength: a number >= 0, a traced scalar, or a schedule.
        toward: the anchor: "init", the weights at ``init``, or a tree like params.
        where: the leaves it is for: a selector or a path pattern; by default kernels. Layers that
            are stacked in one leaf are decided on together.
        axis_name: inside ``shard_map``, the mesh axes that leaves are sharded along, as in
            `jaxreg.clip_by_global_norm`: norms are of whole leaves.

    Returns:
        An optax transformation with state `SelectiveProjectionState`, which holds a copy of the
        anchor for the leaves chosen; updates keep their dtype. ``update`` needs ``params``.

    Raises:
        ValueError: where the strength is negative or NaN, or `toward` is another word; where params
            are missing; at ``init`` where `toward` does not fit them, or the selector matches no
            leaf, or one that is not real floating.

    Source: J. Tian, C. Huang and Z. Kira, *Rethinking weight decay for robust fine-tuning of
    foundation models*, NeurIPS 2024, arXiv:2411.01713.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.selective_projection_decay(optax.sgd(-1.0), toward=jnp.zeros(2))
    >>> w = jnp.array([0.0, 1.0])
    >>> updates, _ = tx.update(jnp.array([0.0, 1.0]), tx.init(w), w)  # it goes up the gradient
    >>> optax.apply_updates(w, updates).tolist()
    [0.0, 1.0]
    """
    _check.transformation("inner", inner)
    strength = _check.number_or_schedule("strength", strength)
    if isinstance(toward, str) and toward != "init":
        raise _check.ArgumentError("toward", repr(toward), "'init', or a tree like params")
    selector = _where.as_selector(where)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SelectiveProjectionState:
        anchor_of = copies("toward", toward, selector, params)
        real_leaves(selector, params)
        return SelectiveProjectionState(jnp.zeros((), jnp.int32), anchor_of, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SelectiveProjectionState]:
        params = _check.params_given(params)
        gradients = jax.tree.leaves(updates)
        updates, after = inner.update(updates, state.inner, params, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        chosen = numbers(selector, params)
        anchors = [_tree.widen(p0) for p0 in state.anchor]
        pairs = [*zip(chosen, anchors, strict=True)]
        own_strength = jnp.asarray(at("strength", strength, state.count))
        ways = [_tree.widen(leaves[i]) - p0 for i, p0 in pairs]
        aways = [moved(leaves[i], moves[i]) - p0 for i, p0 in pairs]
        dots = [
            jnp.stack([jnp.sum(gradients[i].astype(way.dtype) * way), _square(way), _square(away)])
            for i, way, away in zip(chosen, ways, aways, strict=True)
        ]
        totals = summed(dots, aways, axis_name) if dots else []
        for i, away, (descent, before, after_step) in zip(chosen, aways, totals, strict=True):
            u, dtype = moves[i], _tree.wide_dtype(moves[i].dtype)
            # One root for both, which has no derivative at 0.
            grows = (descent > 0) & (after_step > before)
            share = jnp.where(grows & (before > 0), before / _or_one(after_step), 1)
            share = jnp.where(grows & (before == 0), 0, jnp.sqrt(share))
            amount = own_strength.astype(dtype) * (1 - share).astype(dtype)
            moves[i] = (u.astype(dtype) - amount * away.astype(dtype)).astype(u.dtype)
        kept = SelectiveProjectionState(stepped(state.count), state.anchor, after)
        return treedef.unflatten(moves), kept

    return optax.GradientTransformationExtraArgs(init, update)


class EwcState(NamedTuple):
    """State of `ewc`.

    Attributes:
        count: steps taken, an int32 scalar: what schedules are called with.
        anchor: copies of the weights that the leaves chosen are drawn to, one for each of these.
        fisher: how strongly; copies, too.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    anchor: tuple[jax.Array, ...]
    fisher: tuple[jax.Array, ...]


def ewc(
    strength: Number | optax.Schedule,
    anchor: PyTree,
    fisher: PyTree,
    *,
    where: _where.Selector | str = _where.everything,
) -> optax.GradientTransformation:
    r"""Elastic weight consolidation: $g + strength \cdot F \circ (p - p^*)$ before the direction.

    The gradient of $\frac{strength}{2} \sum_i F_i (p_i - p^*_i)^2$: what an earlier task needs, by
    its Fisher information F (`jaxreg.diagonal_fisher`), stays near the weights $p^*$ that were
    found for it. With F = 1 it is L2-SP. The paper's $\lambda$ is the strength.

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        anchor: $p^*$, a tree like params.
        fisher: F, a tree like params of numbers >= 0.
        where: the leaves it is for: a selector or a path pattern; by default all.

    Returns:
        An optax transformation with state `EwcState`, which holds copies of anchor and Fisher
        information for the leaves chosen; gradients keep their dtype. ``update`` needs ``params``.

    Raises:
        ValueError: where the strength is negative or NaN, or a number of `fisher` is; at ``init``
            where `anchor` or `fisher` does not fit params, or the selector matches no leaf, or one
            that is not real floating; where params are missing.

    Source: J. Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, PNAS
    114(13), 2017.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> anchor, fisher = jnp.array([1.0, 1.0]), jnp.array([4.0, 0.0])
    >>> tx = optax.chain(jaxreg.ewc(0.5, anchor, fisher), optax.sgd(0.1))
    >>> w = jnp.array([2.0, 2.0])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    >>> [round(float(u), 4) + 0.0 for u in updates]
    [-0.2, 0.0]
    """
    strength = _check.number_or_schedule("strength", strength)
    for path, values in zip(_where.paths(fisher), jax.tree.leaves(fisher), strict=True):
        with _check.on_leaf(path):
            _check.nonnegative_array("fisher", values)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> EwcState:
        real_leaves(selector, params)
        given = {"anchor": anchor, "fisher": fisher}
        kept = (copies(name, tree, selector, params) for name, tree in given.items())
        return EwcState(jnp.zeros((), jnp.int32), *kept)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, EwcState]:
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        own_strength = jnp.asarray(at("strength", strength, state.count))
        kept = zip(state.anchor, state.fisher, strict=True)
        for i, (p0, f) in zip(numbers(selector, params), kept, strict=True):
            dtype = _tree.wide_dtype(moves[i].dtype)
            factor = own_strength.astype(dtype) * f.astype(dtype)
            pull = factor * (leaves[i].astype(dtype) - p0.astype(dtype))
            moves[i] = (moves[i].astype(dtype) + pull).astype(moves[i].dtype)
        return treedef.unflatten(moves), state._replace(count=stepped(state.count))

    return optax.GradientTransformation(init, update)


def diagonal_fisher(
    log_likelihood: Callable[..., jax.Array],
    params: PyTree,
    examples: tuple[Any, ...],
    *,
    micro_batch: int | None = None,
) -> PyTree:
    r"""The diagonal of the empirical Fisher information, $F_i = \frac1B \sum_b (\partial_i \log
    p(y_b \mid x_b, w))^2$.

    With the labels of the data; for the Fisher information itself give labels that are drawn from
    the model.

    Args:
        log_likelihood: ``log_likelihood(params, *example)``, a scalar; an example has no batch
            axis.
        params: a tree of real floating arrays.
        examples: a tuple of arrays, or trees of them, with a leading batch axis.
        micro_batch: how many examples' gradients are in memory at once; all by default.

    Returns:
        A tree like params, in float32 at least.

    Raises:
        ValueError: where the examples are no tuple or differ in the length of their batch axes, or
            `micro_batch` is below 1, or a leaf of params is not real floating.

    >>> import jax.numpy as jnp, jaxreg
    >>> log_likelihood = lambda mean, y: -((y - mean) ** 2) / 2
    >>> print(jaxreg.diagonal_fisher(log_likelihood, jnp.array(1.0), (jnp.array([0.0, 3.0]),)))
    2.5
    """
    if not callable(log_likelihood):
        accepted = "a function (params, *example) -> scalar"
        raise _check.ArgumentError("log_likelihood", _check.describe(log_likelihood), accepted)
    _tree.check_real("params", params)
    size = _batch_size(examples)
    if micro_batch is not None:
        micro_batch = _check.whole_number("micro_batch", micro_batch, at_least=1)
    part = min(size, micro_batch or size)

    def squares(examples: tuple[Any, ...]) -> PyTree:
        batched = (None, *[0] * len(examples))
        each = jax.vmap(jax.grad(log_likelihood), batched)(params, *examples)
        return jax.tree.map(lambda g: jnp.sum(jnp.square(_tree.widen(g)), axis=0), each)

    def add(total: PyTree, examples: tuple[Any, ...]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, squares(examples)), None

    whole, rest = divmod(size, part)
    cut = lambda x: x[: whole * part].reshape(whole, part, *x.shape[1:])  # noqa: E731
    examples = jax.tree.map(jnp.asarray, examples)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, _tree.wide_dtype(p.dtype)), params)
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(cut, examples))
    if rest:
        total, _ = add(total, jax.tree.map(lambda x: x[whole * part :], examples))
    return jax.tree.map(lambda t: t / size, total)


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x))


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)


def _batch_size(examples: tuple[Any, ...]) -> int:
    accepted = "a tuple of arrays with one leading batch axis, not empty"
    if not isinstance(examples, tuple):
        raise _check.ArgumentError("examples", _check.describe(examples), accepted)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(examples)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        given = f"arrays of shapes {', '.join(map(str, shapes)) or 'none'}"
        raise _check.ArgumentError("examples", given, accepted)
    return sizes.pop()
