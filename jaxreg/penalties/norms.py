r"""Norms of groups that act between the coordinates of a group: its largest one, or its sum.

Their prox is found by `waterline`: passes that add up a number a group, which under sharding is
one all-reduce each.
"""

import jax
import jax.numpy as jnp

from jaxreg import groups as _groups
from jaxreg.groups import Groups
from jaxreg.penalties.base import Penalty, penalty, static
from jaxreg.penalties.constraints import positive_step, rounding
from jaxreg.penalties.separable import (
    infinite_unless_zero,
    ratio,
    slope_distance,
    soft_threshold,
)
from jaxreg.penalties.waterline import waterline

Array = jax.Array
Number = float | Array


@penalty
class LInf(Penalty):
    r"""The maximum norm, $R(x) = s \sum_g \max_{i \in g} |x_i|$: the largest weights are cut.

    Its prox is $\mathrm{clip}(x, -\theta, \theta)$, where the amounts cut, each divided by its
    step, add up to s: $\sum_i \max(|x_i| - \theta, 0) / step_i = s$; or 0 where they are less
    without any level. Source: J. Duchi and Y. Singer, *Efficient online and batch learning using
    forward backward splitting*, JMLR 10, 2009.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the whole array is one group.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar, or the groups do
            not fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.LInf(1.0).prox(jnp.array([3.0, -2.5, 1.0])).tolist()
    [2.25, -2.25, 1.0]
    """

    convex, sparse, elementwise_step = True, True, True

    strength: Number
    groups: Groups = static(_groups.as_groups, default=_groups.whole, kw_only=True)

    def _value(self, x: Array) -> Array:
        return self.strength * jnp.sum(self.groups.of(x.shape).max(jnp.abs(x)))

    def _prox(self, x: Array, step: Array) -> Array:
        groups, size = self.groups.of(x.shape), jnp.abs(x)
        pull = self.strength * positive_step(step)
        # In units of the pull, for which 1 is the sum; no coordinate alone is cut by more.
        safe = jnp.where(pull > 0, pull, 1)
        start = jax.lax.stop_gradient(groups.max(jnp.maximum(size - safe, 0)))
        one = jnp.ones((), x.dtype)
        if step.ndim == 0:
            level = waterline(size, one, safe, groups, start)
        else:
            level = waterline(size / safe, 1 / safe, one, groups, start)
        level = jnp.maximum(level, 0)
        limited = jnp.sign(x) * jnp.minimum(size, groups.spread(level))
        return jnp.where((step == 0) | (self.strength == 0), x, limited)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        groups, size = self.groups.of(x.shape), jnp.abs(x)
        peak = groups.spread(groups.max(size))
        # At 0 the subgradients are the L1 ball of radius s; elsewhere the mixtures, weighing s in
        # all, of the signs at the largest coordinates. A projection on either is a waterline.
        zero, top = peak == 0, size >= peak * (1 - rounding(x))
        outward = jnp.where(zero, jnp.abs(grad), -grad * jnp.sign(x))
        count = groups.sum(top.astype(x.dtype))
        total = groups.sum(jnp.where(top, outward, 0))
        start = (total - self.strength) / jnp.where(count > 0, count, 1)
        height, one = jnp.where(top, outward, -jnp.inf), jnp.ones((), x.dtype)
        level = groups.spread(waterline(height, one, self.strength, groups, start))
        inside = zero & (groups.spread(total) <= self.strength)
        level = jnp.where(inside, 0, level)
        return jnp.where(top, jnp.abs(jnp.minimum(outward, level)), jnp.abs(grad))

    def _critical_multiplier(self, grad: Array) -> Array:
        sums = self.groups.of(grad.shape).sum(jnp.abs(grad))
        return jnp.max(ratio(sums, self.strength), initial=0)


@penalty
class ExclusiveLasso(Penalty):
    r"""The exclusive lasso, $R(x) = \frac{s}{2} \sum_g \|x_g\|_1^2$: few coordinates in each group.

    The coordinates of a group compete: each prox leaves at least one of a nonzero group. Its prox
    is the soft threshold at $step \cdot s \, u_g$, with $u_g = \|w_g\|_1$ the root of $u = \sum_i
    \max(|x_i| - step_i s u, 0)$. Source: Y. Zhou, R. Jin and S. Hoi, *Exclusive lasso for
    multi-task feature selection*, AISTATS 2010.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the incoming weights of each unit of a kernel.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar, or the groups do
            not fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[4.0, 1.0], [1.0, 1.0]])
    >>> print(jaxreg.ExclusiveLasso(1.0).prox(kernel).round(3))
    [[2.    0.333]
     [0.    0.333]]
    """

    convex, sparse, elementwise_step = True, True, True

    strength: Number
    groups: Groups = static(_groups.as_groups, default=_groups.units, kw_only=True)

    def _value(self, x: Array) -> Array:
        sums = self.groups.of(x.shape).sum(jnp.abs(x))
        return self.strength / 2 * jnp.sum(jnp.square(sums))

    def _prox(self, x: Array, step: Array) -> Array:
        groups, pull, zero = self.groups.of(x.shape), step * self.strength, jnp.zeros((), x.dtype)
        sums = waterline(jnp.abs(x), pull, zero, groups, zero, slope=1.0)
        return soft_threshold(x, jnp.broadcast_to(pull * groups.spread(sums), x.shape))

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        groups = self.groups.of(x.shape)
        pull = self.strength * groups.spread(groups.sum(jnp.abs(x)))
        return slope_distance(x, grad, pull)

    def _critical_multiplier(self, grad: Array) -> Array:
        self.groups.of(grad.shape)
        return infinite_unless_zero(grad)
