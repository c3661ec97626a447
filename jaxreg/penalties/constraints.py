r"""Constraints: penalties that are 0 on a set and infinite outside.

Their prox is the Euclidean projection on the set, whatever the step (0 included: a point outside
is no minimizer at any step).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg.penalties.base import Penalty, penalty


@penalty
class Box(Penalty):
    r"""Every coordinate between two bounds, $lower \le x_i \le upper$.

    The prox is the clip to the bounds. Through ``optax.apply_updates`` a bound other than 0 holds
    to rounding, and 0 exactly.

    Args:
        lower: a number (``-inf`` for none), or a traced scalar.
        upper: a number >= lower (``inf`` for none), or a traced scalar.

    Raises:
        ValueError: where a bound is NaN or no scalar, or lower > upper.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.Box(-1.0, 1.0).prox(jnp.array([-2.0, 0.5, 3.0])).tolist()
    [-1.0, 0.5, 1.0]
    """

    convex, separable, sparse = True, True, False

    lower: float | jax.Array
    upper: float | jax.Array

    def __post_init__(self) -> None:
        super().__post_init__()
        lower, upper = self.lower, self.upper
        if _check.is_concrete(lower) and _check.is_concrete(upper) and lower > upper:
            raise _check.ArgumentError("upper", repr(upper), f"a number >= lower = {lower}")

    @staticmethod
    def _check_number(name: str, value: Any) -> Any:
        return _check.scalar(name, value, "a number, not NaN", lambda bound: bound == bound)

    def _value(self, x: jax.Array) -> jax.Array:
        inside = jnp.all((x >= self.lower) & (x <= self.upper))
        return jnp.where(inside, jnp.zeros((), x.dtype), jnp.inf)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.clip(x, self.lower, self.upper)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return _distance_to_normal_cone(x, grad, self.lower, self.upper)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return _zero_if_optimal(self._subdiff_distance(jnp.zeros_like(grad), grad))


@penalty
class NonNegative(Penalty):
    r"""No coordinate below zero, $x_i \ge 0$.

    The prox is $\max(x, 0)$.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.NonNegative().prox(jnp.array([-2.0, 0.5])).tolist()
    [0.0, 0.5]
    """

    convex, separable, sparse = True, True, True

    def _value(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x >= 0), jnp.zeros((), x.dtype), jnp.inf)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return _distance_to_normal_cone(x, grad, 0, jnp.inf)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        return _zero_if_optimal(self._subdiff_distance(jnp.zeros_like(grad), grad))


def _distance_to_normal_cone(
    x: jax.Array, grad: jax.Array, lower: jax.Array | float, upper: jax.Array | float
) -> jax.Array:
    """Distance of -grad to the normal cone of [lower, upper] at x: what descent could still gain.

    At the lower bound only an increase is allowed, at the upper one only a decrease.
    """
    increase = jnp.where(x < upper, jnp.maximum(-grad, 0), 0)
    decrease = jnp.where(x > lower, jnp.maximum(grad, 0), 0)
    return jnp.where((x < lower) | (x > upper), jnp.inf, jnp.maximum(increase, decrease))


def _zero_if_optimal(distance: jax.Array) -> jax.Array:
    """A multiple of a constraint is the constraint: 0 where x = 0 is optimal, else infinity."""
    return jnp.where(jnp.all(distance == 0), jnp.zeros((), distance.dtype), jnp.inf)
