r"""Penalties that are sums over coordinates, $R(x) = \sum_i r(x_i)$.

The proximal operator acts on each coordinate alone, so it has the same form for a scalar step and
for one step a coordinate. Formulas are in terms of the step, never of its reciprocal: step 0 is
the identity.
"""

import jax
import jax.numpy as jnp

from jaxreg.penalties.base import Penalty, penalty


def soft_threshold(x: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""$\mathrm{sign}(x) \max(|x| - threshold, 0)$: shrinks toward 0 and stops there.

    Written as x minus its projection on $[-threshold, threshold]$, which gives an exact zero
    inside that interval.

    >>> soft_threshold(jnp.array([-2.0, 0.5, 3.0]), jnp.array(1.0)).tolist()
    [-1.0, 0.0, 2.0]
    """
    return x - jnp.clip(x, -threshold, threshold)


@penalty
class L1(Penalty):
    r"""The L1 norm (lasso), $R(x) = s \sum_i |x_i|$: exact zeros.

    Its prox is the soft threshold at $step \cdot s$. Source: R. Tibshirani, *Regression shrinkage
    and selection via the lasso*, JRSS B 58(1), 1996.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> lasso = jaxreg.L1(0.5)
    >>> lasso.prox(jnp.array([-2.0, 0.25, 1.0]), step=2.0).tolist()
    [-1.0, 0.0, 0.0]
    >>> float(lasso.value(jnp.array([-2.0, 0.25, 1.0])))
    1.625
    """

    convex, separable, sparse = True, True, True

    strength: float | jax.Array

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum(jnp.abs(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(x, step * self.strength)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        at_zero = jnp.maximum(jnp.abs(grad) - self.strength, 0)
        return jnp.where(x == 0, at_zero, jnp.abs(grad + self.strength * jnp.sign(x)))

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return _ratio(_largest(grad), self.strength)


@penalty
class L2(Penalty):
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

    convex, separable, sparse = True, True, False

    strength: float | jax.Array

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength / 2 * jnp.sum(jnp.square(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return x / (1 + step * self.strength)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.abs(grad + self.strength * x)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return jnp.where(_largest(grad) > 0, jnp.inf, jnp.zeros((), grad.dtype))


@penalty
class ElasticNet(Penalty):
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

    convex, separable, sparse = True, True, True

    l1: float | jax.Array
    l2: float | jax.Array

    def _value(self, x: jax.Array) -> jax.Array:
        return self.l1 * jnp.sum(jnp.abs(x)) + self.l2 / 2 * jnp.sum(jnp.square(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(x, step * self.l1) / (1 + step * self.l2)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        smooth = grad + self.l2 * x
        at_zero = jnp.maximum(jnp.abs(grad) - self.l1, 0)
        return jnp.where(x == 0, at_zero, jnp.abs(smooth + self.l1 * jnp.sign(x)))

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return _ratio(_largest(grad), self.l1)


def _largest(grad: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(grad), initial=0)


def _ratio(numerator: jax.Array, denominator: jax.Array | float) -> jax.Array:
    """Numerator / denominator for numbers >= 0, with 0 / 0 = 0: no gradient needs no penalty."""
    positive = numerator > 0
    # Guarded inside the division too: the gradient of an unused 0 / 0 would be NaN.
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)
