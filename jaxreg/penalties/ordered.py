r"""The sorted L1 norm (SLOPE), and the isotonic regression that its prox is made of.

Isotonic regression by divide and conquer. Its solution holds the slopes of the least concave
majorant of the partial sums, so two solved halves are merged by the common tangent of their
majorants: it pools the end of the left half and the start of the right one at the tangent's slope
m, and leaves the rest. Both halves are monotone, so the fit of the whole is $\max(left, m)$
followed by $\min(right, m)$. All merges of one width run side by side and find their tangents by
one bisection. The work is O(n log n) whatever the input.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check
from jaxreg.penalties.base import Penalty, number, penalty, static
from jaxreg.penalties.separable import ratio

Number = float | jax.Array


def isotonic(y: jax.Array) -> jax.Array:
    r"""The nearest nonincreasing sequence, $\arg\min_{w_1 \ge \dots \ge w_n} \|w - y\|_2$.

    It is constant on blocks, where it is the mean of y; its derivative replaces a tangent by its
    means over the blocks. It runs without host callbacks in time O(n log n) for any input, most
    efficiently where n is a power of two or just below it. Where y is nonincreasing already, the
    result is y itself.

    Sources: R. Barlow et al., *Statistical Inference under Order Restrictions*, Wiley, 1972,
    section 1.2; the bisection for a common tangent: M. Overmars and J. van Leeuwen, *Maintenance
    of configurations in the plane*, JCSS 23(2), 1981.

    Args:
        y: an array of dtype float32 or float64, fitted along its last axis.

    Returns:
        An array of y's shape and dtype, nonincreasing along the last axis without rounding.

    >>> isotonic(jnp.array([4.0, 1.0, 3.0, 2.0, 0.0])).tolist()
    [4.0, 2.0, 2.0, 2.0, 0.0]
    """
    return _fit(y)[0]


@jax.custom_jvp
@jax.jit  # else its loops would be compiled anew in each call outside a program
def _fit(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The fit, and for each entry an integer that names its block."""
    n = y.shape[-1]
    if n == 0:
        return y, jnp.zeros(y.shape, jnp.int32)
    # What fills up the last axis is below every entry, so that it is pooled with none.
    low, high = jnp.min(y, -1, keepdims=True), jnp.max(y, -1, keepdims=True)
    padding = jnp.broadcast_to(2 * low - high - jnp.abs(low), (*y.shape[:-1], _width(n) - n))
    fit = jnp.concatenate([y, padding], -1)
    block = jnp.arange(fit.size, dtype=jnp.int32).reshape(fit.shape)
    h = 1
    while h < _width(n):
        halves = fit.reshape(-1, 2, h)
        left, right = halves[:, 0], halves[:, 1]
        violated = left[:, -1:] < right[:, :1]
        # From the left half's end, what is pooled is no farther than the size of the violation:
        # sums of the differences lose no digits to what the entries have in common.
        end = left[:, -1:]
        rise = _tangent(jnp.stack([end - left[:, ::-1], right - end]))[:, None]
        slope = end + jnp.where(violated, rise, 0)
        merged = jnp.concatenate([jnp.maximum(left, slope), jnp.minimum(right, slope)], 1)
        # Two halves are merged at one place only, so that place names the block.
        place = fit.size + h + 2 * h * jnp.arange(len(left), dtype=jnp.int32)[:, None]
        block = jnp.where(violated & (merged == slope), place, block.reshape(-1, 2 * h))
        fit, h = merged.reshape(fit.shape), 2 * h
    return fit[..., :n], block.reshape(fit.shape)[..., :n]


def _tangent(x: jax.Array) -> jax.Array:
    """The slope m of the common tangent, for pairs of halves of which some entries are pooled.

    Args:
        x: (2, pairs, h), the halves counted from where they meet: minus the left one reversed,
            and the right one. So both are nonincreasing, and a prefix of each is pooled: the
            entries >= -m of the first and those >= m of the second.

    Returns:
        An array of shape (pairs,).
    """
    _, pairs, h = x.shape
    side = jnp.array([[-1], [1]], x.dtype)
    first = h * jnp.arange(2 * pairs, dtype=jnp.int32).reshape(2, pairs)
    flat = x.ravel(), jax.lax.cumsum(x, 2).ravel()

    def pooled_to(j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """If entries up to j are pooled: the last of them, their excess over it, the mean."""
        value, total = (t.at[first + j].get(mode="promise_in_bounds") for t in flat)
        count = (j + 1).astype(x.dtype)
        mean = (total[1] - total[0]) / (count[1] + count[0])
        return value, total - value * count, mean[None]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        j = (low + high + 1) // 2
        value, excess, mean = pooled_to(j)
        undecided = low < high
        pooled = undecided & (value >= side * mean)
        # Where neither entry is at the mean, the lines through both points, with the slopes of
        # the majorants there, meet on one side of the middle: the tangent does not reach the
        # point on the other side. The excess is a line's height over the majorant at the middle.
        excess = jnp.where(undecided, excess, -jnp.inf)
        left = excess[:1] >= excess[1:]
        beyond = undecided & ~jnp.any(pooled, 0)[None] & jnp.concatenate([left, ~left])
        return jnp.where(pooled, j, low), jnp.where(beyond, j - 1, high)

    # Every round halves the interval of one side at least.
    low = jnp.zeros((2, pairs), jnp.int32)
    rounds = 2 * (h.bit_length() - 1)
    low, _ = jax.lax.fori_loop(0, rounds, halve, (low, jnp.full_like(low, h - 1)))
    return pooled_to(low)[2][0]


@_fit.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    fit, block = _fit(*primals)
    no_tangent = np.zeros(block.shape, jax.dtypes.float0)
    return (fit, block), (_block_means(tangents[0], block), no_tangent)


@jax.jit
def _block_means(t: jax.Array, block: jax.Array) -> jax.Array:
    """Each entry replaced by the mean over its block."""

    def means(t: jax.Array) -> jax.Array:
        return _block_sums(t, block) / _block_sums(jnp.ones_like(t), block)

    # An orthogonal projection is its own transpose, which is as fast and as accurate as itself;
    # the transpose of its steps is neither. This is how JAX is told so.
    return jax.lax.custom_linear_solve(lambda b: b, t, lambda _, b: means(b), symmetric=True)


def _block_sums(t: jax.Array, block: jax.Array) -> jax.Array:
    """Each entry replaced by the sum over its block, in a tree of additions: no digits are lost."""
    n = t.shape[-1]
    padding = [(0, 0)] * (t.ndim - 1) + [(0, _width(n) - n)]
    sums, names = jnp.pad(t, padding), jnp.pad(block, padding, constant_values=-1)
    h = 1
    while h < _width(n):
        sums, names = sums.reshape(-1, 2, h), names.reshape(-1, 2, h)
        name = names[:, :1, -1:]
        across = (name == names[:, 1:, :1]) & (names == name)
        sums = jnp.where(across, sums[:, :1, -1:] + sums[:, 1:, :1], sums)
        h *= 2
    return sums.reshape(*t.shape[:-1], _width(n))[..., :n]


def _width(n: int) -> int:
    """The smallest power of two that is >= n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _nonincreasing(name: str, value: object) -> object:
    if value is None:
        return None
    array = _check.nonnegative_array(name, value)
    if _check.is_concrete(array):
        numbers = np.asarray(array).astype(np.float64).ravel()
        rises = np.flatnonzero(np.diff(numbers) > 0)
        if rises.size:
            given = f"an array that goes from {numbers[rises[0]]} to {numbers[rises[0] + 1]}"
            raise _check.ArgumentError(name, given, "numbers that do not increase, or None")
    return array


def _level(name: str, value: object) -> float:
    accepted = "a number in (0, 1) that is not traced"
    level = _check.scalar(name, value, accepted, lambda v: 0 < v < 1)
    if not isinstance(level, float):
        raise _check.ArgumentError(name, _check.describe(level), accepted)
    return level


@penalty
class SortedL1(Penalty):
    r"""The sorted L1 norm (SLOPE), $R(x) = s \sum_i \lambda_i |x|_{(i)}$: zeros and equal sizes.

    $|x|_{(1)} \ge |x|_{(2)} \ge \dots$ are the absolute values of the whole array in order, and
    $\lambda_1 \ge \lambda_2 \ge \dots \ge 0$ its weights: the largest entries are penalized most,
    and entries of similar size are pulled to one size. Equal weights give the L1 norm, weights (1,
    0, ..., 0) the maximum norm, and linear ones OSCAR.

    Its prox sorts the absolute values, subtracts $step \cdot s \lambda$, projects on the
    nonincreasing sequences (`isotonic`), clips at 0, and undoes the sort. A sharded array is
    gathered for the sort (an all-gather and two small collectives); the result has its sharding.

    The default weights are those of Benjamini and Hochberg, $\Phi^{-1}(1 - i q / (2 p))$ for p
    coordinates, divided by the first, so that s is the largest threshold: for an orthogonal design
    with noise of deviation $\sigma$, $s = \sigma \Phi^{-1}(1 - q / (2 p))$ keeps the expected
    share of false discoveries at q or below.

    Source: M. Bogdan, E. van den Berg, C. Sabatti, W. Su and E. Candès, *SLOPE: adaptive variable
    selection via convex optimization*, Annals of Applied Statistics 9(3), 2015.

    Args:
        strength: s, a number >= 0, or a traced scalar.
        weights: $\lambda$, an array of x's size whose numbers, in C order, are >= 0 and do not
            increase (not checked where they are traced); or None for the default ones.
        q: level of the default weights, a number in (0, 1), part of the structure; without a
            meaning where weights are given.

    Raises:
        ValueError: where the strength is negative, infinite, NaN or no scalar; the weights
            increase, are negative, infinite or NaN, or have another size than x; or q is not in
            (0, 1).

    >>> import jax.numpy as jnp, jaxreg
    >>> slope = jaxreg.SortedL1(1.0, jnp.array([2.0, 1.0, 0.5]))
    >>> slope.prox(jnp.array([0.25, -5.0, 4.5]), step=1.0).tolist()
    [0.0, -3.25, 3.25]
    >>> float(slope.value(jnp.array([0.0, -3.0, 1.0])))
    7.0
    """

    convex, sparse = True, True

    strength: Number
    weights: jax.Array | None = number(_nonincreasing, default=None)
    q: float = static(_level, kw_only=True, default=0.1)

    def _weights(self, x: jax.Array) -> jax.Array:
        if self.weights is None:
            # From the tail: 1 - i q / (2 p) would round to 1.
            tail = jnp.arange(1, x.size + 1, dtype=x.dtype) * (self.q / (2 * max(x.size, 1)))
            quantiles = jax.scipy.special.ndtri(tail)
            return quantiles / quantiles[:1]
        if self.weights.size != x.size:
            accepted = f"an array of size {x.size}, one number for each coordinate of x"
            raise _check.ArgumentError("weights", _check.describe(self.weights), accepted)
        return self.weights.ravel()

    def _value(self, x: jax.Array) -> jax.Array:
        return self.strength * jnp.sum(self._weights(x) * _sorted(jnp.abs(x)))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        # Not jnp.sign, whose 0 would make the derivative at 0 vanish at strength 0 too.
        sign = jnp.where(x < 0, -jnp.ones_like(x), jnp.ones_like(x))
        size = (sign * x).ravel()
        order = _descending(size)
        shrunk = isotonic(size[order] - step * self.strength * self._weights(x))
        kept = jnp.where(shrunk < 0, 0, shrunk)  # not jnp.maximum, whose derivative at 0 is 1/2
        result = jnp.zeros_like(size).at[order].set(kept, unique_indices=True)
        return sign * result.reshape(x.shape)

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        # The dual norm: partial sums of the gradient over those of the weights.
        bounds = jnp.cumsum(self.strength * self._weights(grad))
        return jnp.max(ratio(jnp.cumsum(_sorted(jnp.abs(grad))), bounds), initial=0)


def _descending(x: jax.Array) -> jax.Array:
    """The order that sorts a vector; its derivative is 0, and that of the sort is a gather."""
    return jnp.argsort(jax.lax.stop_gradient(x), descending=True)


def _sorted(x: jax.Array) -> jax.Array:
    x = x.ravel()
    return x[_descending(x)]
