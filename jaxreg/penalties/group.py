r"""Group penalties: each group of coordinates is zero as a whole or not at all.

They are sums over disjoint groups of a function of the group's Euclidean norm. How the groups are
chosen is in `jaxreg.groups`. A group of n coordinates has the weight $\sqrt{n}$ unless weights are
given, so that groups of all sizes vanish at comparable gradients.

A group's norm is over the whole group, so under sharding along a group's own axes one all-reduce
adds up a number a group; for an elementwise step each of some four to eight iterations has one.
Groups by `ids` or `blocks` that do not lie along the shards are gathered.
"""

import abc

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg import groups as _groups
from jaxreg.groups import Grouping, Groups
from jaxreg.penalties.base import Penalty, number, penalty, static
from jaxreg.penalties.nonconvex import Concave, mcp, scad
from jaxreg.penalties.secular import secular_root
from jaxreg.penalties.separable import ratio, soft_threshold

Array = jax.Array
Number = float | Array


@penalty
class _OfGroups(Penalty):
    """A penalty of disjoint groups that have weights."""

    groups: Groups = static(_groups.as_groups, default=_groups.units, kw_only=True)
    weights: Number | None = number(_check.weights, default=None, kw_only=True)

    def _weighted(self, strength: Number, x: Array) -> tuple[Grouping, Array]:
        """The groups of x, and the strength of each: the one given times its weight."""
        groups = self.groups.of(x.shape)
        if self.weights is None:
            return groups, strength * jnp.sqrt(jnp.asarray(groups.sizes, x.dtype))
        weights = groups.figures("weights", jnp.asarray(self.weights))
        return groups, strength * jnp.broadcast_to(weights, groups.sizes.shape)


class _SumOfNorms(Penalty):
    r"""$R(x) = \sum_g a_g \|x_g\|_2$."""

    convex, sparse, elementwise_step = True, True, True

    @abc.abstractmethod
    def _strengths(self, x: Array) -> tuple[Grouping, Array]:
        """The groups of x, and the strength a of each."""

    def _value(self, x: Array) -> Array:
        groups, a = self._strengths(x)
        return jnp.sum(a * groups.norm(x))

    def _prox(self, x: Array, step: Array) -> Array:
        groups, a = self._strengths(x)
        return group_soft_threshold(x, step, groups, a)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        groups, a = self._strengths(x)
        return radial_distance(x, grad, groups, a)

    def _critical_multiplier(self, grad: Array) -> Array:
        groups, a = self._strengths(grad)
        return jnp.max(ratio(groups.norm(grad), a), initial=0)


@penalty
class GroupLasso(_OfGroups, _SumOfNorms):
    r"""The group lasso, $R(x) = s \sum_g w_g \|x_g\|_2$: whole groups become exactly zero.

    For a scalar step its prox is $x_g \max(1 - step \cdot s w_g / \|x_g\|, 0)$. For a step a
    coordinate, $x_i \theta / (\theta + step_i s w_g)$ with $\theta = \|w_g\|$ the root of $\sum_i
    x_i^2 / (\theta + step_i s w_g)^2 = 1$, and 0 where $\|x_g / step\| \le s w_g$. Source: M. Yuan
    and Y. Lin, *Model selection and estimation in regression with grouped variables*, JRSS B
    68(1), 2006.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        groups: from `jaxreg.groups`; by default the incoming weights of each unit of a kernel.
        weights: w, one number >= 0 for each group in the order of the groups, or one for all; by
            default the square root of the group's size.

    Raises:
        ValueError: where the strength or a weight is negative, infinite or NaN, or the groups or
            weights do not fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> jaxreg.GroupLasso(1.0, weights=2.5).prox(kernel).tolist()
    [[1.5, 0.0], [2.0, 0.0]]
    """

    strength: Number

    def _strengths(self, x: Array) -> tuple[Grouping, Array]:
        return self._weighted(self.strength, x)


@penalty
class L2Norm(_SumOfNorms):
    r"""The L2 norm of the whole array, not squared: $R(x) = s \|x\|_2$.

    The array becomes exactly zero as a whole, or is scaled by $1 - step \cdot s / \|x\|$. Source:
    N. Parikh and S. Boyd, *Proximal Algorithms*, 2014, section 6.5.1.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.L2Norm(2.5).prox(jnp.array([3.0, 4.0])).tolist()
    [1.5, 2.0]
    """

    strength: Number

    def _strengths(self, x: Array) -> tuple[Grouping, Array]:
        return _groups.whole.of(x.shape), jnp.broadcast_to(self.strength, (1,) * x.ndim)


@penalty
class SparseGroupLasso(_OfGroups):
    r"""The sparse group lasso, $R(x) = l_1 \|x\|_1 + s \sum_g w_g \|x_g\|_2$.

    Whole groups become zero, and single coordinates within the others. Its prox is the soft
    threshold at $step \cdot l_1$, then the prox of the group lasso. Source: N. Simon, J. Friedman,
    T. Hastie and R. Tibshirani, *A sparse-group lasso*, JCGS 22(2), 2013.

    Args:
        l1: strength of the L1 part, a number >= 0, or a traced scalar.
        group: s, strength of the group part, likewise.
        groups: as in `GroupLasso`.
        weights: as in `GroupLasso`.

    Raises:
        ValueError: where a number is negative, infinite or NaN, or the groups or weights do not
            fit x's shape.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[4.0, 0.1], [5.0, 2.0], [0.5, 0.0]])
    >>> jaxreg.SparseGroupLasso(1.0, 2.5, weights=1.0).prox(kernel).tolist()
    [[1.5, 0.0], [2.0, 0.0], [0.0, 0.0]]
    """

    convex, sparse, elementwise_step, scales = True, True, True, ("l1", "group")

    l1: Number
    group: Number

    def _value(self, x: Array) -> Array:
        groups, a = self._weighted(self.group, x)
        return self.l1 * jnp.sum(jnp.abs(x)) + jnp.sum(a * groups.norm(x))

    def _prox(self, x: Array, step: Array) -> Array:
        groups, a = self._weighted(self.group, x)
        return group_soft_threshold(soft_threshold(x, step * self.l1), step, groups, a)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        groups, a = self._weighted(self.group, x)
        zero = groups.spread(groups.norm(x)) == 0
        # In a zero group the distance is that of the soft threshold to the ball of radius a; in
        # the others the L1 part is settled coordinate by coordinate.
        rest = soft_threshold(grad, jnp.broadcast_to(self.l1, x.shape))
        signed = jnp.where(x == 0, rest, grad + self.l1 * jnp.sign(x))
        return radial_distance(x, jnp.where(zero, rest, signed), groups, a)

    def _critical_multiplier(self, grad: Array) -> Array:
        r"""The largest root over the groups of $\|soft(g, c l_1)\| = c a$, by Newton's method.

        $\|soft(g, c l_1)\| - c a$ is convex and falls with c: from 0 it is never overshot.
        """
        groups, a = self._weighted(self.group, grad)

        def newton(c: Array, grad: Array, l1: Array, a: Array) -> Array:
            rest = jnp.maximum(jnp.abs(grad) - l1 * groups.spread(c), 0)
            norm = groups.norm(rest)
            fall = a + l1 * groups.sum(rest) / jnp.where(norm > 0, norm, 1)
            rise = (norm - c * a) / jnp.where(fall > 0, fall, 1)
            return jnp.where(fall > 0, c + rise, jnp.where(norm > 0, jnp.inf, c))

        given = grad, jnp.asarray(self.l1), a
        fixed = jax.lax.stop_gradient(given)

        def rises(state: tuple[Array, Array, Array]) -> Array:
            count, before, c = state
            return (count < 100) & jnp.any(c > before)

        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            count, _, c = state
            return count + 1, c, newton(c, *fixed)

        zero = jnp.zeros_like(fixed[2])
        start = (jnp.zeros((), jnp.int32), zero, newton(zero, *fixed))
        _, before, _ = jax.lax.while_loop(rises, step, start)
        # The last step again, which carries the derivative.
        return jnp.max(newton(before, *given), initial=0)


@penalty
class _ConcaveOfNorms(_OfGroups):
    r"""$R(x) = \sum_g r_{s w_g}(\|x_g\|_2)$ for a concave r."""

    convex, sparse, scales = False, True, None

    strength: Number

    @abc.abstractmethod
    def _radial(self) -> tuple[Concave, Number]:
        """The function r and its shape parameter."""

    def _value(self, x: Array) -> Array:
        (r, shape), (groups, a) = self._radial(), self._weighted(self.strength, x)
        return jnp.sum(r.value(groups.norm(x), a, shape))

    def _prox(self, x: Array, step: Array) -> Array:
        (r, shape), (groups, a) = self._radial(), self._weighted(self.strength, x)
        norm = groups.norm(x)
        factor = r.prox(norm, step, a, shape) / jnp.where(norm > 0, norm, 1)
        return groups.scaled(x, jnp.where(norm > 0, factor, 0))

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        (r, shape), (groups, a) = self._radial(), self._weighted(self.strength, x)
        return radial_distance(x, grad, groups, r.slope(groups.norm(x), a, shape))


@penalty
class GroupMCP(_ConcaveOfNorms):
    r"""The minimax concave penalty of the groups' norms, $R(x) = \sum_g r_{s w_g}(\|x_g\|_2)$.

    r is that of `MCP`. Its prox scales each group so that its norm becomes the prox of MCP at it.
    Source: J. Huang, P. Breheny and S. Ma, *A selective review of group selection in
    high-dimensional models*, Statistical Science 27(4), 2012.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        gamma: how slowly the slope falls off, a number > 0, or a traced scalar.
        groups: as in `GroupLasso`.
        weights: as in `GroupLasso`.

    Raises:
        ValueError: where a number is out of its range, or the groups or weights do not fit x.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> jaxreg.GroupMCP(1.0, gamma=2.0, weights=1.0).prox(kernel).tolist()
    [[3.0, 0.0], [4.0, 0.0]]
    """

    gamma: Number = number(_check.positive_finite, default=3.0)

    def _radial(self) -> tuple[Concave, Number]:
        return mcp, self.gamma


@penalty
class GroupSCAD(_ConcaveOfNorms):
    r"""The SCAD penalty of the groups' norms, $R(x) = \sum_g r_{s w_g}(\|x_g\|_2)$.

    r is that of `SCAD`. Its prox scales each group so that its norm becomes the prox of SCAD at
    it. Source: L. Wang, G. Chen and H. Li, *Group SCAD regression analysis for microarray time
    course gene expression data*, Bioinformatics 23(12), 2007.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        a: where r becomes constant, in units of s w_g: a number > 1, or a traced scalar.
        groups: as in `GroupLasso`.
        weights: as in `GroupLasso`.

    Raises:
        ValueError: where a number is out of its range, or the groups or weights do not fit x.

    >>> import jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> jaxreg.GroupSCAD(1.0, weights=1.0).prox(kernel).tolist()
    [[3.0, 0.0], [4.0, 0.0]]
    """

    a: Number = number(_check.above_one, default=3.7)

    def _radial(self) -> tuple[Concave, Number]:
        return scad, self.a


def group_soft_threshold(x: Array, step: Array, groups: Grouping, a: Array) -> Array:
    """The prox of the sum of a |x_g| over groups, for a scalar or an elementwise step."""
    norm = groups.norm(x)
    if step.ndim == 0:
        pull = step * a
        factor = jnp.maximum(norm - pull, 0) / jnp.where(norm > 0, norm, 1)
        return groups.scaled(x, jnp.where(pull == 0, 1, factor))
    pull = step * groups.spread(a)
    # theta counts from the rounding of the group's norm, so that no divisor below is 0. What that
    # rounding hides is taken for zero.
    floor = jnp.where(norm > 0, float(jnp.finfo(x.dtype).eps) * norm, 1)
    one = jnp.ones((), x.dtype)
    above = secular_root(x, pull + groups.spread(floor), one, one, groups)
    theta = jnp.where(above > 0, above + floor, 0)
    theta = groups.spread(jnp.where(jnp.isfinite(norm), theta, jnp.nan))
    shrunk = x * (theta / jnp.where(theta > 0, theta + pull, 1))
    return jnp.where(pull == 0, x, jnp.where(theta == 0, 0, shrunk))


def radial_distance(x: Array, grad: Array, groups: Grouping, slope: Array) -> Array:
    """`subdiff_distance` of a function of each group's norm that has this slope there."""
    (norm, outward), (size, _) = groups.direction(x), groups.direction(grad)
    at_zero = jnp.abs(grad) * groups.spread(ratio(jnp.maximum(size - slope, 0), size))
    elsewhere = jnp.abs(grad + groups.spread(slope) * outward)
    return jnp.where(groups.spread(norm) == 0, at_zero, elsewhere)
