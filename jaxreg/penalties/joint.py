r"""Groups that span several leaves of a tree, such as a neuron's incoming weights and its bias."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg import groups as _groups
from jaxreg import where as _where
from jaxreg.penalties.base import Derived, Penalty, number, part, penalty, static

Array = jax.Array
Members = tuple[tuple[str, tuple[int, ...]], ...]


def _as_members(name: str, value: Any) -> Members:
    accepted = "a dict of leaf names and their members' axes, such as {'kernel': 0, 'bias': ()}"
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, tuple) or len(value) < 2:
        raise _check.ArgumentError(name, _check.describe(value), accepted)
    members = []
    for key, axes in value:
        axes = (axes,) if isinstance(axes, int) and not isinstance(axes, bool) else axes
        if not isinstance(key, str) or not isinstance(axes, (tuple, list)):
            raise _check.ArgumentError(name, f"{key!r}: {axes!r}", accepted)
        members.append((key, tuple(_check.integer(name, axis) for axis in axes)))
    return tuple(members)


@penalty
class Joint(Derived):
    r"""A group penalty whose groups span several leaves: one norm for all members of a group.

    Each leaf becomes a matrix of shape (members, groups): the named axes are those that a group
    runs along, the others number the groups. The matrices are stacked, and the penalty acts on the
    stack, whose units are its columns. In a parameter tree each leaf that the penalty is for (the
    first name, by `where`) is joined by the leaves of the other names beside it. ``value``,
    ``prox`` and the others take a dict of arrays by these names.

    Args:
        penalty: a penalty with the groups ``jaxreg.groups.units``, such as ``GroupLasso(0.1)``.
        members: leaf name -> an axis or a tuple of axes that a group runs along; ``()`` for a leaf
            with one number a group. A name may be a path, such as ``conv/kernel``, from where the
            leaves' paths part.

    Raises:
        ValueError: where there are fewer than two members; and where a leaf is missing or their
            numbers of groups differ.

    >>> import jax.numpy as jnp, jaxreg
    >>> neuron = jaxreg.Joint(jaxreg.GroupLasso(2.5, weights=1.0), {"kernel": 0, "bias": ()})
    >>> layer = {"kernel": jnp.array([[3.0, 0.1]]), "bias": jnp.array([4.0, 0.1])}
    >>> print(neuron.prox(layer)["kernel"], neuron.prox(layer)["bias"])
    [[1.5 0. ]] [2. 0.]
    """

    penalty: Penalty = number(part)
    members: Members = static(_as_members)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.penalty
        while isinstance(inner, Derived) and not isinstance(inner, Joint):
            inner = inner.penalty
        if getattr(inner, "groups", None) != _groups.units:
            accepted = "a penalty with groups=groups.units, such as GroupLasso(0.1)"
            raise _check.ArgumentError("penalty", repr(self.penalty), accepted)
        if self.where == _where.kernels:  # a selector may be on the part as well
            object.__setattr__(self, "where", self.penalty.where)

    def _value(self, x: Array) -> Array:
        return self.penalty._value(x)

    def _prox(self, x: Array, step: Array) -> Array:
        return self.penalty._prox(x, step)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        return self.penalty._subdiff_distance(x, grad)

    def _critical_multiplier(self, grad: Array) -> Array:
        return self.penalty._critical_multiplier(grad)

    def _gather(self, name: str, x: Any) -> Array:
        names = [key for key, _ in self.members]
        if not isinstance(x, Mapping) or set(x) != set(names):
            accepted = f"a dict of arrays called {', '.join(names)}"
            given = f"a dict of {', '.join(x)}" if isinstance(x, Mapping) else _check.describe(x)
            raise _check.ArgumentError(name, given, accepted)
        stacks = []
        for key, axes in self.members:
            leaf = super()._gather(f"{name}[{key!r}]", x[key])
            over = [_check.axis("members", axis, leaf) for axis in axes]
            moved = jnp.moveaxis(leaf, over, range(len(over)))
            size = math.prod(moved.shape[: len(over)])
            stacks.append(moved.reshape(size, math.prod(moved.shape[len(over) :])))
        counts = {key: stack.shape[1] for key, stack in zip(names, stacks, strict=True)}
        if len(set(counts.values())) > 1:
            accepted = "leaves with the same number of groups"
            raise _check.ArgumentError("members", f"{counts} groups in {name}", accepted)
        dtype = max((_tree.wide_dtype(stack.dtype) for stack in stacks), key=lambda d: d.itemsize)
        return jnp.concatenate([stack.astype(dtype) for stack in stacks])

    def _scatter(self, array: Array, x: Any) -> dict[str, Array]:
        parts, start = {}, 0
        for key, axes in self.members:
            leaf = jnp.asarray(x[key])
            over = [axis % leaf.ndim for axis in axes]
            moved = jnp.moveaxis(leaf, over, range(len(over)))
            size = math.prod(moved.shape[: len(over)])
            part = array[start : start + size].reshape(moved.shape)
            parts[key] = jnp.moveaxis(part, range(len(over)), over)
            start += size
        return parts

    def _formula(self) -> str:
        return f"Joint({self.penalty._formula()}, {dict(self.members)!r})"
