r"""Penalties on coordinates that are not convex: sparse with little or no bias on large weights.

Where a penalty is more concave than $w^2 / (2 \, step)$ is convex, the objective of the prox has
several local minima and the prox jumps. Each prox here is the global minimizer for every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg._roots import above_cube_root
from jaxreg.penalties.base import number, penalty
from jaxreg.penalties.separable import Separable, slope_distance, soft_threshold

Number = float | jax.Array


@penalty
class L0(Separable):
    r"""The number of nonzero coordinates, $R(x) = s \, \#\{i: x_i \ne 0\}$.

    Its prox is the hard threshold: x where $|x| > \sqrt{2 \, step \cdot s}$, else 0. Source: T.
    Blumensath and M. Davies, *Iterative thresholding for sparse approximations*, Journal of
    Fourier Analysis and Applications 14, 2008.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.L0(0.5).prox(jnp.array([-2.0, 0.75, 1.25]), step=1.0).tolist()
    [-2.0, 0.0, 1.25]
    """

    convex, sparse = False, True

    strength: Number

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum((x != 0).astype(x.dtype))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        pull = jax.lax.stop_gradient(2 * step * self.strength)
        return jnp.where((jnp.abs(x) > jnp.sqrt(pull)) | (pull == 0), x, 0)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.where((x == 0) & (self.strength > 0), 0, jnp.abs(grad))


@penalty
class LHalf(Separable):
    r"""The L1/2 penalty, $R(x) = s \sum_i |x_i|^{1/2}$.

    Its prox is 0 where $|x| \le \frac{3}{2} (step \cdot s)^{2/3}$; else $|x| v^2$ with the sign of
    x, where v is the largest root of $v^3 - v + step \cdot s / (2 |x|^{3/2}) = 0$. Source: Z. Xu,
    X. Chang, F. Xu and H. Zhang, *L1/2 regularization: a thresholding representation theory and a
    fast solver*, IEEE TNNLS 23(7), 2012.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> [f"{w:.3f}" for w in jaxreg.LHalf(1.0).prox(jnp.array([1.4, 10.0])).tolist()]
    ['0.000', '9.841']
    """

    convex, sparse = False, True

    strength: Number

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum(_power(jnp.abs(x), 0.5))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        pull, size = step * self.strength, jnp.abs(x)
        kept = size * jnp.sqrt(size) > 1.5**1.5 * pull
        safe = jnp.where(kept, size, 1)
        q = jnp.where(kept, pull / (2 * safe * jnp.sqrt(safe)), 0)
        shrunk = jnp.where(kept, x * jnp.square(_largest_root(q)), 0)
        return jnp.where(pull == 0, x, shrunk)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return _power_distance(x, grad, self.strength, 0.5)


@penalty
class LTwoThirds(Separable):
    r"""The L2/3 penalty, $R(x) = s \sum_i |x_i|^{2/3}$.

    Its prox is 0 where $|x| \le 2 (\frac{2}{3} step \cdot s)^{3/4}$; else $u^3$ with the sign of
    x, where u is the largest root of $u^4 - |x| u + \frac{2}{3} step \cdot s = 0$.
    Source: W. Cao, J. Sun and Z. Xu, *Fast image deconvolution using closed-form thresholding
    formulas of Lq (q = 1/2, 2/3) regularization*, JVCIR 24(1), 2013.

    Args:
        strength: s, a number >= 0, or a traced scalar.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> print(jaxreg.LTwoThirds(1.0).prox(jnp.array([1.4, 10.0]), step=1.0).round(3))
    [0.    9.687]
    """

    convex, sparse = False, True

    strength: Number

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum(_power(jnp.abs(x), 2 / 3))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        pull, size = 2 * step * self.strength / 3, jnp.abs(x)
        # pull^(3/4) from roots, which cost less than a power.
        root = jnp.sqrt(_positive(pull))
        kept = size > jnp.where(pull > 0, 2 * root * jnp.sqrt(root), 0)
        # Newton's method for u / c, from c just above the cube root of |x|, where the polynomial
        # is >= 0.
        z = jnp.where(kept, size, 1)
        c = jax.lax.stop_gradient(above_cube_root(z))
        z, q = z / c / c / c, jnp.where(kept, pull, 0) / (c * c) / (c * c)
        v = jnp.ones_like(z)
        for _ in range(6 if x.dtype == jnp.float64 else 5):
            cube = v**3
            v = (3 * cube * v - q) / (4 * cube - z)
        return jnp.where(pull == 0, x, jnp.where(kept, jnp.sign(x) * (c * v) ** 3, 0))

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return _power_distance(x, grad, self.strength, 2 / 3)


@penalty
class MCP(Separable):
    r"""The minimax concave penalty, $R(x) = \sum_i r(|x_i|)$: L1 near 0, constant far from it.

    $r(u) = s u - u^2 / (2 \gamma)$ where $u \le \gamma s$, else $\gamma s^2 / 2$. For a step below
    gamma the prox is the firm threshold: 0 up to $step \cdot s$, $(|x| - step \cdot s) / (1 - step
    / \gamma)$ up to $\gamma s$, then x. For larger steps it is x where $|x| > s \sqrt{step \cdot
    \gamma}$, else 0. Source: C.-H. Zhang, *Nearly unbiased variable selection under minimax
    concave penalty*, Annals of Statistics 38(2), 2010.

    Under Adam the step may reach lr / eps: see `jaxreg.prox_adam`.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        gamma: how slowly the slope falls off, a number > 0, or a traced scalar.

    Raises:
        ValueError: where a number is out of its range, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.MCP(1.0, gamma=2.0).prox(jnp.array([0.5, 1.75, 4.0]), step=1.0).tolist()
    [0.0, 1.5, 4.0]
    """

    convex, sparse, scales = False, True, None

    strength: Number
    gamma: Number = number(_check.positive_finite, default=3.0)

    def _value(self, x: jax.Array) -> jax.Array:
        return jnp.sum(mcp.value(jnp.abs(x), self.strength, self.gamma))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return mcp.prox(x, step, self.strength, self.gamma)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        slope = mcp.slope(jnp.abs(x), self.strength, self.gamma)
        return slope_distance(x, grad, slope)


@penalty
class SCAD(Separable):
    r"""The smoothly clipped absolute deviation, $R(x) = \sum_i r(|x_i|)$.

    $r(u) = s u$ where $u \le s$; $(2 a s u - u^2 - s^2) / (2 (a - 1))$ up to $a s$; then $s^2 (a +
    1) / 2$. For a step below a - 1 the prox is the soft threshold where $|x| \le (1 + step) s$;
    $((a - 1) |x| - step \cdot a s) / (a - 1 - step)$ up to $a s$; then x. For larger steps it
    jumps from the soft threshold to x where the two have the same objective: at $|x| = (a + 1 +
    step) s / 2$, or where that is below $step \cdot s$, at $s \sqrt{step (a + 1)}$. Source: J. Fan
    and R. Li, *Variable selection via nonconcave penalized likelihood and its oracle properties*,
    JASA 96(456), 2001.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        a: where the penalty becomes constant, in units of s: a number > 1, or a traced scalar.

    Raises:
        ValueError: where a number is out of its range, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.SCAD(1.0, a=3.0).prox(jnp.array([0.5, 1.5, 2.5, 4.0]), step=1.0).tolist()
    [0.0, 0.5, 2.0, 4.0]
    """

    convex, sparse, scales = False, True, None

    strength: Number
    a: Number = number(_check.above_one, default=3.7)

    def _value(self, x: jax.Array) -> jax.Array:
        return jnp.sum(scad.value(jnp.abs(x), self.strength, self.a))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return scad.prox(x, step, self.strength, self.a)

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return slope_distance(x, grad, scad.slope(jnp.abs(x), self.strength, self.a))


@penalty
class LogSum(Separable):
    r"""The log-sum penalty, $R(x) = s \sum_i \log(1 + |x_i| / \epsilon)$.

    Its prox is 0 or $\frac{1}{2} (|x| - \epsilon + \sqrt{(|x| + \epsilon)^2 - 4 \, step \cdot s})$
    with the sign of x, whichever has the smaller objective. Source: E. Candes, M. Wakin and S.
    Boyd, *Enhancing sparsity by reweighted l1 minimization*, Journal of Fourier Analysis and
    Applications 14, 2008.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        epsilon: the size of a coordinate that counts as large, a number > 0, or a traced scalar.

    Raises:
        ValueError: where a number is out of its range, NaN or no scalar.

    >>> import jax.numpy as jnp, jaxreg
    >>> print(jaxreg.LogSum(1.0, epsilon=1.0).prox(jnp.array([0.5, 3.0]), step=1.0).round(3))
    [0.    2.732]
    """

    convex, sparse = False, True

    strength: Number
    epsilon: Number = number(_check.positive_finite, default=1.0)

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum(jnp.log1p(jnp.abs(x) / self.epsilon))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        pull, size, epsilon = step * self.strength, jnp.abs(x), self.epsilon
        # The stationary points solve w^2 + (eps - |x|) w + (pull - |x| eps) = 0.
        # Its discriminant is (|x| + eps)^2 - 4 pull, taken apart so that no square overflows.
        root_pull = jnp.where(pull > 0, 2 * jnp.sqrt(_positive(pull)), 0)
        real = size + epsilon > root_pull
        low, high = (jnp.where(real, size + epsilon + s * root_pull, 1) for s in (-1, 1))
        root = jnp.where(real, jnp.sqrt(low) * jnp.sqrt(high), 0)
        half = size - epsilon
        # The second form is the first one without cancellation.
        below = 2 * (size * epsilon - pull) / jnp.where(half < 0, root - half, 1)
        w = jnp.maximum(jnp.where(half < 0, below, (half + root) / 2), 0)
        # Up to pull = eps^2 the objective is convex and its stationary point the minimizer. The
        # gain is step (objective(w) - objective(0)).
        gain = pull * jnp.log1p(w / epsilon) + w * (w / 2 - size)
        best = real & ((pull <= jnp.square(epsilon)) | (gain < 0))
        return jnp.where(pull == 0, x, jnp.where(best, jnp.sign(x) * w, 0))

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return slope_distance(x, grad, self.strength / (self.epsilon + jnp.abs(x)))


class Concave(NamedTuple):
    """A function r(u) of sizes u >= 0 with a strength and one parameter of its shape."""

    value: Callable[[jax.Array, Number, Number], jax.Array]
    slope: Callable[[jax.Array, Number, Number], jax.Array]
    # Of x, step, strength and shape: the global minimizer w of r(|w|) + (w - x)^2 / (2 step).
    prox: Callable[[jax.Array, jax.Array, Number, Number], jax.Array]


def _mcp_value(u: jax.Array, s: Number, gamma: Number) -> jax.Array:
    near = jnp.minimum(u, gamma * s)
    return near * (s - near / (2 * gamma))


def _mcp_slope(u: jax.Array, s: Number, gamma: Number) -> jax.Array:
    return jnp.maximum(s - u / gamma, 0)


def _mcp_prox(x: jax.Array, step: jax.Array, s: Number, gamma: Number) -> jax.Array:
    convex = step < gamma
    shrunk = soft_threshold(x, step * s) / jnp.where(convex, 1 - step / gamma, 1)
    firm = jnp.where(jnp.abs(x) <= gamma * s, shrunk, x)
    hard = jnp.where(jnp.abs(x) > s * jnp.sqrt(jax.lax.stop_gradient(step * gamma)), x, 0)
    return jnp.where(convex, firm, hard)


def _scad_value(u: jax.Array, s: Number, a: Number) -> jax.Array:
    middle = jnp.clip(u - s, 0, (a - 1) * s)
    return s * jnp.minimum(u, s) + middle * (s - middle / (2 * (a - 1)))


def _scad_slope(u: jax.Array, s: Number, a: Number) -> jax.Array:
    return jnp.clip((a * s - u) / (a - 1), 0, s)


def _scad_prox(x: jax.Array, step: jax.Array, s: Number, a: Number) -> jax.Array:
    size, soft = jnp.abs(x), soft_threshold(x, step * s)
    convex = step < a - 1
    # Written from the soft threshold, so that step 0 is the identity.
    slack = jnp.where(convex, a - 1 - step, 1)
    middle = soft_threshold(x, step * a * s / (a - 1)) * ((a - 1) / slack)
    smooth = jnp.where(size <= (1 + step) * s, soft, jnp.where(size <= a * s, middle, x))
    root = jnp.sqrt(jnp.where(convex, 1, step) * (a + 1))
    jump = s * jnp.where(step <= a + 1, (a + 1 + step) / 2, root)
    return jnp.where(convex, smooth, jnp.where(size > jump, x, soft))


mcp = Concave(_mcp_value, _mcp_slope, _mcp_prox)
scad = Concave(_scad_value, _scad_slope, _scad_prox)


def _largest_root(q: jax.Array) -> jax.Array:
    """The largest root of v^3 - v + q = 0, for q up to where the prox of `LHalf` jumps.

    Newton's method from 1, where the polynomial is q >= 0: it is convex, so the iterates fall to
    the root, and stay away from the double root. Each step squares the error, .18 at the start.
    """
    v = jnp.ones_like(q)
    for _ in range(5 if q.dtype == jnp.float64 else 4):
        square = jnp.square(v)
        v = (2 * square * v - q) / (3 * square - 1)
    return v


def _power(u: jax.Array, exponent: float) -> jax.Array:
    """u^exponent for u >= 0, with derivative 0 at 0, where it has none."""
    positive = u > 0
    return jnp.where(positive, jnp.where(positive, u, 1) ** exponent, 0)


def _positive(u: jax.Array) -> jax.Array:
    return jnp.where(u > 0, u, 1)


def _power_distance(x: jax.Array, grad: jax.Array, s: Number, exponent: float) -> jax.Array:
    """`subdiff_distance` of s |x|^exponent: every number is a subgradient at 0, unless s is 0."""
    slope = s * exponent * _positive(jnp.abs(x)) ** (exponent - 1)
    return jnp.where((x == 0) & (s > 0), 0, jnp.abs(grad + slope * jnp.sign(x)))
