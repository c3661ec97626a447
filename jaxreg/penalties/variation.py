r"""Total variation along an axis: it draws neighbours together, and makes them equal.

The prox on lines is direct. All lines are laid end to end and cut into segments in rounds. In a
round each segment compares its solution with one threshold c, the constant that would be best for
the whole of it: where $x_i > c$ is the solution of a binary problem, which one forward pass of
messages and one backward pass of decisions solve exactly. A segment is cut where the answer
changes, and its parts are independent from then on, each pulled up or down by a neighbour that is
known to be higher or lower. A segment with one answer for all is constant. Sources: the binary
problems: A. Chambolle and J. Darbon, *On total variation minimization and surface evolution using
parametric maximum flows*, IJCV 84(3), 2009; the messages: N. Johnson, *A dynamic programming
algorithm for the fused lasso and L0-segmentation*, JCGS 22(2), 2013.

Both passes compose functions of one number, so they are scans over all lines and segments at
once, and a round is linear in the size of x. A line of n entries takes 7 rounds where it is noise
and about $\log_2 n + 5$ where it is monotone. Worst are data that grow by a factor of n from one
entry to the next, where each mean splits off one outlier: the exponents of the dtype bound those
rounds (124 were seen in float64).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg.penalties.base import Penalty, penalty, static
from jaxreg.penalties.constraints import rounding
from jaxreg.penalties.separable import ratio, soft_threshold

Number = float | jax.Array


def _axis(name: str, value: Any) -> int:
    # Whether there is such an axis, only an array can tell.
    return _check.whole_number(name, value, at_least=-64)


@penalty
class TotalVariation(Penalty):
    r"""Total variation along an axis, $R(x) = s \sum_i |x_{i+1} - x_i|$: piecewise constant x.

    Summed over the lines along the axis. Its prox is exact, for one step a coordinate too, and as
    fast as one to fifteen sorts of x. Its derivative is that of the means over the pieces. A
    sharded array is gathered (an all-gather); the result has its sharding.
    Source: L. Rudin, S. Osher and E. Fatemi, *Nonlinear total variation based noise removal
    algorithms*, Physica D 60, 1992.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        axis: the axis that neighbours are taken along.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar, or x has no such
            axis.

    >>> import jax.numpy as jnp, jaxreg
    >>> penalty = jaxreg.TotalVariation(1.0)
    >>> penalty.prox(jnp.array([0.0, 1.0, 5.0, 6.0])).tolist()
    [1.0, 1.0, 5.0, 5.0]
    >>> float(penalty.value(jnp.array([0.0, 1.0, 5.0, 6.0])))
    6.0
    """

    convex, elementwise_step = True, True

    strength: Number
    axis: int = static(_axis, default=-1, kw_only=True)

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * _variation(x, self.axis)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return _prox_along(x, self.axis, self.strength, step)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        sums, balanced = _partial_sums(grad, self.axis)
        critical = ratio(jnp.max(jnp.abs(sums), initial=0), self.strength)
        return jnp.where(balanced, critical, jnp.inf)


@penalty
class FusedLasso(Penalty):
    r"""The fused lasso, $R(x) = l_1 \sum_i |x_i| + v \sum_i |x_{i+1} - x_i|$: few pieces, many 0.

    Summed over the lines along an axis. Its prox is the soft threshold at $step \cdot l_1$ of the
    prox of the total variation. Sharded arrays: as `TotalVariation`. Sources: R. Tibshirani et
    al., *Sparsity and smoothness via the fused lasso*, JRSS B 67(1), 2005; the prox: J. Friedman
    et al., *Pathwise coordinate optimization*, Annals of Applied Statistics 1(2), 2007.

    Args:
        l1: strength of the L1 part, a number >= 0, or a traced scalar.
        variation: v, strength of the total variation, likewise.
        axis: the axis that neighbours are taken along.

    Raises:
        ValueError: where a strength is negative, infinite, NaN or no scalar, or x has no such
            axis.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.FusedLasso(1.5, 1.0).prox(jnp.array([0.0, 1.0, 5.0, 6.0])).tolist()
    [0.0, 0.0, 3.5, 3.5]
    """

    convex, sparse = True, True

    scales = ("l1", "variation")

    l1: Number
    variation: Number
    axis: int = static(_axis, default=-1, kw_only=True)

    def _value(self, x: jax.Array) -> jax.Array:
        return self.l1 * jnp.sum(jnp.abs(x)) + self.variation * _variation(x, self.axis)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(_prox_along(x, self.axis, self.variation, step), step * self.l1)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        """The largest |sum of grad over S| / R(indicator of S) over the intervals S of a line.

        Every R-unit ball's extreme point is such an indicator. Dinkelbach's iteration finds it: S
        maximizes |sum over S| - c R(S) for the ratio c of the S before; c increases to the largest
        ratio in a few rounds (W. Dinkelbach, *On nonlinear fractional programming*, Management
        Science 13(7), 1967).
        """
        if grad.size == 0:
            return jnp.zeros((), grad.dtype)
        inner, balanced = _partial_sums(grad, self.axis)
        total = jnp.where(balanced, 0, jnp.sum(grad, self.axis, keepdims=True))
        ends = jnp.concatenate([inner, jnp.moveaxis(total, self.axis, -1)], -1)
        length = ends.shape[-1]
        ends = jnp.pad(ends.reshape(-1, length), [(0, 0), (1, 0)])
        sums = jnp.concatenate([ends, -ends])  # of either sign: rows of (length + 1)
        place = jnp.arange(length + 1)
        jumps = ((place > 0) & (place < length)).astype(grad.dtype)

        def multiplier(interval: tuple[jax.Array, ...]) -> jax.Array:
            row, start, end = interval
            size = (end - start).astype(grad.dtype)
            cost = self.l1 * size + self.variation * (jumps[start] + jumps[end])
            return ratio(jnp.maximum(sums[row, end] - sums[row, start], 0), cost)

        def best(c: jax.Array) -> tuple[jax.Array, ...]:
            rest = sums - (c * self.l1 * place.astype(grad.dtype))[None]
            jump = (c * self.variation * jumps)[None]
            before = jax.lax.cummin(rest + jump, axis=1)[:, :-1]
            gain = (rest - jump)[:, 1:] - before
            row, last = jnp.unravel_index(jnp.argmax(gain), gain.shape)
            start = jnp.argmin(jnp.where(place <= last, (rest + jump)[row], jnp.inf))
            return row, start, last + 1

        def improve(state: Any) -> Any:
            interval, c, _ = state
            other = best(c)
            better = multiplier(other) > c
            interval = jax.tree.map(lambda new, old: jnp.where(better, new, old), other, interval)
            c = multiplier(interval)
            return interval, c, better & jnp.isfinite(c)

        start = best(jnp.zeros((), grad.dtype))
        interval, _, _ = jax.lax.while_loop(
            lambda state: state[2], improve, (start, multiplier(start), True)
        )
        return multiplier(interval)


def _variation(x: jax.Array, axis: int) -> jax.Array:
    _check.axis("axis", axis, x)
    return jnp.sum(jnp.abs(jnp.diff(x, axis=axis)))


def _partial_sums(grad: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Sums over the starts of lines, moved to the last axis, and whether all lines sum to 0."""
    _check.axis("axis", axis, grad)
    lines = jnp.moveaxis(grad, axis, -1)
    total, size = jnp.sum(lines, -1), jnp.sum(jnp.abs(lines), -1)
    sums = jnp.cumsum(lines, -1)
    return sums[..., :-1], jnp.all(jnp.abs(total) <= rounding(grad) * size)


# The prox of lines ------------------------------------------------------------------------------


def _prox_along(x: jax.Array, axis: int, strength: Number, step: jax.Array) -> jax.Array:
    _check.axis("axis", axis, x)
    if x.size == 0:
        return x
    unit = jax.lax.stop_gradient(jnp.max(step))
    # Steps over the largest one. One of 0 holds its coordinate as well as rounding can tell.
    share = step / jnp.where(unit > 0, unit, 1) if step.ndim else jnp.ones_like(step)
    weight = jnp.broadcast_to(1 / jnp.maximum(share, float(jnp.finfo(x.dtype).eps) ** 2), x.shape)
    lines = jnp.moveaxis(x, axis, -1)
    length = lines.shape[-1]
    inside = jnp.arange(x.size) % length < length - 1
    pull = strength * (unit if step.ndim else step)
    weight = jnp.moveaxis(weight, axis, -1)
    solution = _prox_lines(_Lines(lines.ravel(), weight.ravel(), pull, inside))
    solution = jnp.moveaxis(solution.reshape(lines.shape), -1, axis)
    # Elementwise in x, so that the result is sharded as x is.
    return jnp.where(jnp.isnan(x), x, solution)


class _Lines(NamedTuple):
    r"""Minimize $\sum_i weight_i (x_i - y_i)^2 / 2 + pull \sum_{i: inside_i} |x_{i+1} - x_i|$."""

    y: jax.Array
    """The lines end to end, of shape (n,)."""
    weight: jax.Array
    """Numbers > 0, of shape (n,)."""
    pull: jax.Array
    """A scalar >= 0."""
    inside: jax.Array
    """Whether the right neighbour is of the same line, of shape (n,)."""


@jax.jit
def _prox_lines(lines: _Lines) -> jax.Array:
    """The minimizer, of shape (n,).

    The jump to the right of each place is the sign of $x_{i+1} - x_i$ where that is known, else 0.
    A segment extends over the jumps inside a line that are 0.
    """
    fixed = jax.lax.stop_gradient(lines)
    inside = fixed.inside

    def cut(state: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        jump, near, idle = state
        shift, left = _segments(fixed, jump, near)
        above = _above(fixed, jump, near, shift, left)
        found = jnp.where(inside & (jump == 0), _from_right(above) - above, 0)
        return jump + found, near + shift, jnp.where(jnp.any(found != 0), 0, idle + 1)

    # Where nothing pulls, every difference is a jump.
    free = inside & (fixed.pull == 0)
    jump = jnp.where(free, jnp.sign(_from_right(fixed.y) - fixed.y), 0)
    # A constant that is far from `near` is rounded, and a heavy weight on it misjudged: only after
    # a second round, which starts near it, is a segment that was not cut known to be constant.
    state = (jump, jnp.zeros_like(fixed.y), jnp.int32(0))
    jump, near, _ = jax.lax.while_loop(lambda state: state[2] < 2, cut, state)
    # The jumps are locally constant: the means alone carry the derivative.
    return near + _segments(lines, jump, near)[0]


def _segments(lines: _Lines, jump: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """At each place its segment's best constant minus `near`, and the jump at the left end.

    As a difference the constant keeps its precision, in long sums too.
    """
    y, weight, pull, inside = lines
    joined = inside & (jump == 0)
    follows = _from_left(joined)
    rest, mass, right = _affine_scan(joined, weight * (y - near), weight, jump, reverse=True)
    left = _from_left(jump)
    shift = jnp.where(follows, 0, (rest + pull * (right - left)) / mass)
    shift, left = _affine_scan(follows, shift, jnp.where(follows, 0, left))
    return shift, left


def _above(
    lines: _Lines, jump: jax.Array, near: jax.Array, shift: jax.Array, left: jax.Array
) -> jax.Array:
    """1 where the solution is above the level near + shift, else 0.

    The message at a place is what being above the level costs there over being below it, with all
    to the left chosen for the best; of that no more passes an edge than its pull, on either side.
    It is counted from its value at the segment's left end, `pull * left`: small data would be
    rounded away beside the pull.
    """
    y, weight, pull, inside = lines
    joined = inside & (jump == 0)
    slope = weight * (shift - (y - near))
    slope = jnp.where(jnp.isfinite(slope), slope, 0)  # a NaN stays in its line
    at_end = pull * (jump - left)
    lower = jnp.where(joined, -pull * (1 + left), at_end)
    upper = jnp.where(joined, pull * (1 - left), at_end)
    message = _clip_scan(slope, jnp.where(joined, lower, 0), jnp.where(joined, upper, 0))
    message = _from_left(message) + slope
    above = message < lower
    undecided = ~above & (message <= upper)
    return _affine_scan(undecided, above.astype(y.dtype), reverse=True)[0]


def _from_right(x: jax.Array) -> jax.Array:
    """Each place's right neighbour; 0 at the end."""
    return jnp.concatenate([x[1:], jnp.zeros(1, x.dtype)])


def _from_left(x: jax.Array) -> jax.Array:
    """Each place's left neighbour; 0 at the start."""
    return jnp.concatenate([jnp.zeros(1, x.dtype), x[:-1]])


# Scans ------------------------------------------------------------------------------------------

_Function = tuple[jax.Array, ...]  # its parameters, for each place of a line
_BLOCK = 32


def _affine_scan(keep: jax.Array, *adds: jax.Array, reverse: bool = False) -> jax.Array:
    """$t_i = t_{i-1} + add_i$ where `keep`, else $add_i$: one row for each of `adds`.

    It is linear in them, for automatic differentiation too.
    """

    def at(f: _Function, t: jax.Array) -> jax.Array:
        keep, add = f
        return jnp.where(keep, t, 0) + add  # no product: a NaN stays in its segment

    def then(f: _Function, g: _Function) -> _Function:
        return f[0] & g[0], at(g, f[1])

    order = slice(None, None, -1 if reverse else 1)
    return _scan(then, at, (keep[None, order], jnp.stack(adds)[:, order]))[:, order]


def _clip_scan(add: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    r"""$t_i = \mathrm{clip}(t_{i-1} + add_i, lower_i, upper_i)$."""

    def at(f: _Function, t: jax.Array) -> jax.Array:
        add, lower, upper = f
        return jnp.clip(t + add, lower, upper)

    def then(f: _Function, g: _Function) -> _Function:
        return f[0] + g[0], at(g, f[1]), at(g, f[2])

    return _scan(then, at, (add, lower, upper))


def _scan(
    then: Callable[[_Function, _Function], _Function],
    at: Callable[[_Function, jax.Array], jax.Array],
    functions: _Function,
) -> jax.Array:
    """All of $t_i = f_i(t_{i-1})$ from $t_{-1} = 0$.

    Blocks of places are composed to one function each, those are scanned in the same way, and the
    blocks run from the results, all of them side by side: on a CPU five times as fast as
    `jax.lax.associative_scan`.

    Args:
        then: ``then(f, g)`` is t -> g(f(t)).
        at: ``at(f, t)`` is f(t).
        functions: one array for each parameter; the line is the last axis of each.
    """
    length = functions[0].shape[-1]
    size = min(length, _BLOCK)
    blocks = -(-length // size)

    def by_place(p: jax.Array) -> jax.Array:
        """The parameter by its place in a block: shape (size, ..., blocks)."""
        # What follows the end is no one's input, so any padding will do.
        padded = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, blocks * size - length)])
        return jnp.moveaxis(padded.reshape(*p.shape[:-1], blocks, size), -1, 0)

    places = tuple(by_place(p) for p in functions)
    start = jnp.zeros_like(places[-1][0])
    if blocks > 1:
        first, rest = tuple(p[0] for p in places), tuple(p[1:] for p in places)
        whole, _ = jax.lax.scan(lambda f, g: (then(f, g), None), first, rest)
        start = start.at[..., 1:].set(_scan(then, at, tuple(p[..., :-1] for p in whole)))

    def run(t: jax.Array, f: _Function) -> tuple[jax.Array, jax.Array]:
        t = at(f, t)
        return t, t

    _, results = jax.lax.scan(run, start, places)
    return jnp.moveaxis(results, 0, -1).reshape(*start.shape[:-1], -1)[..., :length]
