r"""Groups: which coordinates of an array belong together.

A group penalty or constraint acts on each group as a whole, for instance on the incoming weights
of one neuron. The groups are disjoint and cover the array::

    groups.units            the incoming weights of each output unit: all axes but the last
    groups.axes(0, 2)       one group for each index of the other axes
    groups.blocks(-1, 64)   blocks of a regular grid; -1 is the whole axis
    groups.ids([0, 0, 1])   any groups: an integer for each coordinate, counting from 0
    groups.whole            the whole array is one group

Where groups are asked for, an integer or a tuple of them stands for `axes`, and a list or array of
integers for `ids`. Groups are values: two that are written alike are equal, and they are part of a
penalty's structure, not of its numbers.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check


class Grouping(abc.ABC):
    """Groups bound to an array's shape. Figures of groups keep a shape of their own."""

    sizes: np.ndarray
    """Coordinates of each group, in the shape of the groups' figures."""

    @abc.abstractmethod
    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of x over each group."""

    @abc.abstractmethod
    def max(self, x: jax.Array) -> jax.Array:
        """The largest of x >= 0 in each group, 0 for an empty one."""

    @abc.abstractmethod
    def spread(self, figures: jax.Array) -> jax.Array:
        """For each coordinate the figure of its group, in a shape that broadcasts with x's."""

    @abc.abstractmethod
    def scaled(self, x: jax.Array, figures: jax.Array) -> jax.Array:
        """The array x, times the figure of its group."""

    def norm(self, x: jax.Array) -> jax.Array:
        """The Euclidean norm of each group, with gradient 0 at 0.

        Right where squares overflow; numbers whose squares underflow count as 0 (see `direction`).
        """
        return norms([(self, x)])[0]

    def direction(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm of each group, and x over it (0 for a group of zeros), in the whole range."""
        peak = jax.lax.stop_gradient(self.max(jnp.abs(x)))
        usable = (peak > 0) & (peak < jnp.inf)
        peak = jnp.where(usable, peak, 1)
        x = x / self.spread(peak)
        norm = _root(self.sum(jnp.square(x)))
        return peak * norm, x / self.spread(jnp.where(norm > 0, norm, 1))

    def figures(self, name: str, values: jax.Array) -> jax.Array:
        """A scalar, or an array of one number a group, in the shape of the groups' figures."""
        if values.ndim and values.size != self.sizes.size:
            accepted = f"a scalar, or an array of shape ({self.sizes.size},): one number a group"
            raise _check.ArgumentError(name, _check.describe(values), accepted)
        return values.reshape(self.sizes.shape) if values.ndim else values


def norms(arrays: Sequence[tuple[Grouping, jax.Array]]) -> list[jax.Array]:
    """The norm of each group of several arrays, as `Grouping.norm`, with one branch for all."""
    if not arrays:
        return []
    squares = [groups.sum(jnp.square(x)) for groups, x in arrays]
    in_range = jnp.stack([jnp.all(of_groups < jnp.inf) for of_groups in squares]).all()
    return jax.lax.cond(
        in_range,
        lambda: [*map(_root, squares)],
        lambda: [groups.direction(x)[0] for groups, x in arrays],
    )


def _root(squares: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


class Groups(abc.ABC):
    """A rule that groups the coordinates of an array."""

    @abc.abstractmethod
    def of(self, shape: tuple[int, ...]) -> Grouping:
        """The groups of an array of that shape."""


def as_groups(name: str, value: Any) -> Groups:
    """Groups as they are; an integer or a tuple of them as `axes`; an integer array as `ids`."""
    if isinstance(value, Groups):
        return value
    if _check.is_whole(value):
        return axes(value)
    if isinstance(value, tuple) and all(map(_check.is_whole, value)):
        return axes(*value)
    if isinstance(value, (list, np.ndarray, jax.Array)):
        return ids(value)
    accepted = "groups from jaxreg.groups, axes, or a list or array of integers (ids)"
    raise _check.ArgumentError(name, _check.describe(value), accepted)


class _Dense(Grouping):
    """Groups that are axes of the array, once it is reshaped to `split`."""

    def __init__(self, shape: tuple[int, ...], split: tuple[int, ...], over: tuple[int, ...]):
        self._shape, self._split, self._over = shape, split, over
        size = math.prod(split[axis] for axis in over)
        self.sizes = np.full([1 if i in over else n for i, n in enumerate(split)], size)

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x.reshape(self._split), self._over, keepdims=True)

    def max(self, x: jax.Array) -> jax.Array:
        return jnp.max(x.reshape(self._split), self._over, keepdims=True, initial=0)

    def spread(self, figures: jax.Array) -> jax.Array:
        if self._split == self._shape or figures.ndim == 0:
            return figures
        return jnp.broadcast_to(figures, self._split).reshape(self._shape)

    def scaled(self, x: jax.Array, figures: jax.Array) -> jax.Array:
        # In the split shape: XLA would not fuse a flat broadcast with what made the figures.
        return (x.reshape(self._split) * figures).reshape(self._shape)


@dataclass(frozen=True)
class _Axes(Groups):
    over: tuple[int, ...]

    def of(self, shape: tuple[int, ...]) -> Grouping:
        rank = len(shape)
        if not all(-rank <= axis < rank for axis in self.over):
            accepted = f"axes from {-rank} to {rank - 1}, for an array of shape {shape}"
            raise _check.ArgumentError("groups", repr(self), accepted)
        over = tuple(sorted(axis % rank for axis in self.over))
        if len(set(over)) < len(over):
            accepted = f"axes that differ, for an array of shape {shape}"
            raise _check.ArgumentError("groups", repr(self), accepted)
        return _Dense(shape, shape, over)

    def __repr__(self) -> str:
        return f"groups.axes({', '.join(map(str, self.over))})"


@dataclass(frozen=True)
class _Units(Groups):
    def of(self, shape: tuple[int, ...]) -> Grouping:
        if len(shape) < 2:
            accepted = "groups.whole, axes or ids, for an array of rank less than 2"
            raise _check.ArgumentError("groups", f"groups.units and shape {shape}", accepted)
        return _Dense(shape, shape, tuple(range(len(shape) - 1)))

    def __repr__(self) -> str:
        return "groups.units"


@dataclass(frozen=True)
class _Whole(Groups):
    def of(self, shape: tuple[int, ...]) -> Grouping:
        return _Dense(shape, shape, tuple(range(len(shape))))

    def __repr__(self) -> str:
        return "groups.whole"


@dataclass(frozen=True)
class _Blocks(Groups):
    sizes: tuple[int, ...]

    def of(self, shape: tuple[int, ...]) -> Grouping:
        accepted = f"one block size for each axis of shape {shape}, each a divisor of it, or -1"
        if len(self.sizes) != len(shape):
            raise _check.ArgumentError("groups", repr(self), accepted)
        split: list[int] = []
        for length, size in zip(shape, self.sizes, strict=True):
            block = length if size == -1 else size
            if block and length % block:
                raise _check.ArgumentError("groups", repr(self), accepted)
            split += [length // block if block else 1, block]
        return _Dense(shape, tuple(split), tuple(range(1, len(split), 2)))

    def __repr__(self) -> str:
        return f"groups.blocks({', '.join(map(str, self.sizes))})"


class _Ids(Groups):
    def __init__(self, given: np.ndarray):
        self._ids = given
        self._counts = np.bincount(given.ravel()) if given.size else np.zeros(0, int)
        self._hash = hash((given.shape, given.tobytes()))  # salted: of this process only
        # Groups of one size, each in one piece and in order, are a reshape: no gather is needed.
        flat, size = given.ravel(), int(self._counts[0]) if given.size else 0
        regular = size and (self._counts == size).all()
        self._regular = bool(regular and (np.diff(flat) >= 0).all())

    def of(self, shape: tuple[int, ...]) -> Grouping:
        if shape != self._ids.shape:
            accepted = f"ids of x's shape {shape}"
            raise _check.ArgumentError("groups", f"ids of shape {self._ids.shape}", accepted)
        if self._regular:
            return _Dense(shape, (self._counts.size, int(self._counts[0])), (1,))
        return _Indexed(self._ids, self._counts)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Ids) and np.array_equal(self._ids, other._ids))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        return ids, (self._ids,)

    def __repr__(self) -> str:
        if self._ids.size <= 20:
            return f"groups.ids({self._ids.tolist()})"
        return f"groups.ids(<{self._counts.size} groups of {self._ids.size} coordinates>)"


class _Indexed(Grouping):
    """Groups by an integer for each coordinate."""

    def __init__(self, given: np.ndarray, counts: np.ndarray):
        self._ids, self.sizes = given, counts
        self._flat = given.ravel()
        self._sorted = bool((np.diff(self._flat) >= 0).all())

    def sum(self, x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(
            x.ravel(), self._flat, self.sizes.size, indices_are_sorted=self._sorted
        )

    def max(self, x: jax.Array) -> jax.Array:
        largest = jax.ops.segment_max(
            x.ravel(), self._flat, self.sizes.size, indices_are_sorted=self._sorted
        )
        return jnp.maximum(largest, 0)

    def spread(self, figures: jax.Array) -> jax.Array:
        return figures[self._ids] if figures.ndim else figures

    def scaled(self, x: jax.Array, figures: jax.Array) -> jax.Array:
        return x * self.spread(figures)


units: Groups = _Units()
"""The incoming weights of each output unit of a Flax kernel: all axes but the last."""

whole: Groups = _Whole()
"""The whole array as one group."""


def axes(*over: int) -> Groups:
    """One group for each index of the other axes: `over` are those that a group runs along.

    Args:
        *over: axes, negative ones counted from the end. For an attention kernel of shape
            (features, heads, head_dim), ``axes(0, 2)`` makes each head a group; for a
            convolution of shape (height, width, in, out), ``axes(0, 1, 2)`` makes each filter one.

    Raises:
        ValueError: where one is no integer; and where an array has no such axis.

    >>> import jax.numpy as jnp, jaxreg
    >>> w = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    >>> jaxreg.GroupLasso(1.0, groups=jaxreg.groups.axes(0), weights=2.5).prox(w).tolist()
    [[1.5, 0.0], [2.0, 0.0]]
    """
    return _Axes(tuple(_check.integer("axes", axis) for axis in over))


def blocks(*sizes: int) -> Groups:
    """Blocks of a regular grid, one size an axis; -1 is the whole axis.

    For an attention kernel of shape (features, heads * 64), ``blocks(-1, 64)`` makes each head a
    group.

    Raises:
        ValueError: where a size is no integer >= 1 and not -1; and where it does not divide an
            array's axis.

    >>> blocks(-1, 2).of((3, 4)).sum(jnp.ones((3, 4))).ravel().tolist()
    [6.0, 6.0]
    """
    for size in sizes:
        if not _check.is_whole(size) or (size < 1 and size != -1):
            raise _check.ArgumentError("sizes", _check.describe(size), "integers >= 1, or -1")
    return _Blocks(tuple(int(size) for size in sizes))


def ids(given: Any) -> Groups:
    """Groups of any sizes: the number of its group for each coordinate.

    Args:
        given: integers of the array's shape; every number from 0 to the largest occurs.

    Raises:
        ValueError: where they are no integers, one is negative, or a number is missing (its group
            would be empty); and where an array has another shape.

    >>> ids([0, 1, 0]).of((3,)).sum(jnp.array([1.0, 2.0, 3.0])).tolist()
    [4.0, 2.0]
    """
    if not _check.is_concrete(given) and hasattr(given, "dtype"):
        accepted = "concrete integers: groups can't be traced"
        raise _check.ArgumentError("ids", _check.describe(given), accepted)
    array = np.array(given)
    if array.dtype.kind not in "iu" and array.size:
        raise _check.ArgumentError("ids", _check.describe(array), "an array of integers")
    if array.size and not 0 <= array.min() <= array.max() < array.size:
        wrong = array.min() if array.min() < 0 else array.max()
        accepted = "integers >= 0, and below the number of coordinates"
        raise _check.ArgumentError("ids", f"an array that holds {wrong}", accepted)
    array = array.astype(np.int32)
    if array.size and (np.bincount(array.ravel()) == 0).any():
        missing = int(np.flatnonzero(np.bincount(array.ravel()) == 0)[0])
        raise _check.ArgumentError(
            "ids",
            f"numbers up to {array.max()} without {missing}, an empty group",
            "every number from 0 to the largest",
        )
    array.flags.writeable = False
    return _Ids(array)
