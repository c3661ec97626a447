r"""Penalties on the singular values of a matrix, in the last two axes of x.

Leading axes are a batch: each matrix is penalized or projected on its own. The prox of a function
of the singular values acts on them alone and keeps the singular vectors (N. Parikh and S. Boyd,
*Proximal Algorithms*, 2014, section 6.7), which holds for one step in all coordinates.

The default method is the SVD, to rounding. The other one is made of matrix products, for
accelerators, where an SVD is slow; how far it is off is written with each class, measured against
float64. Derivatives are finite where singular values repeat or vanish, and those of a prox take an
SVD by either method.

A batch that is sharded over its leading axes needs no collective; a matrix that is sharded over
its rows or columns is gathered on each device for the SVD, while the matrix products of
``newton_schulz`` reduce over the devices. The result is sharded as x is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg.penalties import spectral
from jaxreg.penalties.base import Penalty, penalty, static
from jaxreg.penalties.constraints import Constraint
from jaxreg.penalties.separable import ratio

Number = float | jax.Array


def _one_of(*methods: str) -> Callable[[str, Any], str]:
    return lambda name, value: _check.choice(name, str(value), methods)


@penalty
class Nuclear(Penalty):
    r"""The nuclear norm, $R(X) = s \sum_i \sigma_i(X)$: matrices of low rank.

    Its prox is the soft threshold of the singular values at $step \cdot s$. Its gradient is $s U
    V^T$ over the singular values that are not 0. Source: J.-F. Cai, E. Candes and Z. Shen, *A
    singular value thresholding algorithm for matrix completion*, SIAM J. Optimization 20(4), 2010;
    by matrix products: Y. Nakatsukasa and N. Higham, *Stable and efficient spectral divide and
    conquer algorithms*, SIAM J. Scientific Computing 35(3), 2013.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        method: ``"svd"``, or ``"newton_schulz"``, the polar factor of X and a matrix sign by
            matrix products: within 2e-5 of the largest singular value in float32, 1e-13 in
            float64. What it drops or leaves at 0 it does to that accuracy, and its gradient of the
            value has a part of singular values that are 0 only up to rounding.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar, there is no such
            method, or x has rank below 2.

    >>> import jax.numpy as jnp, jaxreg
    >>> low_rank = jaxreg.Nuclear(1.0)
    >>> low_rank.prox(jnp.diag(jnp.array([3.0, 0.5])), step=2.0).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    >>> float(low_rank.value(jnp.diag(jnp.array([3.0, 0.5]))))
    3.5
    """

    convex = True

    strength: Number
    method: str = static(_one_of("svd", "newton_schulz"), default="svd", kw_only=True)

    def _value(self, x: jax.Array) -> jax.Array:
        if _matrices(x).size == 0:
            return jnp.zeros((), x.dtype)
        return self.strength * spectral.nuclear_norm(self.method == "svd", x)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return _apply(spectral.SOFT_THRESHOLD, self.method, x, step * self.strength)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        largest = jnp.max(spectral.singular_values(_matrices(grad)), initial=0)
        return ratio(largest, self.strength)


class _Projection(Constraint):
    """A constraint on singular values, whose members are those that the projection keeps."""

    def _contains(self, x: jax.Array) -> jax.Array:
        x = jax.lax.stop_gradient(x)
        moved = jnp.abs(x - self._project(x, jnp.ones((), x.dtype)))
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)
        return moved <= _tolerance(x, self._eps) * largest


@penalty
class Rank(_Projection):
    r"""Matrices of rank at most r.

    The prox keeps the r largest singular values and drops the others (C. Eckart and G. Young, *The
    approximation of one matrix by another of lower rank*, Psychometrika 1(3), 1936); where the
    r-th and the next one are equal, it is one of the nearest.

    Args:
        rank: r, a whole number >= 0. From the smaller of a matrix's two lengths on, every matrix is
            allowed.
        method: ``"svd"``, or ``"subspace"``, four rounds of subspace iteration from a fixed start
            with eight columns more than r, then the SVD of a matrix of r + 8 rows. Source: N.
            Halko, P.-G. Martinsson and J. Tropp, *Finding structure with randomness*, SIAM Review
            53(2), 2011, algorithm 4.4.

    Raises:
        ValueError: where the rank is negative or no whole number, there is no such method, or x has
            rank below 2.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.Rank(1).prox(jnp.diag(jnp.array([3.0, 0.5]))).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """

    convex = False

    rank: int = static(lambda name, value: _check.whole_number(name, value, at_least=0))
    method: str = static(_one_of("svd", "subspace"), default="svd", kw_only=True)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        if self.rank >= min(_matrices(x).shape[-2:]):
            return x
        function = spectral.Truncate(self.rank)
        return _apply(function, self.method, x, jnp.zeros((), x.dtype))


@penalty
class SpectralBall(_Projection):
    r"""Matrices whose singular values are at most r, $\sigma_1(X) \le r$.

    The prox clips the singular values at r. Source: N. Parikh and S. Boyd, *Proximal Algorithms*,
    2014, section 6.7.2.

    Args:
        radius: r, a number >= 0, or a traced scalar.
        method: ``"svd"``, or ``"newton_schulz"``, as in `Nuclear`: x minus its prox, with the
            same error. So where x's largest singular value is more than about 10 r, the result may
            be outside by more than `value` allows for, and projecting it again puts it inside.

    Raises:
        ValueError: where the radius is negative, infinite, NaN or no scalar, there is no such
            method, or x has rank below 2.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.SpectralBall(1.0).prox(jnp.diag(jnp.array([3.0, 0.5]))).tolist()
    [[1.0, 0.0], [0.0, 0.5]]
    """

    convex = True

    radius: Number
    method: str = static(_one_of("svd", "newton_schulz"), default="svd", kw_only=True)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return _apply(spectral.CLIP, self.method, x, jnp.asarray(self.radius))


@penalty
class Orthogonal(Constraint):
    r"""Matrices with orthonormal columns, or orthonormal rows where they are wide.

    The prox is the polar factor $U V^T$: each singular value becomes 1. Where a singular value is
    0 several matrices are nearest, and the SVD gives one of them. Source: N. Higham, *Computing the
    polar decomposition*, SIAM J. Scientific and Statistical Computing 7(4), 1986.

    Args:
        method: ``"svd"``, or ``"newton_schulz"``, matrix products: orthonormal to 16 rounding
            errors for condition numbers to 1e4, and within (100 + 4 condition) rounding errors of
            the polar factor (2e-5 in float32 for a condition of 10; 16-bit input is computed in
            float32). A singular value below the rounding error times the largest does not reach
            1: a zero matrix stays zero, which is not in the set.

    Raises:
        ValueError: where there is no such method or x has rank below 2.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.Orthogonal().prox(jnp.diag(jnp.array([3.0, 0.5]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    convex = False

    method: str = static(_one_of("svd", "newton_schulz"), default="svd", kw_only=True)

    def _contains(self, x: jax.Array) -> jax.Array:
        if _matrices(x).size == 0:
            return jnp.ones((), bool)
        return spectral.gram_error(x) <= _tolerance(x, self._eps)

    def _project(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return _apply(spectral.POLAR, self.method, x, jnp.zeros((), x.dtype))


def _apply(
    function: spectral.Spectral, method: str, x: jax.Array, parameter: jax.Array
) -> jax.Array:
    if _matrices(x).size == 0:
        return x
    return spectral.apply(function, method == "svd", x, parameter)


def _matrices(x: jax.Array) -> jax.Array:
    if x.ndim < 2:
        accepted = "an array of two axes or more, whose last two are the rows and columns"
        raise _check.ArgumentError("x", f"an array of shape {x.shape}", accepted)
    return x


def _tolerance(x: jax.Array, eps: float) -> float:
    """A relative error that products over the rows or columns may have."""
    return 32 * eps * max(1, *x.shape[-2:]) ** 0.5
