r"""Convex penalties that are sums over coordinates, $R(x) = \sum_i r(x_i)$.

The proximal operator acts on each coordinate alone, so it has the same form for a scalar step and
for one step a coordinate. Formulas are in terms of the step, never of its reciprocal: step 0 is
the identity.
"""

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg.penalties.base import Penalty, number, penalty

Number = float | jax.Array


def soft_threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""$\mathrm{sign}(x) \max(|x| - threshold, 0)$: shrinks toward 0 and stops there.

    Written as x minus its projection on $[-threshold, threshold]$, which gives an exact zero
    inside that interval.

    >>> soft_threshold(jnp.array([-2.0, 0.5, 3.0]), jnp.array(1.0)).tolist()
    [-1.0, 0.0, 2.0]
    """
    return x - jnp.clip(x, -threshold, threshold)


def slope_distance(x: jax.Array, grad: jax.Array, slope: Number) -> jax.Array:
    """Distance of -grad to the subdifferential of r(|x|) with r' = slope: [-r'(0), r'(0)] at 0."""
    at_zero = jnp.maximum(jnp.abs(grad) - slope, 0)
    return jnp.where(x == 0, at_zero, jnp.abs(grad + slope * jnp.sign(x)))


class Separable(Penalty):
    """A sum over coordinates: any elementwise step has a simple prox."""

    separable, elementwise_step = True, True


@penalty
class L1(Separable):
    r"""The L1 norm (lasso), $R(x) = \sum_i s_i |x_i|$: exact zeros.

    Its prox is the soft threshold at $step \cdot s$. Source: R. Tibshirani, *Regression shrinkage
    and selection via the lasso*, JRSS B 58(1), 1996; with one strength a coordinate: H. Zou, *The
    adaptive lasso and its oracle properties*, JASA 101(476), 2006.

    Args:
        strength: s, a number >= 0, or an array of x's shape; either may be traced.

    Raises:
        ValueError: where the strength is negative, infinite or NaN, or an array of another shape
            than x.

    >>> import jax.numpy as jnp, jaxreg
    >>> lasso = jaxreg.L1(0.5)
    >>> lasso.prox(jnp.array([-2.0, 0.25, 1.0]), step=2.0).tolist()
    [-1.0, 0.0, 0.0]
    >>> float(lasso.value(jnp.array([-2.0, 0.25, 1.0])))
    1.625
    """

    convex, sparse = True, True

    strength: Number = number(_check.strengths)

    def _value(self, x: jax.Array) -> jax.Array:
        return jnp.sum(_each(self.strength, x) * jnp.abs(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(x, step * _each(self.strength, x))

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return slope_distance(x, grad, _each(self.strength, x))

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return jnp.max(ratio(jnp.abs(grad), _each(self.strength, grad)), initial=0)


@penalty
class NonNegativeL1(Separable):
    r"""The L1 norm on coordinates that may not be negative, $R(x) = \sum_i s_i x_i$, $x_i \ge 0$.

    Its prox is $\max(x - step \cdot s, 0)$; its value is infinite where a coordinate is negative.

    Args:
        strength: s, a number >= 0, or an array of x's shape; either may be traced.

    Raises:
        ValueError: where the strength is negative, infinite or NaN, or an array of another shape
            than x.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.NonNegativeL1(0.5).prox(jnp.array([-2.0, 0.25, 1.0]), step=1.0).tolist()
    [0.0, 0.0, 0.5]
    """

    convex, sparse = True, True

    strength: Number = number(_check.strengths)

    def _value(self, x: jax.Array) -> jax.Array:
        total = jnp.sum(_each(self.strength, x) * x)
        return jnp.where(jnp.all(x >= 0), total, jnp.inf)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.maximum(x - step * _each(self.strength, x), 0)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        slope = grad + _each(self.strength, x)
        distance = jnp.where(x == 0, jnp.maximum(-slope, 0), jnp.abs(slope))
        return jnp.where(x < 0, jnp.inf, distance)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        descent = jnp.maximum(-grad, 0)
        return jnp.max(ratio(descent, _each(self.strength, grad)), initial=0)


@penalty
class L2(Separable):
    r"""The squared L2 norm (ridge), $R(x) = \frac{s}{2} \sum_i x_i^2$.

    Its gradient is $s x$, so the strength means what it means in weight decay. Keras' ``L2(l)`` is
    $l \sum_i x_i^2$: s = 2l. Its prox is $x / (1 + step \cdot s)$. Source: A. Hoerl and R.
    Kennard, *Ridge regression*, Technometrics 12(1), 1970.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.L2(1.0).prox(jnp.array([-2.0, 1.0]), step=1.0).tolist()
    [-1.0, 0.5]
    """

    convex = True

    strength: Number

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength / 2 * jnp.sum(jnp.square(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return x / (1 + step * self.strength)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.abs(grad + self.strength * x)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return infinite_unless_zero(grad)


@penalty
class ElasticNet(Separable):
    r"""The elastic net, $R(x) = l_1 \sum_i |x_i| + \frac{l_2}{2} \sum_i x_i^2$.

    Its prox is the soft threshold at $step \cdot l_1$, divided by $1 + step \cdot l_2$.
    scikit-learn's ``alpha`` and ``l1_ratio`` are l1 = alpha * l1_ratio and l2 = alpha *
    (1 - l1_ratio), for a loss divided by the number of rows. Source: H. Zou and T. Hastie,
    *Regularization and variable selection via the elastic net*, JRSS B 67(2), 2005.

    Args:
        l1: strength of the L1 part, a number >= 0, or a traced scalar.
        l2: strength of the squared L2 part, likewise.

    Raises:
        ValueError: where a strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.ElasticNet(1.0, 1.0).prox(jnp.array([-3.0, 0.5]), step=1.0).tolist()
    [-1.0, 0.0]
    """

    convex, sparse = True, True

    scales = ("l1", "l2")

    l1: Number
    l2: Number

    def _value(self, x: jax.Array) -> jax.Array:
        return self.l1 * jnp.sum(jnp.abs(x)) + self.l2 / 2 * jnp.sum(jnp.square(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(x, step * self.l1) / (1 + step * self.l2)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return slope_distance(x, grad + self.l2 * x, self.l1)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return ratio(largest(grad), self.l1)


@penalty
class Huber(Separable):
    r"""The Huber function, $R(x) = s \sum_i h(x_i)$: squared near 0, absolute far from it.

    $h(x) = x^2 / 2$ where $|x| \le \delta$, else $\delta |x| - \delta^2 / 2$. Its prox is $x -
    step \cdot s \, \mathrm{clip}(x / (1 + step \cdot s), -\delta, \delta)$. Source: P. Huber,
    *Robust estimation of a location parameter*, Annals of Mathematical Statistics 35(1), 1964.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        delta: where the two pieces meet, a number > 0, or a traced scalar.

    Raises:
        ValueError: where a number is out of its range, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.Huber(1.0, delta=1.0).prox(jnp.array([-4.0, 1.0]), step=1.0).tolist()
    [-3.0, 0.5]
    """

    convex = True

    strength: Number
    delta: Number = number(_check.positive, default=1.0)

    def _value(self, x: jax.Array) -> jax.Array:
        near = jnp.minimum(jnp.abs(x), self.delta)
        return self.strength * jnp.sum(near * (jnp.abs(x) - near / 2))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        pull = step * self.strength
        return x - pull * jnp.clip(x / (1 + pull), -self.delta, self.delta)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.abs(grad + self.strength * jnp.clip(x, -self.delta, self.delta))

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return infinite_unless_zero(grad)


def _each(strength: Number, x: jax.Array) -> jax.Array:
    """A strength that is a scalar or of x's shape."""
    strength = jnp.asarray(strength)
    if strength.shape not in ((), x.shape):
        accepted = f"a scalar or an array of x's shape {x.shape}"
        raise _check.ArgumentError("strength", _check.describe(strength), accepted)
    return strength


def largest(x: jax.Array) -> jax.Array:
    """The largest absolute value; 0 for an empty array."""
    return jnp.max(jnp.abs(x), initial=0)


def infinite_unless_zero(grad: jax.Array) -> jax.Array:
    """The critical multiplier of an R that is smooth at 0: no multiple holds 0 there."""
    return jnp.where(largest(grad) > 0, jnp.inf, jnp.zeros((), grad.dtype))


def ratio(numerator: jax.Array, denominator: jax.Array | float) -> jax.Array:
    """Numerator / denominator for numbers >= 0, with 0 / 0 = 0: no gradient needs no penalty."""
    positive = numerator > 0
    # Guarded inside the division too: the gradient of an unused 0 / 0 would be NaN.
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)
