r"""The latent overlapping group lasso: the support is a union of groups, which may overlap.

Both its value and its proximal operator come from one convex problem with a multiplier a group,

$$\min_{\mu \ge 0} \; \tfrac12 \sum_i \frac{x_i^2}{\tau_i + M_i} + \tfrac12 \sum_g \mu_g w_g^2,
\qquad M_i = \sum_{g \ni i} \mu_g ,$$

the dual of projecting on the intersection of the balls $\|u_g\| \le w_g$, with $u_i = x_i / (\tau_i
+ M_i)$ at the solution. With $\tau = step \cdot s$ the prox is $x_i M_i / (\tau_i + M_i)$; with
$\tau = 0$ the minimum is the norm itself. A primal-dual interior-point method (S. Boyd and L.
Vandenberghe, *Convex Optimization*, 2004, section 11.7) in u and $\mu$ comes near the solution from
any start; Newton steps on the groups that are active there make it exact, and the last of them
carries the derivative (the implicit function theorem).
For a scalar step, coordinates in the same groups count as one in all of this.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.scipy.linalg import cho_factor, cho_solve

from jaxreg import _check
from jaxreg.penalties.base import Penalty, number, penalty, static
from jaxreg.penalties.separable import ratio

Array = jax.Array
Number = float | Array

MAX_ITERATIONS = 60  # about 10 are needed


class _Cover:
    """Groups that may overlap; a pattern is a set of coordinates that lie in the same groups."""

    def __init__(self, groups: list[np.ndarray]):
        self.groups = groups
        self.size = 1 + max((int(group[-1]) for group in groups), default=-1)
        self.weights = np.sqrt([float(group.size) for group in groups])
        self._key = tuple(group.tobytes() for group in groups)

    @functools.cached_property
    def pattern(self) -> np.ndarray:
        """The pattern of each coordinate, found by splitting patterns at one group at a time."""
        pattern, fresh = np.zeros(self.size, np.int64), 1
        for group in self.groups:
            split, part = np.unique(pattern[group], return_inverse=True)
            pattern[group] = fresh + part
            fresh += split.size
        return np.unique(pattern, return_inverse=True)[1].astype(np.int32)

    @functools.cached_property
    def members(self) -> list[np.ndarray]:
        """The groups of each pattern."""
        found: list[list[int]] = [[] for _ in range(self.pattern.max(initial=-1) + 1)]
        for position, group in enumerate(self.groups):
            for pattern in np.unique(self.pattern[group]):
                found[pattern].append(position)
        return [np.array(groups, np.int32) for groups in found]

    @functools.cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (pattern, group) such that the pattern lies in the group."""
        return _table(self.members)

    @functools.cached_property
    def meetings(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (pattern, cell of a G by G matrix) such that it lies in the groups of both axes."""
        return _table([np.add.outer(len(self.groups) * g, g).ravel() for g in self.members])

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Cover) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        text = str([group.tolist() for group in self.groups])
        counts = f"<{len(self.groups)} groups of {self.size} coordinates>"
        return text if len(text) <= 80 else counts

    def pool(self, x: Array) -> Array:
        """The sum of x over each pattern."""
        return jax.ops.segment_sum(x, self.pattern, len(self.members))


def _table(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The entries of all rows, each with the number of its row."""
    numbers = np.repeat(np.arange(len(rows)), [row.size for row in rows])
    return numbers, np.concatenate([np.zeros(0, np.int32), *rows])


def _as_cover(name: str, value: Any) -> _Cover:
    """The check of a field that holds groups."""
    if isinstance(value, _Cover):
        return value
    accepted = "a sequence of groups, each a sequence of different integers >= 0"
    if not hasattr(value, "__len__") or isinstance(value, (str, bytes, dict, Tracer)):
        raise _check.ArgumentError(name, _check.describe(value), accepted)
    groups = []
    for group in value:
        try:
            indices = np.asarray([] if isinstance(group, Tracer) else group)
        except ValueError:  # sequences of unequal lengths
            indices = np.zeros(1, object)
        fault = ""
        if not isinstance(group, Tracer) and indices.size == 0:
            fault = "an empty group"
        elif indices.ndim != 1 or indices.dtype.kind not in "iu" or np.isscalar(group):
            fault = "no indices"
        elif indices.min() < 0:
            fault = "a negative index"
        elif np.unique(indices).size < indices.size:
            fault = "an index twice"
        if fault:
            raise _check.ArgumentError(name, f"{fault}: {_check.describe(group)}", accepted)
        groups.append(np.sort(indices).astype(np.int64))
    cover = _Cover(groups)
    if missing := set(range(cover.size)).difference(*groups):
        given = f"groups up to index {cover.size - 1} without {min(missing)}"
        raise _check.ArgumentError(name, given, "groups that cover every coordinate")
    return cover


def _positive(name: str, value: Any) -> Any:
    """None, or weights that are all > 0: a group of weight 0 would make its coordinates free."""
    weights = _check.weights(name, value)
    if weights is not None and _check.is_concrete(weights) and not np.all(np.asarray(weights) > 0):
        raise _check.ArgumentError(name, "a weight of 0", "finite numbers > 0")
    return weights


class _Problem(NamedTuple):
    """The problem over mu; a cell is a pattern, or for a step a coordinate, a coordinate."""

    cover: _Cover
    squares: Array  # x^2 summed over each cell, of shape (cells,)
    tau: Array  # a scalar, or one number a cell
    weights: Array  # one number a group

    def frozen(self) -> "_Problem":
        return _Problem(self.cover, *map(lax.stop_gradient, self[1:]))

    def reach(self, mu: Array) -> Array:
        """M: for each cell the sum of mu over its groups."""
        pattern, group = self.cover.pairs
        sums = jax.ops.segment_sum(mu[group], pattern, len(self.cover.members))
        return sums[self.cover.pattern] if self.tau.ndim else sums

    def total(self, cells: Array) -> Array:
        """For each group the sum over its cells."""
        pattern, group = self.cover.pairs
        return jax.ops.segment_sum(self._pool(cells)[pattern], group, self.weights.size)

    def gram(self, cells: Array) -> Array:
        """For each two groups the sum over the cells in both, of shape (G, G)."""
        (pattern, pair), count = self.cover.meetings, self.weights.size
        sums = jax.ops.segment_sum(self._pool(cells)[pattern], pair, count * count)
        return sums.reshape(count, count)

    def _pool(self, cells: Array) -> Array:
        return self.cover.pool(cells) if self.tau.ndim else cells

    def denominator(self, mu: Array) -> Array:
        """The sum tau + M, and 1 where x is 0, as 0 / 0 is 0 there."""
        return jnp.where(self.squares > 0, self.tau + self.reach(mu), 1)


def _multipliers(problem: _Problem) -> Array:
    """The solution mu, with derivatives; exactly 0 for a group that is not active.

    Newton steps go ahead of the interior points: each from the last one where that was the best so
    far, else from the interior point.
    """
    fixed = problem.frozen()
    tolerance = 16 * float(jnp.finfo(problem.squares.dtype).eps)

    def iterate(state: tuple[Any, ...]) -> tuple[Any, ...]:
        point, start, best, error, count = state
        point = _interior_step(fixed, point)
        mu = _newton_step(fixed, start)
        found = _violation(fixed, mu)
        better = found < error
        start, best = jnp.where(better, mu, point.mu), jnp.where(better, mu, best)
        return point, start, best, jnp.where(better, found, error), count + 1

    point = _interior_start(fixed)
    state = (point, point.mu, point.mu, jnp.full((), jnp.inf, point.mu.dtype), 0)
    state = lax.while_loop(lambda s: (s[3] > tolerance) & (s[4] < MAX_ITERATIONS), iterate, state)
    point, _, best, error, _ = state
    # Where the active groups were not found, the interior point is the better answer.
    best = jnp.where(error < tolerance**0.5, best, point.mu)
    last = _newton_step(problem, best)
    mu = lax.stop_gradient(last)
    return jnp.where(_violation(fixed, mu) < error, mu, best) + (last - mu)


def _violation(problem: _Problem, mu: Array) -> Array:
    """How far ||u_g|| is from w_g, relatively: either way if mu_g > 0, only above if it is 0."""
    d = problem.denominator(mu)
    excess = jnp.sqrt(problem.total(problem.squares / d / d)) / problem.weights - 1
    return jnp.max(jnp.where(mu > 0, jnp.abs(excess), excess), initial=0)


def _newton_step(problem: _Problem, mu: Array) -> Array:
    """Solves ||u_g|| = w_g for the groups that are active near mu, to first order.

    A group is active where its own Newton step on the nearly linear 1 / ||u_g|| = 1 / w_g stays
    above 0. The derivative is that of the right-hand side, the whole where that is 0.
    """
    fixed = problem.frozen()
    d = fixed.denominator(mu)
    squares = fixed.squares / d / d
    norm = jnp.sqrt(fixed.total(squares))
    excess = jnp.square(norm) * (norm / fixed.weights - 1)
    active = mu * fixed.total(squares / d) + excess > 0
    # Without its last group a coordinate of step 0 would be free: such groups stay.
    bare = fixed.denominator(jnp.where(active, mu, 0)) <= 0
    active = active | (fixed.total(bare.astype(mu.dtype)) > 0)
    mu = lax.stop_gradient(jnp.where(active, mu, 0))
    d = fixed.denominator(mu)
    hessian = fixed.gram(fixed.squares / d / d / d)
    d = problem.denominator(mu)
    excess = problem.total(problem.squares / d / d) - jnp.square(problem.weights)
    return jnp.where(active, jnp.maximum(mu + _solve(hessian, active, excess / 2), 0), 0)


def _solve(hessian: Array, active: Array, rhs: Array) -> Array:
    """A solution of the system of the active groups, 0 elsewhere.

    The system is singular where groups repeat one another; a ridge, refined away where it is not,
    chooses among the solutions, which all have the same M.
    """
    diagonal = jnp.diagonal(hessian)
    scale = jnp.where(active & (diagonal > 0), 1 / jnp.sqrt(jnp.where(active, diagonal, 1)), 0)
    matrix = hessian * scale[:, None] * scale[None, :]
    ridge = float(jnp.finfo(hessian.dtype).eps) ** (2 / 3)
    factor = cho_factor(matrix + jnp.diag(jnp.where(scale > 0, ridge, jnp.ones_like(scale))), True)
    rhs = jnp.where(active, scale * rhs, 0)
    solution = cho_solve(factor, rhs)
    for _ in range(2):
        product = jnp.matmul(matrix, solution, precision="highest")
        solution += cho_solve(factor, rhs - product)
    return scale * solution


class _Point(NamedTuple):
    """Inside the bounds mu, z > 0; z is the slack w^2 - ||u||^2 of each group."""

    u: Array  # one number a cell
    mu: Array  # one number a group
    z: Array


def _interior_start(problem: _Problem) -> _Point:
    """Here every ||u_g|| <= w_g."""
    size, bound = jnp.sqrt(problem.squares), jnp.square(problem.weights)
    mu = _unit(problem) / bound
    u = size / (problem.tau + problem.reach(mu))
    return _Point(u, mu, jnp.maximum(bound - problem.total(jnp.square(u)), bound / 10))


def _unit(problem: _Problem) -> Array:
    """The size of mu z for each group."""
    norm = jnp.sqrt(problem.total(problem.squares))
    return jnp.where(norm > 0, norm, 1) * problem.weights


def _interior_step(problem: _Problem, point: _Point) -> _Point:
    """A Newton step on (tau + M) u = |x|, ||u_g||^2 + z_g = w_g^2 and mu_g z_g = t unit_g.

    How small t may be is seen from the step that aims at 0 (Mehrotra).
    """
    u, mu, z = point
    unit = _unit(problem)
    d = problem.tau + problem.reach(mu)
    u_error = jnp.sqrt(problem.squares) - d * u
    z_error = jnp.square(problem.weights) - problem.total(jnp.square(u)) - z
    matrix = 2 * problem.gram(jnp.square(u) / d) + jnp.diag(z / mu)
    scale = 1 / jnp.sqrt(jnp.diagonal(matrix))
    ridge = 8 * jnp.finfo(mu.dtype).eps * jnp.eye(mu.size, dtype=mu.dtype)
    factor = cho_factor(matrix * scale[:, None] * scale[None, :] + ridge, True)

    def toward(t: Array) -> tuple[_Point, Array]:
        rhs = t * unit / mu - z - z_error + 2 * problem.total(u * u_error / d)
        to_mu = scale * cho_solve(factor, scale * rhs)
        to_u = (u_error - u * problem.reach(to_mu)) / d
        to_z = z_error - 2 * problem.total(u * to_u)
        return _Point(to_u, to_mu, to_z), jnp.minimum(_room(mu, to_mu), _room(z, to_z))

    gap = jnp.mean(mu * z / unit)
    move, room = toward(jnp.zeros_like(gap))
    step = jnp.minimum(room, 1)
    reached = jnp.mean((mu + step * move.mu) * (z + step * move.z) / unit)
    move, room = toward(jnp.clip((reached / gap) ** 3, 0.01, 1) * gap)
    step = jnp.minimum(0.99 * room, 1)
    moved = jax.tree.map(lambda at, to: at + step * to, point, move)
    finite = jnp.all(jnp.isfinite(moved.mu + moved.z))
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, point)


def _room(x: Array, move: Array) -> Array:
    """The longest step along `move` that keeps x >= 0."""
    back = move < 0
    return jnp.min(jnp.where(back, -x / jnp.where(back, move, 1), jnp.inf), initial=jnp.inf)


@penalty
class OverlappingGroupLasso(Penalty):
    r"""The latent overlapping group lasso: the nonzeros are a union of groups.

    $$R(x) = s \min \Big\{ \sum_g w_g \|v^g\|_2 : \sum_g v^g = x, \; v^g = 0 \text{ outside } g
    \Big\} = s \max \{ \langle u, x \rangle : \|u_g\|_2 \le w_g \text{ for all } g \}.$$

    For disjoint groups it is the group lasso. (The sum of the norms $\|x_g\|$ themselves is another
    penalty: its zeros, not its nonzeros, are a union of groups.) Value and prox are found to
    rounding by an iteration of bounded length; for G groups it takes G^3 time and G^2 memory, and
    has derivatives of first order.
    Where entries of x differ by many orders of magnitude, and rarely elsewhere in float32, it ends
    at a nearby point, whose zeros are not exact. Under sharding, one reduction adds up a number for
    each set of coordinates in the same groups; for a step a coordinate each iteration has more.
    Source: L. Jacob, G. Obozinski and J.-P. Vert, *Group lasso with overlap and graph lasso*,
    ICML 2009.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        groups: a sequence of groups, each a sequence of different indices into x in C order. They
            are of any sizes, may overlap, and cover all of x.
        weights: w, one number > 0 for each group in the order of the groups, or one for all; by
            default the square root of the group's size.

    Raises:
        ValueError: where the strength is negative, infinite or NaN, the weights do not fit, a group
            is empty, repeats an index or holds what is none, or the groups do not cover x.

    >>> import jax.numpy as jnp
    >>> from jaxreg.penalties.overlapping import OverlappingGroupLasso
    >>> chain = OverlappingGroupLasso(1.0, groups=[[0, 1], [1, 2], [2, 3]], weights=1.0)
    >>> w = chain.prox(jnp.array([3.0, 4.0, 0.0, 0.5]))
    >>> [f"{number:.2f}" for number in w.tolist()]
    ['2.40', '3.20', '0.00', '0.00']
    """

    convex, sparse, elementwise_step = True, True, True

    strength: Number
    groups: Any = static(_as_cover)
    weights: Array | None = number(_positive, default=None)

    def _value(self, x: Array) -> Array:
        scale = _scale(x)
        problem = self._problem(x / scale, jnp.zeros((), x.dtype))
        mu = _multipliers(problem)
        fit = jnp.sum(problem.squares / _positive_or_one(problem.denominator(mu)))
        return self.strength * scale * (fit + jnp.sum(mu * jnp.square(problem.weights))) / 2

    def _prox(self, x: Array, step: Array) -> Array:
        scale = _scale(x)
        largest = float(jnp.finfo(x.dtype).max) ** 0.25
        tau = jnp.minimum(self.strength * step / scale, largest)
        problem = self._problem(x / scale, tau)
        reach = problem.reach(_multipliers(problem))
        d = problem.tau + reach
        kept = jnp.where(d > 0, reach / _positive_or_one(d), 1)
        return x * (kept if step.ndim else kept[self.groups.pattern]).reshape(x.shape)

    def _critical_multiplier(self, grad: Array) -> Array:
        problem = self._problem(grad, jnp.zeros((), grad.dtype))
        squares = problem.total(problem.squares)
        norm = jnp.where(squares > 0, jnp.sqrt(_positive_or_one(squares)), 0)
        return jnp.max(ratio(norm, self.strength * problem.weights), initial=0)

    def _problem(self, x: Array, tau: Array) -> _Problem:
        cover: _Cover = self.groups
        if cover.size != x.size:
            given = f"groups of the coordinates 0 to {cover.size - 1}"
            accepted = f"groups that cover the {x.size} coordinates of an x of shape {x.shape}"
            raise _check.ArgumentError("groups", given, accepted)
        count = (len(cover.groups),)
        weights = jnp.asarray(cover.weights if self.weights is None else self.weights, x.dtype)
        if weights.shape not in ((), count):
            accepted = f"a scalar, or an array of shape {count}: one number a group"
            raise _check.ArgumentError("weights", _check.describe(weights), accepted)
        weights, squares = jnp.broadcast_to(weights, count), jnp.square(x).ravel()
        if tau.ndim == 0:
            return _Problem(cover, cover.pool(squares), tau, weights)
        return _Problem(cover, squares, tau.ravel(), weights)


def _scale(x: Array) -> Array:
    """The largest entry: R and its prox are homogeneous, so that any constant is right."""
    return _positive_or_one(lax.stop_gradient(jnp.max(jnp.abs(x), initial=0)))


def _positive_or_one(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
