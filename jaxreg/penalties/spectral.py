r"""Functions of singular values, $f(X) = U \, \mathrm{diag}(f(\sigma)) \, V^T$, that differentiate.

For $X = U \, \mathrm{diag}(\sigma) \, V^T$ and a direction D, with $P = U^T D V$ split into its
symmetric part S and its antisymmetric part A,

$$Df(X)[D] = U \, (G \circ S + H \circ A) \, V^T + \text{rest}, \quad
G_{ij} = \frac{f(\sigma_i) - f(\sigma_j)}{\sigma_i - \sigma_j}, \quad
H_{ij} = \frac{f(\sigma_i) + f(\sigma_j)}{\sigma_i + \sigma_j},$$

and the rest is $(I - U U^T) D V \, \mathrm{diag}(f(\sigma) / \sigma) \, V^T$ for a tall X, its
transpose for a wide one. Where a quotient is 0/0 it is the slope of f, so the derivative is finite
where singular values repeat or vanish; JAX's derivative of the decomposition itself is not.
Source: F. Andersson, M. Carlsson and K.-M. Perfekt, *Operator-Lipschitz estimates for the singular
value functional calculus*, Proceedings of the AMS 144(5), 2016; for G and H: A. Lewis and H.
Sendov, *Nonsmooth analysis of singular values*, Set-Valued Analysis 13, 2005.

Every function has an exact form by the SVD and a form made of matrix products, for accelerators,
where an SVD is slow. The derivative takes an SVD in both.
"""

import abc
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

matmul = functools.partial(jnp.matmul, precision="highest")


class Values(NamedTuple):
    """What a function does to the singular values s, of shape (..., k), the largest first."""

    f: jax.Array
    level: jax.Array
    """f up to a constant, so that its differences have no rounding error."""
    slope: jax.Array
    """f'(s)."""
    by_parameter: jax.Array
    """The derivative of f(s) with respect to the parameter."""
    drop: jax.Array
    """s - f(s) without cancellation, for matrices that are near their image."""
    near: jax.Array
    """Of shape (...): whether X - U diag(drop) V^T has less rounding error than U diag(f) V^T."""


class Spectral(abc.ABC):
    """A function of the singular values, with one parameter."""

    @abc.abstractmethod
    def at(self, s: jax.Array, t: jax.Array) -> Values: ...

    @abc.abstractmethod
    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """f(X) by matrix products."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def apply(function: Spectral, exact: bool, x: jax.Array, t: jax.Array) -> jax.Array:
    """f(X) for each matrix in the last two axes of x; t is the parameter, a scalar."""
    if not exact:
        return function.by_products(x, t)
    u, s, vh = svd(x)
    return _assemble(x, u, vh, function.at(s, t))


@apply.defjvp
def _(function, exact, primals, tangents):
    (x, t), (dx, dt) = primals, tangents
    u, s, vh = svd(x)
    values = function.at(s, t)
    right = matmul(dx, mT(vh))
    inner = matmul(mT(u), right)
    slopes = (_rows(values.slope) + _columns(values.slope)) / 2
    differences, sums = _rows(s) - _columns(s), _rows(s) + _columns(s)
    noise = _rounding(s)[..., None]
    g = _quotient(_rows(values.level) - _columns(values.level), differences, noise, slopes)
    h = _quotient(_rows(values.f) + _columns(values.f), sums, noise, slopes)
    core = g * (inner + mT(inner)) / 2 + h * (inner - mT(inner)) / 2
    core += _identity(core) * _rows(values.by_parameter * dt)
    tangent = matmul(matmul(u, core), vh)
    ratio = _quotient(values.f, s, _rounding(s), values.slope)
    if x.shape[-2] > x.shape[-1]:
        outside = right - matmul(u, inner)
        tangent += matmul(outside * _columns(ratio), vh)
    elif x.shape[-2] < x.shape[-1]:
        outside = matmul(mT(u), dx) - matmul(inner, vh)
        tangent += matmul(u * _columns(ratio), outside)
    return _assemble(x, u, vh, values), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def nuclear_norm(exact: bool, x: jax.Array) -> jax.Array:
    r"""The sum of all singular values; its gradient is $U V^T$ over those that are not 0."""
    return jnp.sum(singular_values(x) if exact else x * sign(exact, x))


@nuclear_norm.defjvp
def _(exact, primals, tangents):
    (x,), (dx,) = primals, tangents
    gradient = sign(exact, x)
    return jnp.sum(x * gradient), jnp.sum(dx * gradient)


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, vh = jnp.linalg.svd(_nan_unless_finite(x), full_matrices=False)
    return u, s, vh


def singular_values(x: jax.Array) -> jax.Array:
    return jnp.linalg.svd(_nan_unless_finite(x), compute_uv=False)


# The functions ---------------------------------------------------------------------------------


class _SoftThreshold(Spectral):
    def at(self, s: jax.Array, t: jax.Array) -> Values:
        # Where singular values vanish, U diag(f) V^T has that rank to rounding of its own size.
        near = (s[..., -1] > t) | (t == 0)
        level = jnp.maximum(s, t)
        return Values(level - t, level, _ones(s >= t, s), -_ones(s > t, s), jnp.minimum(s, t), near)

    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return _soft_threshold(x, t)


@dataclasses.dataclass(frozen=True)
class Clip(Spectral):
    """The smaller of a singular value and the parameter."""

    steps: int | None = None
    """Of each of the two iterations; by default as many as rounding allows for."""

    def at(self, s: jax.Array, t: jax.Array) -> Values:
        f = jnp.minimum(s, t)
        drop = jnp.where(s - t <= 8 * jnp.finfo(s.dtype).eps * t, 0, s - t)
        return Values(f, f, _ones(s < t, s), _ones(s > t, s), drop, s[..., 0] <= 2 * t)

    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return x - _soft_threshold(x, t, self.steps)


@dataclasses.dataclass(frozen=True)
class Truncate(Spectral):
    """The largest singular values, as many as `rank`, and 0 for the others."""

    rank: int

    def at(self, s: jax.Array, t: jax.Array) -> Values:
        kept = jnp.broadcast_to(jnp.arange(s.shape[-1]) < self.rank, s.shape)
        f, zeros = jnp.where(kept, s, 0), jnp.zeros_like(s)
        near = jnp.all(s - f <= _rounding(s), axis=-1)
        return Values(f, f, _ones(kept, s), zeros, zeros, near)

    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        # A subspace that the dominant singular vectors lie in, by iteration from a fixed start.
        size = self.rank + OVERSAMPLING
        if size >= min(x.shape[-2:]):
            return apply(self, True, x, t)
        x = _nan_unless_finite(x)
        start = jax.random.normal(jax.random.key(0), (x.shape[-1], size), x.dtype)
        q = jnp.linalg.qr(matmul(x, jnp.broadcast_to(start, (*x.shape[:-2], *start.shape))))[0]
        for _ in range(SUBSPACE_ROUNDS):
            q = jnp.linalg.qr(matmul(mT(x), q))[0]
            q = jnp.linalg.qr(matmul(x, q))[0]
        small = matmul(mT(q), x)
        result = matmul(q, apply(self, True, small, t))
        left = jnp.max(jnp.abs(x - result), axis=(-2, -1), keepdims=True)
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
        return jnp.where(left <= 8 * jnp.finfo(x.dtype).eps * largest, x, result)


class _Polar(Spectral):
    def at(self, s: jax.Array, t: jax.Array) -> Values:
        ones, zeros = jnp.ones_like(s), jnp.zeros_like(s)
        near = jnp.all(jnp.abs(s - 1) <= 8 * jnp.finfo(s.dtype).eps, axis=-1)
        return Values(ones, ones, zeros, zeros, zeros, near)

    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        near = gram_error(x) <= 8 * jnp.finfo(x.dtype).eps
        return jnp.where(_matrix(near), x, newton_schulz(x))


class _Sign(Spectral):
    """1 for the singular values that are not 0 up to rounding."""

    def at(self, s: jax.Array, t: jax.Array) -> Values:
        f, zeros = _ones(s > s.shape[-1] * _rounding(s), s), jnp.zeros_like(s)
        return Values(jnp.where(jnp.isnan(s), s, f), f, zeros, zeros, zeros, s[..., 0] < 0)

    def by_products(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return newton_schulz(x)


SOFT_THRESHOLD, CLIP, POLAR, _SIGN = _SoftThreshold(), Clip(), _Polar(), _Sign()
OVERSAMPLING, SUBSPACE_ROUNDS = 8, 4


def sign(exact: bool, x: jax.Array) -> jax.Array:
    return apply(_SIGN, exact, x, jnp.zeros((), x.dtype))


# Matrix products -------------------------------------------------------------------------------


def _soft_threshold(x: jax.Array, t: jax.Array, steps: int | None = None) -> jax.Array:
    # X = Q H with H = V diag(s) V^T, so the result is Q (H - t I)_+, by the sign of H - t I.
    tall = x if x.shape[-2] >= x.shape[-1] else mT(x)
    q = newton_schulz(tall, steps)
    h = matmul(mT(q), tall)
    shifted = (h + mT(h)) / 2 - t * _identity(h)
    magnitude = matmul(newton_schulz(shifted, steps), shifted)
    excess = (shifted + (magnitude + mT(magnitude)) / 2) / 2
    result = matmul(q, excess)
    result = result if tall is x else mT(result)
    return jnp.where(t == 0, x, jnp.where(_matrix(norm_bound(x)) <= t, 0 * x, result))


def newton_schulz(x: jax.Array, steps: int | None = None) -> jax.Array:
    r"""The polar factor $U V^T$ of X; for a symmetric X, its matrix sign.

    The iteration $X \leftarrow \frac32 \rho X - \frac12 \rho^3 X X^T X$ with a scaling $\rho \ge 1$
    that takes singular values from $[l, 1]$ to the shortest such interval, for l from the rounding
    error to 1: 21 steps in float32, 43 in float64. Singular values below the rounding error times
    `norm_bound` do not reach 1, and 0 stays 0. A number of `steps` is for the widest l that it
    takes to 1 - 1e-6: 1.3e-3 for 10, 2e-4 for 12. Source: J. Chen and E. Chow, *A stable scaling
    of Newton-Schulz for improving the sign function computation of a Hermitian matrix*,
    Argonne National Laboratory, ANL/MCS-P5059-0114, 2014.
    """
    bound = _matrix(norm_bound(x))
    tall = x.shape[-2] >= x.shape[-1]

    def step(y: jax.Array, rho: jax.Array) -> tuple[jax.Array, None]:
        cube = matmul(y, matmul(mT(y), y)) if tall else matmul(matmul(y, mT(y)), y)
        return 1.5 * rho * y - 0.5 * rho**3 * cube, None

    eps = float(jnp.finfo(x.dtype).eps)
    scalings = _scalings(eps) if steps is None else _few_scalings(steps)
    start = x / jnp.where(bound > 0, bound, 1)
    return jax.lax.scan(step, start, jnp.asarray(scalings, x.dtype))[0]


def _scalings(lower: float) -> np.ndarray:
    """The scaling of each step from the interval [lower, 1] until it is 1 up to rounding."""
    tolerance, scalings = lower**0.5 / 8, []
    while 1 - lower > tolerance:
        rho, lower = _scaled(lower)
        scalings.append(rho)
    return np.array([*scalings, 1.0])


@functools.cache
def _few_scalings(steps: int) -> np.ndarray:
    """The scalings of the widest interval that so many steps take to 1 up to 1e-6."""
    low, high, target = 1e-16, 0.999, 1 - 1e-6
    for _ in range(60):
        lower = start = (low * high) ** 0.5
        for _ in range(steps):
            _, lower = _scaled(lower)
        low, high = (low, start) if lower > target else (start, high)
    scalings, lower = [], high
    for _ in range(steps):
        rho, lower = _scaled(lower)
        scalings.append(rho)
    return np.array(scalings)


def _scaled(lower: float) -> tuple[float, float]:
    """The scaling of a step from the interval [lower, 1], and the lower end after it."""
    # The cap keeps a singular value that rounding puts above 1 from changing its sign.
    rho = min(1.697, (3 / (1 + lower + lower**2)) ** 0.5)
    return rho, 0.5 * rho * lower * (3 - (rho * lower) ** 2)


def norm_bound(x: jax.Array) -> jax.Array:
    """An upper bound on the largest singular value, at most (rows * columns)^(1/4) times it."""
    magnitude = jnp.abs(x)
    by_row = jnp.max(jnp.sum(magnitude, axis=-1), axis=-1)
    by_column = jnp.max(jnp.sum(magnitude, axis=-2), axis=-1)
    return jnp.sqrt(by_row) * jnp.sqrt(by_column)


def gram_error(x: jax.Array) -> jax.Array:
    """How far the columns, or the rows of a wide matrix, are from orthonormal."""
    tall = x.shape[-2] >= x.shape[-1]
    gram = matmul(mT(x), x) if tall else matmul(x, mT(x))
    return jnp.max(jnp.abs(gram - _identity(gram)), axis=(-2, -1))


# Small pieces ----------------------------------------------------------------------------------


def mT(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def _identity(square: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(square.shape[-1], dtype=square.dtype), square.shape)


def _assemble(x: jax.Array, u: jax.Array, vh: jax.Array, values: Values) -> jax.Array:
    # Elementwise in x, so that the result is sharded as x is.
    near = _matrix(values.near)
    moved = matmul(u * _columns(jnp.where(near[..., 0], -values.drop, values.f)), vh)
    return jnp.where(near, x + moved, moved)


def _rows(s: jax.Array) -> jax.Array:
    return s[..., :, None]


def _columns(s: jax.Array) -> jax.Array:
    return s[..., None, :]


def _matrix(figures: jax.Array) -> jax.Array:
    return figures[..., None, None]


def _ones(where: jax.Array, s: jax.Array) -> jax.Array:
    return where.astype(s.dtype)


def _rounding(s: jax.Array) -> jax.Array:
    return 4 * jnp.finfo(s.dtype).eps * s[..., :1]


def _quotient(above: jax.Array, below: jax.Array, noise: jax.Array, limit: jax.Array) -> jax.Array:
    """The ratio above / below, and the limit where below is 0 up to rounding."""
    small = jnp.abs(below) <= noise
    return jnp.where(small, limit, above / jnp.where(small, 1, below))


def _nan_unless_finite(x: jax.Array) -> jax.Array:
    # LAPACK gives finite numbers for some matrices that hold infinities.
    finite = jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, x, jnp.nan)
