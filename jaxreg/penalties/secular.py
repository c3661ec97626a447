r"""The secular equation: Euclidean norms in a diagonal metric.

In each group, find the $\mu \ge 0$ with $\sum_i z_i^2 / (\alpha_i + \mu \beta_i)^2 = r^2$. With
$\phi(\mu)$ its left side, $r \, \phi(\mu)^{-1/2} - 1$ is concave and rising, so Newton's method
from below rises to the root without overshooting; about four steps suffice. Source: J. More and D.
Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4(3), 1983.
"""

import jax
import jax.numpy as jnp

from jaxreg.groups import Grouping

Array = jax.Array
_MAX_STEPS = 50  # far above what finite numbers need


def secular_root(z: Array, alpha: Array, beta: Array, radius: Array, groups: Grouping) -> Array:
    r"""The root $\mu$ of each group, 0 where the left side is below $r^2$ already at 0.

    Differentiable in z, alpha, beta and radius up to the third order: the last two steps carry the
    derivatives.

    Args:
        z: an array of any shape.
        alpha: a scalar or an array of z's shape, >= 0.
        beta: a scalar or an array of z's shape, > 0.
        radius: r, a scalar > 0.
        groups: those of z.
    """
    nonzero = z != 0

    def newton(mu: Array, z: Array, alpha: Array, beta: Array, radius: Array) -> Array:
        divisor = jnp.where(nonzero, alpha + groups.spread(mu) * beta, 1)
        inverse = 1 / divisor
        squares = jnp.square(z * inverse)
        total = groups.sum(squares)
        slope = groups.sum(squares * inverse * beta)
        usable = slope > 0
        total, slope = jnp.where(usable, total, 1), jnp.where(usable, slope, 1)
        rise = total * (jnp.sqrt(total) / radius - 1) / slope
        return jnp.where(usable, mu + rise, mu)

    def from_below(z: Array, alpha: Array, beta: Array, radius: Array) -> Array:
        """No term alone exceeds r^2, nor does the sum with all alpha and beta at their largest."""
        of_terms = groups.max(jnp.maximum((jnp.abs(z) / radius - alpha) / beta, 0))
        widest, steepest = (groups.max(c) if c.ndim else c for c in (alpha, beta))
        of_sum = (groups.norm(z) / radius - widest) / jnp.where(steepest > 0, steepest, 1)
        return jnp.maximum(of_terms, of_sum)

    given = z, alpha, beta, radius
    fixed = jax.lax.stop_gradient(given)

    def rises(state: tuple[Array, Array, Array]) -> Array:
        count, before, mu = state
        noise = 4 * float(jnp.finfo(mu.dtype).eps)
        return (count < _MAX_STEPS) & jnp.any(mu > before * (1 + noise))

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, _, mu = state
        return count + 1, mu, jnp.maximum(newton(mu, *fixed), mu)

    first = from_below(*fixed)
    state = (jnp.zeros((), jnp.int32), first, jnp.maximum(newton(first, *fixed), first))
    _, _, mu = jax.lax.while_loop(rises, step, state)
    return newton(newton(mu, *given), *given)
