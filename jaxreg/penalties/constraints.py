r"""Constraints: penalties that are 0 on a set and infinite outside.

Their prox is the projection on the set, in the metric of the step: $\arg\min_{w \in C} \sum_i (w_i
- x_i)^2 / step_i$, so a scalar step makes no difference. Where the step is 0 they project too: a
point outside is no minimizer at any step. Any positive multiple of a constraint is the constraint.

The value allows for rounding, so that it is 0 at what the prox gives. Through
``optax.apply_updates`` zeros are exact, and the rest holds to the rounding of the move: a first
step from far away may end outside by more than the value allows, and the next one mends it.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check
from jaxreg.penalties.base import Penalty, number, penalty

Number = float | jax.Array


class Constraint(Penalty):
    """A penalty that is 0 on a set and infinite outside."""

    scales = ()

    def _rounding(self, x: jax.Array) -> float:
        """A relative error that sums over x may have, in the dtype that x was given in."""
        return rounding(x, self._eps)

    @abc.abstractmethod
    def _contains(self, x: jax.Array) -> jax.Array:
        """Whether x is in the set, up to rounding: one or more bools, all of which count."""

    @abc.abstractmethod
    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        """The nearest point of the set; step is a scalar, or > 0 in every coordinate."""

    def _value(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(self._contains(x)), jnp.zeros((), x.dtype), jnp.inf)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return self._project(x, positive_step(step))

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        if not self.convex:
            return super()._critical_multiplier(grad)
        # 0 is optimal where descent from it leads back to it; else no multiple makes it so.
        reached = jnp.max(jnp.abs(self._project(-grad, jnp.ones((), grad.dtype))), initial=0)
        stays = reached <= self._zero(grad)
        return jnp.where(stays, jnp.zeros((), grad.dtype), jnp.inf)

    def _zero(self, grad: jax.Array) -> jax.Array | float:
        """What counts as 0 in the projection of -grad."""
        return 0.0


def rounding(x: jax.Array, eps: float | None = None) -> float:
    """A relative error that sums over x may have."""
    return 32 * (eps or float(jnp.finfo(x.dtype).eps)) * max(1, x.size) ** 0.5


def positive_step(step: jax.Array) -> jax.Array:
    """Steps that can be divided by: a coordinate of step 0 moves where no other one can."""
    if step.ndim == 0:
        return step
    largest = jnp.max(step, initial=0)
    return jnp.where(largest > 0, jnp.maximum(step, 1e-25 * largest), jnp.ones_like(step))


class Interval(Constraint):
    """Every coordinate in one interval."""

    convex, separable, elementwise_step = True, True, True

    @abc.abstractmethod
    def bounds(self) -> tuple[Any, Any]:
        """The lower and the upper bound."""

    def _around(self) -> tuple[Any, Any, Any, Any]:
        """Each bound less and plus the rounding of a sum such as p + (w - p)."""
        lower, upper = (jnp.asarray(bound) for bound in self.bounds())
        # An infinite bound has no rounding, and inf - inf would be NaN.
        low, up = (16 * self._eps * jnp.where(jnp.isinf(b), 0, jnp.abs(b)) for b in (lower, upper))
        return lower - low, lower + low, upper - up, upper + up

    def _contains(self, x: jax.Array) -> jax.Array:
        below, _, _, beyond = self._around()
        return (x >= below) & (x <= beyond)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.clip(x, *self.bounds())

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        # At the lower bound only an increase is allowed, at the upper one only a decrease.
        below, at_lower, at_upper, beyond = self._around()
        increase = jnp.where(x < at_upper, jnp.maximum(-grad, 0), 0)
        decrease = jnp.where(x > at_lower, jnp.maximum(grad, 0), 0)
        outside = (x < below) | (x > beyond)
        return jnp.where(outside, jnp.inf, jnp.maximum(increase, decrease))


@penalty
class Box(Interval):
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

    lower: Number = number(_check.not_nan)
    upper: Number = number(_check.not_nan)

    def __post_init__(self) -> None:
        super().__post_init__()
        lower, upper = self.lower, self.upper
        if _check.is_concrete(lower) and _check.is_concrete(upper) and lower > upper:
            raise _check.ArgumentError("upper", repr(upper), f"a number >= lower = {lower}")

    def bounds(self) -> tuple[Any, Any]:
        return self.lower, self.upper


@penalty
class NonNegative(Interval):
    r"""No coordinate below zero, $x_i \ge 0$.

    The prox is $\max(x, 0)$.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.NonNegative().prox(jnp.array([-2.0, 0.5])).tolist()
    [0.0, 0.5]
    """

    sparse = True

    def bounds(self) -> tuple[Any, Any]:
        return 0, jnp.inf


@penalty
class LInfBall(Interval):
    r"""The ball of the maximum norm, $\max_i |x_i| \le r$.

    The prox is the clip to $[-r, r]$.

    Args:
        radius: r, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the radius is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.LInfBall(1.0).prox(jnp.array([-2.0, 0.5])).tolist()
    [-1.0, 0.5]
    """

    radius: Number

    def bounds(self) -> tuple[Any, Any]:
        return -self.radius, self.radius


@penalty
class HalfSpace(Constraint):
    r"""A half-space, $\langle a, x \rangle \le b$.

    Its prox is $x - \frac{\max(\langle a, x \rangle - b, 0)}{\sum_i step_i a_i^2} \, step \circ
    a$. Source: H. Bauschke and P. Combettes, *Convex Analysis and Monotone Operator Theory in
    Hilbert Spaces*, 2nd ed., Springer, 2017, example 29.20.

    Args:
        normal: a, an array of x's shape, not all 0.
        offset: b, a number, or a traced scalar.

    Raises:
        ValueError: where the normal is 0, has NaN or infinite entries or another shape than x, or
            the offset is no finite scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.HalfSpace(jnp.array([1.0, 1.0]), 1.0).prox(jnp.array([2.0, 1.0])).tolist()
    [1.0, 0.0]
    """

    convex, elementwise_step = True, True

    normal: jax.Array = number(_check.finite_array)
    offset: Number = number(_check.finite)

    def __post_init__(self) -> None:
        super().__post_init__()
        if _check.is_concrete(self.normal) and not np.any(np.asarray(self.normal)):
            raise _check.ArgumentError("normal", "an array of zeros", "one that is not all 0")

    def _contains(self, x: jax.Array) -> jax.Array:
        normal = _same_shape("normal", self.normal, x)
        size = jnp.sum(jnp.abs(normal * x)) + jnp.abs(self.offset)
        return jnp.sum(normal * x) - self.offset <= self._rounding(x) * size

    def _zero(self, grad: jax.Array) -> jax.Array:
        return self._rounding(grad) * jnp.max(jnp.abs(grad), initial=0)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        normal = _same_shape("normal", self.normal, x)
        step = unit_where_scalar(step)
        excess = jnp.maximum(jnp.sum(normal * x) - self.offset, 0)
        return x - excess / jnp.sum(step * jnp.square(normal)) * step * normal


@penalty
class Affine(Constraint):
    r"""The solutions of linear equations, $A \, \mathrm{vec}(x) = b$.

    Its prox is $x - step \circ A^T (A \, \mathrm{diag}(step) A^T)^+ (A x - b)$, computed from the
    singular values of $A \, \mathrm{diag}(step)^{1/2}$: rows may repeat. Where the equations have
    no solution, the result is the nearest least-squares solution. Source: N. Parikh and S. Boyd,
    *Proximal Algorithms*, 2014, section 6.2.

    Args:
        matrix: A, an array of shape (equations, size of x); x is taken in C order.
        offset: b, an array of shape (equations,).

    Raises:
        ValueError: where a shape does not fit or an entry is not finite.

    >>> import jax.numpy as jnp, jaxreg
    >>> sums_to_one = jaxreg.Affine(jnp.ones((1, 3)), jnp.ones(1))
    >>> [f"{w:.3f}" for w in sums_to_one.prox(jnp.array([1.0, 1.0, 0.5])).tolist()]
    ['0.500', '0.500', '0.000']
    """

    convex, elementwise_step = True, True

    matrix: jax.Array = number(_check.finite_array)
    offset: jax.Array = number(_check.finite_array)

    def _equations(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrix, offset = self.matrix, self.offset
        if matrix.ndim != 2 or matrix.shape[1] != x.size:
            accepted = f"an array of shape (equations, {x.size}), the size of x"
            raise _check.ArgumentError("matrix", _check.describe(matrix), accepted)
        if offset.shape != matrix.shape[:1]:
            accepted = f"an array of shape {matrix.shape[:1]}, one number an equation"
            raise _check.ArgumentError("offset", _check.describe(offset), accepted)
        return matrix, offset

    def _contains(self, x: jax.Array) -> jax.Array:
        matrix, offset = self._equations(x)
        size = jnp.abs(matrix) @ jnp.abs(x.ravel()) + jnp.abs(offset)
        excess = jnp.abs(jnp.matmul(matrix, x.ravel(), precision="highest") - offset)
        return excess <= matrix.shape[0] * self._rounding(x) * size

    def _zero(self, grad: jax.Array) -> jax.Array:
        return self._rounding(grad) * jnp.max(jnp.abs(grad), initial=0)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        matrix, offset = self._equations(x)
        root = jnp.ones((x.size,), x.dtype) if step.ndim == 0 else jnp.sqrt(step).ravel()
        scaled = matrix * root[None, :]
        excess = jnp.matmul(matrix, x.ravel(), precision="highest") - offset
        move = jnp.matmul(jnp.linalg.pinv(scaled), excess, precision="highest")
        return x - (root * move).reshape(x.shape)


def unit_where_scalar(step: jax.Array) -> jax.Array:
    """The step of a projection: a scalar one makes no difference."""
    return jnp.ones_like(step) if step.ndim == 0 else step


def _same_shape(name: str, array: jax.Array, x: jax.Array) -> jax.Array:
    if array.shape != x.shape:
        accepted = f"an array of x's shape {x.shape}"
        raise _check.ArgumentError(name, _check.describe(array), accepted)
    return array
