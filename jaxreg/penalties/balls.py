r"""Balls, the simplex and spheres: constraints on a norm of each group.

Each projection needs a number a group, found by passes over the array; under sharding along a
group's own axes that is one all-reduce a pass.
"""

import abc

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg import groups as _groups
from jaxreg.groups import Grouping, Groups
from jaxreg.penalties.base import number, penalty, static
from jaxreg.penalties.constraints import Constraint, unit_where_scalar
from jaxreg.penalties.secular import secular_root
from jaxreg.penalties.separable import soft_threshold
from jaxreg.penalties.waterline import waterline

Array = jax.Array
Number = float | Array


@penalty
class L1Ball(Constraint):
    r"""The L1 ball, $\|x_g\|_1 \le r$: sparse.

    Its prox is the soft threshold at $\nu \, step$, where $\nu \ge 0$ is the smallest level for
    which the result is in the ball. Source: J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra,
    *Efficient projections onto the l1-ball for learning in high dimensions*, ICML 2008.

    Args:
        radius: r, a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the whole array is one group.

    Raises:
        ValueError: where the radius is negative, infinite, NaN or no scalar, or the groups do not
            fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.L1Ball(2.0).prox(jnp.array([3.0, -2.0, 0.5])).tolist()
    [1.5, -0.5, 0.0]
    """

    convex, sparse, elementwise_step = True, True, True

    radius: Number
    groups: Groups = static(_groups.as_groups, default=_groups.whole, kw_only=True)

    def _contains(self, x: Array) -> Array:
        sums = self.groups.of(x.shape).sum(jnp.abs(x))
        return sums <= self.radius * (1 + self._rounding(x))

    def _project(self, x: Array, step: Array) -> Array:
        groups, size = self.groups.of(x.shape), jnp.abs(x)
        step = unit_where_scalar(step)
        # At level 0 the ball is not left by a step down: the level of a point inside is 0.
        level = waterline(size, step, self.radius, groups, jnp.zeros((), x.dtype))
        outside = groups.sum(size) > self.radius
        level = groups.spread(jnp.where(outside, level, 0))
        w = soft_threshold(x, jnp.broadcast_to(level * step, x.shape))
        return groups.scaled(w, jnp.minimum(1, _correction(self.radius, groups.sum(jnp.abs(w)))))


@penalty
class Simplex(Constraint):
    r"""The simplex, $x_i \ge 0$ and $\sum_{i \in g} x_i = total$: probabilities, for a total of 1.

    Its prox is $\max(x - \nu \, step, 0)$ with the level $\nu$ that gives the total. Source: C.
    Michelot, *A finite algorithm for finding the projection of a point onto the canonical simplex
    of R^n*, JOTA 50(1), 1986.

    Args:
        total: a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the whole array is one group.

    Raises:
        ValueError: where the total is negative, infinite, NaN or no scalar, or the groups do not
            fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.Simplex().prox(jnp.array([0.75, 0.75, -1.0])).tolist()
    [0.5, 0.5, 0.0]
    """

    convex, sparse, elementwise_step = True, True, True

    total: Number = number(_check.nonnegative, default=1.0)
    groups: Groups = static(_groups.as_groups, default=_groups.whole, kw_only=True)

    def _contains(self, x: Array) -> Array:
        excess = jnp.abs(self.groups.of(x.shape).sum(x) - self.total)
        return jnp.all(excess <= self._rounding(x) * self.total) & jnp.all(x >= 0)

    def _project(self, x: Array, step: Array) -> Array:
        groups, step = self.groups.of(x.shape), unit_where_scalar(step)
        width = groups.sum(jnp.broadcast_to(step, x.shape))
        start = (groups.sum(x) - self.total) / jnp.where(width > 0, width, 1)
        level = groups.spread(waterline(x, step, self.total, groups, start))
        w = jnp.maximum(x - level * step, 0)
        return groups.scaled(w, _correction(self.total, groups.sum(w)))


def _correction(total: Number, sums: Array) -> Array:
    """What a sum that should be the total is off by: where |x| is much larger, it was rounded."""
    factor = jnp.where(sums > 0, total / jnp.where(sums > 0, sums, 1), 1)
    return jax.lax.stop_gradient(factor)  # constantly 1, but for rounding


class _NormBall(Constraint):
    r"""$\|x_g\|_2 \le r$."""

    convex, elementwise_step = True, True

    @abc.abstractmethod
    def _ball(self, x: Array) -> tuple[Grouping, Array]:
        """The groups of x and the radius."""

    def _contains(self, x: Array) -> Array:
        groups, radius = self._ball(x)
        return groups.norm(x) <= radius * (1 + self._rounding(x))

    def _project(self, x: Array, step: Array) -> Array:
        groups, radius = self._ball(x)
        norm = groups.norm(x)
        outside = norm > radius
        if step.ndim == 0:
            scale = jnp.where(outside, radius / jnp.where(outside, norm, 1), 1)
            return groups.scaled(x, scale)
        # x / (1 + mu step), where mu makes the norm r. A group inside gets an equation that has a
        # root, and its result is not used.
        solvable = outside & (radius > 0)
        one = jnp.ones((), x.dtype)
        z = jnp.where(groups.spread(solvable), x, jnp.ones_like(x))
        mu = secular_root(z, one, step, jnp.where(radius > 0, radius, one), groups)
        shrunk = x / (1 + groups.spread(jnp.where(solvable, mu, 0)) * step)
        return jnp.where(groups.spread(outside & (radius == 0)), 0, shrunk)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        groups, radius = self._ball(x)
        norm = groups.norm(x)
        _, outward = groups.direction(x)
        # On the sphere -grad may point outward; the part of it that does costs nothing.
        push = jnp.maximum(-groups.sum(grad * outward), 0)
        on_sphere = norm >= radius * (1 - self._rounding(x))
        rest = jnp.abs(grad + groups.spread(jnp.where(on_sphere, push, 0)) * outward)
        rest = jnp.where(radius == 0, 0, rest)
        return jnp.where(groups.spread(norm) > radius * (1 + self._rounding(x)), jnp.inf, rest)


@penalty
class L2Ball(_NormBall):
    r"""The L2 ball, $\|x\|_2 \le r$ for the whole array.

    Its prox is $x \min(1, r / \|x\|)$; for a step a coordinate, $x_i / (1 + \mu \, step_i)$ with
    the $\mu \ge 0$ that brings the norm to r. Source: N. Parikh and S. Boyd, *Proximal
    Algorithms*, 2014, section 6.2.

    Args:
        radius: r, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the radius is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.L2Ball(2.5).prox(jnp.array([3.0, 4.0])).tolist()
    [1.5, 2.0]
    """

    radius: Number

    def _ball(self, x: Array) -> tuple[Grouping, Array]:
        return _groups.whole.of(x.shape), jnp.asarray(self.radius)


@penalty
class MaxNorm(_NormBall):
    r"""The max-norm constraint, $\|x_g\|_2 \le r$ for the incoming weights of each unit.

    Its prox is that of `L2Ball` for each group. Source: N. Srivastava, G. Hinton, A. Krizhevsky,
    I. Sutskever and R. Salakhutdinov, *Dropout*, JMLR 15, 2014, section 5.1.

    Args:
        radius: r, a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the incoming weights of each unit of a kernel.

    Raises:
        ValueError: where the radius is negative, infinite, NaN or no scalar, or the groups do not
            fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[3.0, 0.5], [4.0, 0.5]])
    >>> jaxreg.MaxNorm(2.5).prox(kernel).tolist()
    [[1.5, 0.5], [2.0, 0.5]]
    """

    radius: Number
    groups: Groups = static(_groups.as_groups, default=_groups.units, kw_only=True)

    def _ball(self, x: Array) -> tuple[Grouping, Array]:
        return self.groups.of(x.shape), jnp.asarray(self.radius)


@penalty
class UnitNorm(Constraint):
    r"""The unit sphere, $\|x_g\|_2 = 1$ for the incoming weights of each unit; not convex.

    Its prox is $x_g / \|x_g\|$. At a group of zeros, where every unit vector is nearest, it is the
    one with equal coordinates.

    Args:
        groups: from `jaxreg.groups`; by default the incoming weights of each unit of a kernel.

    Raises:
        ValueError: where the groups do not fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> print(jaxreg.UnitNorm().prox(jnp.array([[3.0, 0.0], [4.0, 2.0]])).round(3))
    [[0.6 0. ]
     [0.8 1. ]]
    """

    convex = False

    groups: Groups = static(_groups.as_groups, default=_groups.units, kw_only=True)

    def _contains(self, x: Array) -> Array:
        return jnp.abs(self.groups.of(x.shape).norm(x) - 1) <= self._rounding(x)

    def _project(self, x: Array, step: Array) -> Array:
        groups = self.groups.of(x.shape)
        norm, unit = groups.direction(x)
        equal = 1 / jnp.sqrt(jnp.asarray(groups.sizes, x.dtype))
        return jnp.where(groups.spread(norm) > 0, unit, groups.spread(equal))
