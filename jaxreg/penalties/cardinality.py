r"""Constraints on how many coordinates are not zero; none is convex.

In the metric of an elementwise step the coordinates that matter most are those with the largest
$x_i^2 / step_i$.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxreg import _check
from jaxreg.penalties.base import penalty, static
from jaxreg.penalties.constraints import Constraint

Array = jax.Array


def _count(name: str, value: Any) -> int:
    return _check.whole_number(name, value, at_least=0)


def _positive_count(name: str, value: Any) -> int:
    return _check.whole_number(name, value, at_least=1)


@penalty
class TopK(Constraint):
    r"""At most k nonzero coordinates in the whole array.

    Its prox keeps the k largest $|x_i|$, of equal ones the first, and zeros the rest. The k-th
    largest is found bit by bit, by counting: each pass over the array is one all-reduce of a number
    under sharding; only equal numbers at the border need more, an order over the devices. Source:
    T. Blumensath and M. Davies, *Iterative hard thresholding for compressed sensing*, Applied and
    Computational Harmonic Analysis 27(3), 2009.

    Args:
        k: a whole number >= 0; where it is larger than x, all of x is kept.

    Raises:
        ValueError: where k is negative or no whole number.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.TopK(2).prox(jnp.array([0.5, -2.0, 1.0, 1.0])).tolist()
    [0.0, -2.0, 1.0, 0.0]
    """

    convex, sparse, elementwise_step = False, True, True

    k: int = static(_count)

    def _contains(self, x: Array) -> Array:
        return jnp.sum(x != 0) <= self.k

    def _project(self, x: Array, step: Array) -> Array:
        if self.k >= x.size:
            return x
        size = jax.lax.stop_gradient(_importance(x, step))
        return jnp.where(largest([size], self.k)[0], x, 0)


@penalty
class NM(Constraint):
    r"""n:m sparsity: at most n nonzero coordinates in each block of m along an axis, such as 2:4.

    Its prox keeps the n largest $|x_i|$ of each block, of equal ones the first. Source: A. Zhou et
    al., *Learning N:M fine-grained structured sparse neural networks from scratch*, ICLR 2021.

    Args:
        n: a whole number from 0 to m.
        m: a whole number >= 1, a divisor of the axis' length.
        axis: along which the blocks lie; by default the input axis of a Flax kernel.

    Raises:
        ValueError: where n > m, m does not divide the axis, or x has no such axis.

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.NM(2, 4, axis=0).prox(jnp.array([0.5, -2.0, 1.0, 1.0])).tolist()
    [0.0, -2.0, 1.0, 0.0]
    """

    convex, sparse, elementwise_step = False, True, True

    n: int = static(_count)
    m: int = static(_positive_count)
    axis: int = static(_check.integer, default=-2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > self.m:
            raise _check.ArgumentError("n", repr(self.n), f"a whole number <= m = {self.m}")

    def blocks(self, x: Array) -> tuple[Array, int]:
        """The array with the axis split into blocks of m, and where their own axis is."""
        axis = _check.axis("axis", self.axis, x)
        if x.shape[axis] % self.m:
            accepted = f"a divisor of {x.shape[axis]}, the length of axis {self.axis}"
            raise _check.ArgumentError("m", repr(self.m), accepted)
        shape = (*x.shape[:axis], x.shape[axis] // self.m, self.m, *x.shape[axis + 1 :])
        return x.reshape(shape), axis + 1

    def _contains(self, x: Array) -> Array:
        blocks, axis = self.blocks(x)
        return jnp.sum(blocks != 0, axis) <= self.n

    def _project(self, x: Array, step: Array) -> Array:
        size, axis = self.blocks(jax.lax.stop_gradient(_importance(x, step)))
        return jnp.where((ranks(size, axis) < self.n).reshape(x.shape), x, 0)


def ranks(size: Array, axis: int) -> Array:
    """The place of each number among those along the axis, 0 for the largest."""
    length = size.shape[axis]
    position = jnp.arange(length).reshape([-1 if i == axis else 1 for i in range(size.ndim)])
    rank = jnp.zeros(size.shape, jnp.int32)
    for j in range(length):
        other = jax.lax.slice_in_dim(size, j, j + 1, axis=axis)
        rank += ((other > size) | ((other == size) & (j < position))).astype(jnp.int32)
    return rank


def _importance(x: Array, step: Array) -> Array:
    r"""What zeroing a coordinate costs, up to monotone maps: $|x| / \sqrt{step}$."""
    return jnp.abs(x) if step.ndim == 0 else jnp.abs(x) / jnp.sqrt(step)


def largest(sizes: Sequence[Array], k: int | Array) -> list[Array]:
    """Which k numbers >= 0 of all the arrays are the largest, of equal ones the first.

    The bits of floats >= 0, read as integers, have the order of the floats. A threshold is built
    from its highest bit down: the largest integer that at least k numbers reach, or an earlier one
    that exactly k do.

    Args:
        sizes: arrays of any shapes and one dtype.
        k: a whole number, which may be traced.
    """
    unsigned, bits = (jnp.uint64, 63) if sizes[0].dtype == jnp.float64 else (jnp.uint32, 31)
    keys = [jax.lax.bitcast_convert_type(size, unsigned) for size in sizes]

    def reaching(threshold: Array) -> Array:
        return _counted([key >= threshold for key in keys])

    def undecided(state: tuple[Array, Array, Array]) -> Array:
        bit, _, reached = state
        return (bit > 0) & (reached != k)

    def next_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, threshold, reached = state
        higher = threshold | bit
        count = reaching(higher)
        return bit >> 1, *jax.tree.map(
            lambda new, old: jnp.where(count >= k, new, old), (higher, count), (threshold, reached)
        )

    highest = jnp.asarray(1 << (bits - 1), unsigned)
    everything = jnp.asarray(sum(size.size for size in sizes), jnp.int32)
    start = (highest, jnp.zeros((), unsigned), everything)
    _, threshold, reached = jax.lax.while_loop(undecided, next_bit, start)

    def first_of_equal() -> list[Array]:
        wanted = k - _counted([key > threshold for key in keys])
        chosen = []
        for key in keys:
            equal = key == threshold
            order = jnp.cumsum(_whole(equal).ravel(), dtype=jnp.int32).reshape(key.shape)
            chosen.append((key > threshold) | (equal & (order <= wanted)))
            wanted = wanted - _counted([equal])
        return chosen

    return jax.lax.cond(reached == k, lambda: [key >= threshold for key in keys], first_of_equal)


def _whole(x: Array) -> Array:
    """The array on every device, where shardings are explicit: no sum runs along a sharded axis."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _counted(chosen: Sequence[Array]) -> Array:
    return sum((jnp.sum(part, dtype=jnp.int32) for part in chosen), jnp.zeros((), jnp.int32))
