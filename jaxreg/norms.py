r"""Norms of trees that are right in every precision.

Squares are summed in float32 at least. Where the sum over- or underflows, a second one is taken of
the entries times a power of two; so the usual case reads each entry once. On a CPU the second sum
is made only when it is needed (a sum of 0 may be one that underflowed, too). Elsewhere a branch
would stop the queue of kernels, while sums that share a pass over memory cost nothing more: there
all are made, and the right one is selected.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check, _tree

PyTree = Any
AxisNames = str | Sequence[str]
# Powers of two by which entries are multiplied where squares overflow, and where they underflow.
_SCALES = {32: (2.0**-80, 2.0**90), 64: (2.0**-600, 2.0**600)}
_SMALL = 4096  # entries of a leaf
_MANY = 128  # numbers that are added up at once


def global_norm(tree: PyTree, axis_name: AxisNames | None = None) -> jax.Array:
    r"""Euclidean norm of every entry of a tree, $\|x\| = \sqrt{\sum_i |x_i|^2}$.

    Accumulated in float32 at least, right where squares overflow or underflow, with gradient 0
    at 0. An infinite entry gives infinity, as does a norm beyond the dtype's range; a NaN gives
    NaN.

    Args:
        tree: real or complex floating arrays of any shapes.
        axis_name: inside ``shard_map`` or ``pmap``, the mesh axes along which leaves are sharded:
            one name or several. The squares are summed over the axes that shard each leaf (known
            to ``shard_map``; with ``check_vma=False`` and in ``pmap`` each leaf counts as sharded
            along all of them), with one collective for the whole tree. Without it the norm is
            that of the device's own pieces. Under ``jit`` norms are global as they are.

    Returns:
        A scalar: float64 where a leaf holds 64-bit floats, else float32. 0 for an empty tree.

    Raises:
        ValueError: where a leaf is not floating, or an axis is not bound.

    >>> import jax.numpy as jnp, jaxreg
    >>> float(jaxreg.global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}))
    5.0
    >>> f"{jaxreg.global_norm(jnp.full(4, 1e-30)):.3g}"
    '2e-30'
    """
    leaves = _leaves(tree)
    return norms_of_groups([leaves], axis_name)[0]


def leaf_norms(tree: PyTree, axis_name: AxisNames | None = None) -> PyTree:
    r"""The Euclidean norm of each leaf.

    Args:
        tree: as in `global_norm`.
        axis_name: as in `global_norm`; one collective serves all leaves.

    Returns:
        A tree of scalars like `tree`, all of the dtype of its `global_norm`.

    Raises:
        ValueError: as `global_norm` does.

    >>> import jax.numpy as jnp, jaxreg
    >>> norms = jaxreg.leaf_norms({"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])})
    >>> float(norms["a"]), float(norms["b"])
    (5.0, 1.0)
    """
    leaves = _leaves(tree)
    found = norms_of_groups([[leaf] for leaf in leaves], axis_name)
    return jax.tree.unflatten(jax.tree.structure(tree), list(found))


def rms(tree: PyTree, axis_name: AxisNames | None = None) -> jax.Array:
    r"""Root mean square of every entry of a tree, $\sqrt{\sum_i |x_i|^2 / n}$.

    Args:
        tree: as in `global_norm`.
        axis_name: as in `global_norm`; n counts the entries of all devices.

    Returns:
        A scalar as of `global_norm`; 0 for an empty tree.

    Raises:
        ValueError: as `global_norm` does.

    >>> import jax.numpy as jnp, jaxreg
    >>> float(jaxreg.rms({"a": jnp.array([1.0, 7.0]), "b": jnp.array([[5.0, 5.0]])}))
    5.0
    """
    leaves = _leaves(tree)
    norm = norms_of_groups([leaves], axis_name)[0]
    return norm / max(1.0, entries(leaves, axis_name)) ** 0.5


def entries(leaves: Sequence[jax.Array], axis_name: AxisNames | None) -> float:
    """How many entries leaves have on all devices."""
    names = bound_axes(axis_name)
    devices = math.prod(map(_axis_size, names))
    return sum(leaf.size * devices / replicas(leaf, names) for leaf in leaves)


def norms_of_groups(
    groups: Sequence[Sequence[jax.Array]], axis_name: AxisNames | None = None
) -> jax.Array:
    """The norm of each group of leaves, with one collective for all of them.

    Args:
        groups: lists of floating arrays.
        axis_name: as in `global_norm`.

    Returns:
        A vector of norms, in the widest dtype of all.
    """
    leaves = [leaf for group in groups for leaf in group]
    owners = [g for g, group in enumerate(groups) for _ in group]
    dtype = _tree.widest_dtype(leaves)
    names = sharding_axes(leaves, axis_name)
    if not any(leaf.size for leaf in leaves):
        return jnp.zeros(len(groups), dtype)

    def total(numbers: Sequence[jax.Array], add: Callable[..., Any] = sum) -> jax.Array:
        """The sums over the leaves and devices of each group, of numbers or vectors a leaf."""
        parts: list[list[jax.Array]] = [[] for _ in groups]
        for number, leaf, g in zip(numbers, leaves, owners, strict=True):
            # One sum over all axes serves all leaves where each device gives its share.
            parts[g].append(number / replicas(leaf, names) if names else number)
        zero = jnp.zeros_like(numbers[0])
        stacked = jnp.stack([add(each) if each else zero for each in parts])
        return jax.lax.psum(stacked, names) if names else stacked

    @jax.custom_jvp
    def norms(leaves: Sequence[jax.Array]) -> jax.Array:
        sums = _Sums(leaves, owners, total, dtype)
        return jax.lax.platform_dependent(cpu=sums.norms_by_branch, default=sums.norms_by_select)

    @norms.defjvp
    def tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        """<x, dx> / ||x||, and 0 at x = 0, where the norm has no derivative."""
        (leaves,), (dots,) = primals, tangents
        found = norms(leaves)
        divisors = jnp.where(found == 0, jnp.inf, found)
        triples = zip(leaves, dots, owners, strict=True)
        return found, total([_product(x, dx, divisors[g]) for x, dx, g in triples])

    return norms(leaves)


@dataclass(frozen=True)
class _Sums:
    """Sums of squares of groups of leaves, and the norms that they give."""

    leaves: Sequence[jax.Array]
    owners: Sequence[int]
    total: Callable[..., jax.Array]
    dtype: Any

    def norms_by_branch(self) -> jax.Array:
        """A second pass where a sum is out of range."""
        # What follows looks at the root alone: a sum that is used twice XLA takes twice, in kernels
        # of all leaves, which are long to compile.
        plain = jnp.sqrt(self.total([self._squares(x) for x in self.leaves], _sum_of_many))
        down, up = self._scales
        scales = jnp.where(plain < 1, up, down).astype(self.dtype)
        # Out here, as a gather inside the branch can't be mapped inside shard_map (jax 0.10).
        of_leaves = scales[np.asarray(self.owners)]

        def scaled() -> jax.Array:
            # One number for each large leaf: what leaves of one shape share XLA would write out in
            # that shape. Small leaves share their group's, so that they share their kernels, too.
            each, of_groups = jax.lax.optimization_barrier((of_leaves, scales))
            numbers = [
                each[i] if x.size > _SMALL else of_groups[g]
                for i, (x, g) in enumerate(zip(self.leaves, self.owners, strict=True))
            ]
            squares = [self._squares(x, s) for x, s in zip(self.leaves, numbers, strict=True)]
            sums = self.total(squares, _sum_of_many)
            return jnp.where(self._in_range(plain), plain, jnp.sqrt(sums) / scales)

        return jax.lax.cond(jnp.all(self._in_range(plain)), lambda: plain, scaled)

    def norms_by_select(self) -> jax.Array:
        """Three sums, of which each norm takes one."""
        # Of constants XLA could make (x s)(x s) into (x x)(s s), which is out of range.
        down, up = jax.lax.optimization_barrier(
            tuple(jnp.asarray(scale, self.dtype) for scale in self._scales)
        )
        sums = [jnp.stack([self._squares(x, s) for s in (up, None, down)]) for x in self.leaves]
        low, plain, high = jnp.sqrt(self.total(sums)).T
        elsewhere = jnp.where(plain < 1, low / up, high / down)
        return jnp.where(self._in_range(plain), plain, elsewhere)

    @property
    def _scales(self) -> tuple[float, float]:
        return _SCALES[jnp.finfo(self.dtype).bits]

    def _in_range(self, roots: jax.Array) -> jax.Array:
        # Far inside the range: what underflows beside such a sum is lost to rounding.
        return (roots > float(jnp.finfo(self.dtype).tiny) ** 0.25) & (roots < jnp.inf)

    def _squares(self, x: jax.Array, scale: Any = None) -> jax.Array:
        sums = []
        for part in _real_parts(x):
            wide = part.astype(self.dtype)
            sums.append(jnp.sum(jnp.square(wide if scale is None else wide * scale)))
        return sum(sums[1:], sums[0])


def _sum_of_many(numbers: Sequence[jax.Array]) -> jax.Array:
    """Their sum, a few at a time.

    XLA makes one kernel of a chain of additions, which takes as long to compile as the square of
    its arguments: of thousands, minutes. Cumulative sums it leaves apart.
    """
    while len(numbers) > _MANY:
        parts = [jnp.stack(numbers[i : i + _MANY]) for i in range(0, len(numbers), _MANY)]
        numbers = [jax.lax.cumsum(part)[-1] for part in parts]
    return sum(numbers[1:], numbers[0])


def _product(x: jax.Array, dx: jax.Array, divisor: jax.Array) -> jax.Array:
    """Sum over the entries of x dx / divisor."""
    pairs = zip(_real_parts(x), _real_parts(dx), strict=True)
    dtype = divisor.dtype
    sums = [jnp.sum(a.astype(dtype) / divisor * b.astype(dtype)) for a, b in pairs]
    return sum(sums[1:], sums[0])


def _real_parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _leaves(tree: PyTree) -> list[jax.Array]:
    tree = jax.tree.map(jnp.asarray, tree)
    _tree.check_floating("tree", tree)
    return jax.tree.leaves(tree)


# Mesh axes ---------------------------------------------------------------------------------------


def bound_axes(axis_name: AxisNames | None) -> tuple[str, ...]:
    """The names of mesh axes as a tuple.

    Raises:
        ValueError: where one is not bound here.
    """
    if axis_name is None:
        return ()
    names = [axis_name] if isinstance(axis_name, str) else axis_name
    are_names = isinstance(names, Sequence) and all(isinstance(n, str) and n for n in names)
    if not are_names or len({*names}) < len(names):
        accepted = "the name of a mesh axis, several different ones, or None"
        raise _check.ArgumentError("axis_name", _check.describe(axis_name), accepted)
    for name in names:
        try:
            _axis_size(name)
        except NameError:
            accepted = "axes of the shard_map, pmap or vmap that this is called in, or None"
            raise _check.ArgumentError(
                "axis_name", f"{name!r}, which is not bound", accepted
            ) from None
    return tuple(names)


def _axis_size(name: str) -> int:
    return jax.lax.psum(1, name)


def sharding_axes(leaves: Sequence[jax.Array], axis_name: AxisNames | None) -> tuple[str, ...]:
    """The axes along which a leaf may be sharded, of those that are named.

    Raises:
        ValueError: as `bound_axes` does.
    """
    names = bound_axes(axis_name)
    return tuple(n for n in names if not all(_is_replicated(leaf, n) for leaf in leaves))


def summed(
    sums: Sequence[jax.Array], leaves: Sequence[jax.Array], axis_name: AxisNames | None
) -> jax.Array:
    """Sums over each leaf's own entries as those over all of its pieces, stacked.

    One collective serves all leaves; without `axis_name`, or outside of ``shard_map``, there is
    none to be taken.

    Args:
        sums: one number for each leaf, or one vector.
        leaves: what they are sums over.
        axis_name: mesh axes that leaves are sharded along.
    """
    names = sharding_axes(leaves, axis_name)
    if not names:
        return jnp.stack(sums)
    each = [number / replicas(x, names) for number, x in zip(sums, leaves, strict=True)]
    return jax.lax.psum(jnp.stack(each), names)


def replicas(x: jax.Array, names: Sequence[str]) -> int:
    """How many devices along these axes hold the same piece."""
    return math.prod(_axis_size(name) for name in names if _is_replicated(x, name))


def _is_replicated(x: jax.Array, name: str) -> bool:
    return is_known(name) and name not in varying_axes(x)


def is_known(name: str) -> bool:
    """Whether ``shard_map`` knows which arrays differ along an axis; not with check_vma=False."""
    return name in varying_axes(jax.lax.axis_index(name))


def varying_axes(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The mesh axes along which devices hold different pieces, as far as ``shard_map`` knows."""
    kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):  # its name in newer versions of JAX
        kind = kind.manual_axis_type  # pyright: ignore[reportAttributeAccessIssue]
        return frozenset(getattr(kind, "varying", ()))
    return frozenset(getattr(kind, "vma", None) or ())


def varying(x: jax.Array, names: Collection[str]) -> jax.Array:
    """The same numbers, as if devices along these mesh axes might hold different ones."""
    missing = tuple(n for n in names if n not in varying_axes(x) and is_known(n))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]
