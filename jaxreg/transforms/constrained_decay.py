"""Weight decay that is as strong, leaf by leaf, as a bound on the weights needs it to be."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, summed
from jaxreg.transforms.selected import moved, numbers, real_leaves, stepped

Number = float | jax.Array
Init = Literal["inflection", "uniform", "dependent", "warm_start"]
AVERAGE = 0.99


class ConstrainedDecayState(NamedTuple):
    """State of `constrained_decay`: vectors of one number for each leaf chosen.

    Attributes:
        count: steps taken, an int32 scalar.
        multiplier: the strength of the decay, at least 0 and below 1/2.
        bound: on the sum of squares; infinite before it is known.
        average: of the sums of squares; its growth has not fallen yet. () but for "inflection".
        growth: of the average in the last step.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    multiplier: jax.Array
    bound: jax.Array
    average: Any
    growth: Any


def constrained_decay(
    kappa: Number = 1.0,
    init: Init = "inflection",
    *,
    mu: Number = 1.0,
    warm_up: int | None = None,
    where: _where.Selector | str = _where.kernels,
    axis_name: AxisNames | None = None,
) -> optax.GradientTransformation:
    r"""Constrained parameter regularization (CPR): each leaf has a bound in place of a strength.

    With $p'$ a leaf's weights after the optimizer's step and n their number, $\nu \leftarrow
    \max(0, \nu + \frac{\mu}{n} (\sum p'^2 - \kappa_l))$ and $p' \leftarrow p' - 2 \nu p'$: the
    multiplier method for $\sum p^2 \le \kappa_l$. There is no decay where the bound is not
    reached, and on it as much as the gradient asks for. Its place is after the learning rate, as
    ``regularize(decay=...)`` or as a link behind an optimizer.

    The sum that is held at the bound is that of $p'$, before the decay.

    Two things are not the paper's. First, it has $\mu$ in place of $\mu / n$: its $\mu$ is ``mu /
    n`` of a leaf here, so that at the same number a multiplier here follows n times as slowly, at a
    speed that does not depend on the leaf's size. (The authors' code is known both ways: as in the
    paper, and with $\mu / n$ and a bound on the mean square, that is n times its kappa here.)
    Second, its factor $1 - 2 \nu$ may be below 0, which turns the weights around, or near 0, which
    takes them to nothing before $\nu$ can fall (weights of mean square 1/2 above their bound).
    Here, where $\nu \ge 1/2$, or the decay would take weights outside of the bound to less than
    half of it, these are scaled to the bound, and $\nu$ starts anew at 0; in the paper and in that
    code there is no such branch.

    Args:
        kappa: a number > 0, or a traced scalar. It is about the sum of squares, not their mean: one
            bound for leaves of different sizes needs "dependent" or "inflection".
        init: how the bound $\kappa_l$ of a leaf is found. "uniform": it is `kappa`; "dependent":
            `kappa` times the sum of squares at ``init``; "warm_start": `kappa` times that after
            `warm_up` steps; "inflection": `kappa` times that of the step at which the growth of
            its exponential average (0.99 of the last one) first falls. With the last two there is
            no decay before.
        mu: how fast $\nu$ follows, a number > 0, or a traced scalar: n times the paper's.
        warm_up: a number of steps >= 1, with "warm_start".
        where: the leaves it is for: a selector or a path pattern; by default kernels. Layers that
            are stacked in one leaf have one bound.
        axis_name: inside ``shard_map``, the mesh axes that leaves are sharded along, as in
            `jaxreg.clip_by_global_norm`: norms are of whole leaves.

    Returns:
        An optax transformation with state `ConstrainedDecayState`; updates keep their dtype.
        ``update`` needs ``params``. The weights after the step are read and written once more than
        in `jaxreg.weight_decay`, as their norm comes first.

    Raises:
        ValueError: where an argument is out of its range, or `warm_up` is missing or not needed;
            at ``init`` where the selector matches no leaf, or one that is not real floating; at
            ``update`` where params are missing.

    Source: J. Franke, M. Hefenbrock, G. Koehler and F. Hutter, *Improving deep learning
    optimization through constrained parameter regularization*, NeurIPS 2024, arXiv:2311.09058.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(0.01), jaxreg.constrained_decay(0.25, "uniform"))
    >>> w = jnp.array([0.3, 0.4])
    >>> state = tx.init(w)
    >>> for _ in range(200):  # the gradient goes on pushing outward
    ...     updates, state = tx.update(jnp.array([-0.1, -0.1]), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> print((w**2).sum().round(2))
    0.25
    """
    kappa = _check.positive_finite("kappa", kappa)
    mu = _check.positive_finite("mu", mu)
    init = _check.choice("init", init, get_args(Init))  # pyright: ignore[reportAssignmentType]
    if (init == "warm_start") != (warm_up is not None):
        accepted = "a whole number >= 1 with init='warm_start', and None with any other init"
        raise _check.ArgumentError("warm_up", f"{warm_up!r} with init={init!r}", accepted)
    if warm_up is not None:
        warm_up = _check.whole_number("warm_up", warm_up, at_least=1)
    selector = _where.as_selector(where)

    def totals(own: list[jax.Array], leaves: list[jax.Array], dtype: Any) -> jax.Array:
        return summed(own, leaves, axis_name) if own else jnp.zeros(0, dtype)

    def sums_of_squares(leaves: list[jax.Array], dtype: Any) -> jax.Array:
        own = [jnp.sum(jnp.square(_tree.widen(x))).astype(dtype) for x in leaves]
        return totals(own, leaves, dtype)

    def init_fn(params: optax.Params) -> ConstrainedDecayState:
        leaves = real_leaves(selector, params)
        dtype = _tree.widest_dtype(leaves)
        count, zeros = jnp.zeros((), jnp.int32), jnp.zeros(len(leaves), dtype)
        bound = jnp.full(len(leaves), jnp.inf, dtype)
        average = growth = ()
        if init == "uniform":
            bound = jnp.broadcast_to(jnp.asarray(kappa).astype(dtype), bound.shape)
        elif init == "dependent":
            bound = jnp.asarray(kappa).astype(dtype) * sums_of_squares(leaves, dtype)
        elif init == "inflection":
            average = sums_of_squares(leaves, dtype)
            growth = jnp.full(len(leaves), -jnp.inf, dtype)
        return ConstrainedDecayState(count, zeros, bound, average, growth)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ConstrainedDecayState]:
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        chosen = numbers(selector, params)
        dtype = state.bound.dtype
        after = [moved(leaves[i], moves[i]) for i in chosen]
        squares = sums_of_squares(after, dtype)
        sizes = jnp.maximum(totals([_size(w, dtype) for w in after], after, dtype), 1)
        excess = jnp.asarray(mu).astype(dtype) / sizes * (squares - state.bound)
        multiplier = jnp.maximum(state.multiplier + excess, 0)
        outside = squares > state.bound
        kept = jnp.square(1 - 2 * multiplier) * squares
        turns = (multiplier >= 0.5) | (outside & (kept < state.bound / 2))
        to_bound = jnp.where(outside, state.bound / jnp.where(outside, squares, 1), 1)
        # The root has no derivative at 0.
        to_bound = jnp.where(to_bound > 0, jnp.sqrt(jnp.where(to_bound > 0, to_bound, 1)), 0)
        decay = jnp.where(turns, 1 - to_bound, 2 * multiplier)
        multiplier = jnp.where(turns, 0, multiplier)
        for k, i in enumerate(chosen):
            # From the weights after the step, not from the step: XLA keeps only these until the
            # norms are known.
            step = after[k] - _tree.widen(leaves[i]) - decay[k].astype(after[k].dtype) * after[k]
            moves[i] = step.astype(moves[i].dtype)
        count = stepped(state.count)
        bound, average, growth = _next_bound(state, squares, count)
        state = ConstrainedDecayState(count, multiplier, bound, average, growth)
        return treedef.unflatten(moves), state

    def _next_bound(
        state: ConstrainedDecayState, squares: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Any, Any]:
        found = jnp.asarray(kappa).astype(squares.dtype) * squares
        if init == "warm_start":
            return jnp.where(count == warm_up, found, state.bound), (), ()
        if init == "inflection":
            growth = (1 - AVERAGE) * (squares - state.average)
            falls = (growth < state.growth) & jnp.isinf(state.bound)
            bound = jnp.where(falls, found, state.bound)
            return bound, state.average + growth, growth
        return state.bound, (), ()

    return optax.GradientTransformation(init_fn, update)


def _size(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.asarray(float(x.size), dtype)
