r"""What every penalty can do.

A penalty R is an immutable object. Its numbers (strengths, bounds) are leaves of a pytree, so they
can be traced, differentiated and mapped over. A constraint is a penalty whose value is 0 inside
its set and infinite outside.

A concrete penalty is a dataclass under `@penalty` that writes R in the methods `_value`, `_prox`,
`_subdiff_distance` and `_critical_multiplier`. Those see arrays of one floating dtype, float32 or
wider, and the penalty's own numbers cast to it; everything about arguments happens here, once.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check, _tree
from jaxreg import where as _where


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Penalty(abc.ABC):
    r"""A penalty or constraint R on one array.

    Reference: N. Parikh and S. Boyd, *Proximal Algorithms*, Foundations and Trends in
    Optimization 1(3), 2014.
    """

    convex: ClassVar[bool]
    """Whether R is convex."""
    separable: ClassVar[bool]
    """Whether R is a sum over coordinates, so that any elementwise step has a simple prox."""
    sparse: ClassVar[bool]
    """Whether the prox gives exact zeros."""

    where: _where.Selector = dataclasses.field(
        default=_where.kernels, kw_only=True, metadata={"static": True}
    )
    """The leaves of a parameter tree that the penalty is for; see `on`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", _where.as_selector(self.where))
        for field in dataclasses.fields(self):
            if not field.metadata.get("static"):
                number = self._check_number(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, number)

    @staticmethod
    def _check_number(name: str, value: Any) -> Any:
        return _check.nonnegative(name, value)

    def on(self, selector: _where.Selector | str) -> Self:
        """The same penalty for other leaves: a selector, or a path pattern.

        >>> import jaxreg
        >>> jaxreg.L1(0.1).on("**/kernel")
        L1(0.1).on(where.path('**/kernel'))
        """
        return dataclasses.replace(self, where=_where.as_selector(selector))

    def value(self, x: Any) -> jax.Array:
        """R(x), accumulated in float32 at least.

        Args:
            x: a real floating array of any shape.

        Returns:
            A scalar.
        """
        x = _tree.widen(_floating("x", x))
        return self._cast(x.dtype)._value(x)

    def prox(self, x: Any, step: Any = 1.0) -> jax.Array:
        r"""The proximal operator, $\arg\min_w R(w) + \sum_i (w_i - x_i)^2 / (2 \, step_i)$.

        Args:
            x: a real floating array of any shape.
            step: a scalar, or an array of x's shape (the proximal operator in a diagonal
                metric), all >= 0. Where it is 0 the result is x, or for a constraint the
                projection of x.

        Returns:
            An array of x's shape and dtype, computed in float32 at least and rounded once.
        """
        x = _floating("x", x)
        wide = _tree.widen(x)
        return self._cast(wide.dtype)._prox(wide, _step(step, wide)).astype(x.dtype)

    def residual(self, x: Any, grad: Any, step: Any = 1.0) -> jax.Array:
        r"""Prox-gradient residual, $(x - \mathrm{prox}(x - step \cdot grad, step)) / step$.

        For a smooth loss with gradient `grad` at x, it is 0 exactly where x is a stationary point
        of loss + R. It has the units of the gradient.

        Args:
            x: a real floating array of any shape.
            grad: the loss's gradient at x, of x's shape.
            step: a scalar or an array of x's shape, all > 0.

        Returns:
            An array of x's shape.
        """
        x, grad = _pair(x, grad)
        penalty, step = self._cast(x.dtype), _step(step, x)
        return (x - penalty._prox(x - step * grad, step)) / step

    def subdiff_distance(self, x: Any, grad: Any) -> jax.Array:
        r"""Distance of $-grad$ to the subdifferential $\partial R(x)$, for each coordinate.

        0 everywhere exactly where x is a stationary point of loss + R; infinite at a coordinate
        that violates a constraint.

        Args:
            x: a real floating array of any shape.
            grad: the loss's gradient at x, of x's shape.

        Returns:
            An array of x's shape.
        """
        x, grad = _pair(x, grad)
        return self._cast(x.dtype)._subdiff_distance(x, grad)

    def critical_multiplier(self, grad_at_zero: Any) -> jax.Array:
        r"""The smallest c at which x = 0 minimizes loss + c R: where regularization paths start.

        Args:
            grad_at_zero: the loss's gradient at x = 0, of any shape.

        Returns:
            A scalar; infinity where no multiple of R makes 0 a minimizer.
        """
        grad = _tree.widen(_floating("grad_at_zero", grad_at_zero))
        return self._cast(grad.dtype)._critical_multiplier(grad)

    @abc.abstractmethod
    def _value(self, x: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _critical_multiplier(self, grad: jax.Array) -> jax.Array: ...

    def _cast(self, dtype: Any) -> Self:
        return jax.tree.map(lambda number: jnp.asarray(number).astype(dtype), self)

    def __repr__(self) -> str:
        numbers = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "where"]
        on = "" if self.where == _where.kernels else f".on({self.where!r})"
        return f"{type(self).__name__}({', '.join(map(repr, numbers))}){on}"


_P = TypeVar("_P", bound=Penalty)


@dataclass_transform(frozen_default=True, eq_default=False)
def penalty(cls: type[_P]) -> type[_P]:
    """Makes a subclass of `Penalty` a frozen dataclass and a pytree of its numbers."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    numbers = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]

    def flatten_with_keys(self: _P) -> tuple[list[tuple[Any, Any]], _where.Selector]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in numbers]
        return keyed, self.where

    def unflatten(selector: _where.Selector, leaves: Any) -> _P:
        # Not through __init__: what a transformation puts in a leaf's place (a tracer, a batch of
        # strengths, None) is not for a check of arguments to judge.
        self = object.__new__(cls)
        for name, leaf in zip(numbers, leaves, strict=True):
            object.__setattr__(self, name, leaf)
        object.__setattr__(self, "where", selector)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def _floating(name: str, x: Any) -> jax.Array:
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        given = f"a {type(x).__name__}"
        raise _check.ArgumentError(name, given, "one array, such as a leaf of a tree") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise _check.ArgumentError(name, _check.describe(array), "a real floating array")
    return array


def _step(step: Any, x: jax.Array) -> jax.Array:
    if _check.is_host(step) and not (np.asarray(step) >= 0).all():
        raise _check.ArgumentError("step", _check.describe(step), "numbers >= 0")
    array = jnp.asarray(step)
    if array.shape not in ((), x.shape) or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise _check.ArgumentError(
            "step", _check.describe(array), f"a real scalar or an array of x's shape {x.shape}"
        )
    return array.astype(x.dtype)


def _pair(x: Any, grad: Any) -> tuple[jax.Array, jax.Array]:
    x, grad = _tree.widen(_floating("x", x)), _floating("grad", grad)
    if grad.shape != x.shape:
        raise _check.ArgumentError("grad", _check.describe(grad), f"an array of shape {x.shape}")
    return x, grad.astype(x.dtype)
