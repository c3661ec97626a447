r"""The secular equation: Euclidean norms in a diagonal metric.

In each group, find the $\mu \ge 0$ with $\sum_i z_i^2 / (\alpha_i + \mu \beta_i)^2 = r^2$. With
$h(\mu)$ its left side, $\phi = r \, h^{-1/2} - 1$ is concave and rising, so Newton's method from
below rises to the root without overshooting. It starts where Jensen's inequality puts a bound:
$h(\mu) \ge \|z\|^2 / (\bar\alpha + \mu \bar\beta)^2$ with means weighted by $z_i^2$. Source: J.
More and D. Sorensen, *Computing a trust region step*, SIAM J. Sci. Stat. Comput. 4(3), 1983.
"""

import jax
import jax.numpy as jnp

from jaxreg.groups import Grouping

Array = jax.Array
_MAX_STEPS = 50  # far above what finite numbers need


def secular_root(z: Array, alpha: Array, beta: Array, radius: Array, groups: Grouping) -> Array:
    r"""The root $\mu$ of each group, 0 where the left side is below $r^2$ already at 0.

    Differentiable to any order, by the implicit function theorem.

    Args:
        z: an array of any shape.
        alpha: a scalar or an array of z's shape, > 0.
        beta: a scalar or an array of z's shape, > 0.
        radius: r > 0, a scalar or one number a group.
        groups: those of z.
    """
    # A radius of 1, so that the squares of neither it nor the terms at the root are out of range.
    z = z / (groups.spread(radius) if radius.ndim else radius)

    @jax.custom_jvp
    def root(z: Array, alpha: Array, beta: Array) -> Array:
        return _rise_to_root(z, alpha, beta, groups)

    @root.defjvp
    def tangent(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        z, alpha, beta = primals
        mu = root(z, alpha, beta)

        def terms(z: Array, alpha: Array, beta: Array) -> Array:
            return groups.sum(jnp.square(z / (alpha + groups.spread(mu) * beta)))

        divisor = alpha + groups.spread(mu) * beta
        slope = 2 * groups.sum(jnp.square(z / divisor) * (beta / divisor))
        _, change = jax.jvp(terms, primals, tangents)
        usable = (mu > 0) & (slope > 0)
        return mu, jnp.where(usable, change / jnp.where(usable, slope, 1), 0)

    return root(z, alpha, beta)


def _rise_to_root(z: Array, alpha: Array, beta: Array, groups: Grouping) -> Array:
    tolerance = 0.1 * float(jnp.finfo(z.dtype).eps) ** 0.5

    def rising(state: tuple[Array, Array, Array]) -> Array:
        # To leading order Newton's error is at most 1.5 times the square of its last step, both
        # relative to mu, as mu phi'' / phi' >= -3 here: after a step below the tolerance it is
        # below rounding.
        count, mu, rise = state
        return (count < _MAX_STEPS) & jnp.any(rise > tolerance * mu)

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, mu, _ = state
        # What both sums shared XLA would write to memory: each gets a divisor of its own.
        again = jax.lax.optimization_barrier(mu)
        total = groups.sum(jnp.square(z / (alpha + groups.spread(mu) * beta)))
        divisor = alpha + groups.spread(again) * beta
        slope = groups.sum(jnp.square(z / divisor) * (beta / divisor))
        usable = slope > 0
        rise = (jnp.sqrt(total) - 1) * (total / jnp.where(usable, slope, 1))
        rise = jnp.where(usable, jnp.maximum(rise, 0), 0)
        return count + 1, mu + rise, rise

    norm = groups.norm(z)
    unit = groups.spread(jnp.where(norm > 0, norm, 1))

    def mean(numbers: Array) -> Array:
        return groups.sum(jnp.square(z / unit) * numbers) if numbers.ndim else numbers

    bound = (norm - mean(alpha)) / mean(beta)
    start = jnp.where((bound > 0) & (bound < jnp.inf), bound, 0)
    return jax.lax.while_loop(rising, newton, (jnp.zeros((), int), start, start + 1))[1]
