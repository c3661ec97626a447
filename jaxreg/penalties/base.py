r"""What every penalty can do.

A penalty R is an immutable object. Its numbers (strengths, bounds) are leaves of a pytree, so they
can be traced, differentiated and mapped over. A constraint is a penalty whose value is 0 inside
its set and infinite outside.

A concrete penalty is a dataclass under `@penalty` that writes R in the methods `_value` and
`_prox`, and where they have a direct form in `_subdiff_distance` and `_critical_multiplier`. Those
see arrays of one floating dtype, float32 or wider, and the penalty's own numbers cast to it;
everything about arguments happens here, once.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check, _tree
from jaxreg import where as _where


def number(check: Callable[[str, Any], Any], **options: Any) -> Any:
    """A field that holds numbers: a leaf of the pytree, checked by ``check(name, value)``.

    Without this specifier a field holds one scalar >= 0.
    """
    return dataclasses.field(metadata={"check": check}, **options)


def static(check: Callable[[str, Any], Any], **options: Any) -> Any:
    """A hashable field that is part of the pytree's structure, such as axes or a count."""
    return dataclasses.field(metadata={"check": check, "static": True}, **options)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Penalty(abc.ABC):
    r"""A penalty or constraint R on one array.

    ``2 * penalty`` is another penalty, and ``a + b`` is one where the proximal operator of the sum
    is known in closed form.

    Reference: N. Parikh and S. Boyd, *Proximal Algorithms*, Foundations and Trends in
    Optimization 1(3), 2014.
    """

    convex: ClassVar[bool]
    """Whether R is convex."""
    separable: ClassVar[bool] = False
    """Whether R is a sum over coordinates."""
    sparse: ClassVar[bool] = False
    """Whether the prox gives exact zeros."""
    elementwise_step: ClassVar[bool] = False
    """Whether the prox takes one step a coordinate, as the metric of Adam needs."""
    scales: ClassVar[tuple[str, ...] | None] = ("strength",)
    """The fields that R is linear in, together: c R has each of them c times as large. Empty for a
    constraint; None where c R is of another form."""

    _eps: ClassVar[float] = 2.0**-23
    """The precision of what the user gave, set on the copy that the methods below are called on."""

    @property
    def has_subdiff_distance(self) -> bool:
        """Whether `subdiff_distance` has a direct form."""
        return type(self)._subdiff_distance is not Penalty._subdiff_distance

    where: _where.Selector = dataclasses.field(
        default=_where.kernels,
        kw_only=True,
        metadata={"check": lambda _, value: _where.as_selector(value), "static": True},
    )
    """The leaves of a parameter tree that the penalty is for; see `on`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check", _check.nonnegative)
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

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
            x: a real floating array.

        Returns:
            A scalar.

        Raises:
            ValueError: where x is no real floating array, or its shape does not fit the penalty.

        >>> import jax.numpy as jnp, jaxreg
        >>> float(jaxreg.L1(0.5).value(jnp.array([1.0, -3.0])))
        2.0
        """
        return _compiled("_value", self, x, _tree.widen(self._gather("x", x)))

    def prox(self, x: Any, step: Any = 1.0) -> Any:
        r"""The proximal operator, $\arg\min_w R(w) + \sum_i (w_i - x_i)^2 / (2 \, step_i)$.

        Where R is not convex and several w attain the minimum, one of them.

        Args:
            x: a real floating array.
            step: a scalar >= 0; or, where `elementwise_step` says so, an array of x's shape (the
                proximal operator in a diagonal metric). Where it is 0 the result is x, or for a
                constraint the projection of x.

        Returns:
            An array of x's shape and dtype, computed in float32 at least and rounded once.

        Raises:
            ValueError: as `value` does, or where the step is negative, NaN, of another shape, or
                elementwise without a form for it.

        >>> import jax.numpy as jnp, jaxreg
        >>> jaxreg.L1(1.0).prox(jnp.array([1.0, -3.0]), step=jnp.array([0.5, 2.0])).tolist()
        [0.5, -1.0]
        """
        wide = _tree.widen(self._gather("x", x))
        result = self._scatter(_compiled("_prox", self, x, wide, self._step(step, wide)), x)
        return jax.tree.map(lambda w, leaf: w.astype(jnp.asarray(leaf).dtype), result, x)

    def residual(self, x: Any, grad: Any, step: Any = 1.0) -> Any:
        r"""Prox-gradient residual, $(x - \mathrm{prox}(x - step \cdot grad, step)) / step$.

        For a smooth loss with gradient `grad` at x, it is 0 exactly where x is a stationary point
        of loss + R (for an R that is not convex: at a step below its concavity parameter). It has
        the units of the gradient.

        Args:
            x: a real floating array.
            grad: the loss's gradient at x, of x's shape.
            step: as in `prox`, all > 0.

        Returns:
            An array of x's shape, float32 at least.

        Raises:
            ValueError: as `prox` does, or where grad has another shape or a step is 0.

        >>> import jax.numpy as jnp, jaxreg
        >>> jaxreg.L1(1.0).residual(jnp.array([0.0, 2.0]), jnp.array([0.5, -1.0])).tolist()
        [0.0, 0.0]
        """
        wide, grad = self._pair(x, grad)
        if _check.is_host(step) and not (np.asarray(step) > 0).all():
            raise _check.ArgumentError("step", _check.describe(step), "numbers > 0")
        step = self._step(step, wide)
        moved = _compiled("_prox", self, x, wide - step * grad, step)
        return self._scatter((wide - moved) / step, x)

    def subdiff_distance(self, x: Any, grad: Any) -> Any:
        r"""Distance of $-grad$ to the subdifferential $\partial R(x)$, for each coordinate.

        0 everywhere exactly where x is a stationary point of loss + R; infinite at a coordinate
        that violates a constraint. Its Euclidean norm is the distance of the whole.

        Args:
            x: a real floating array.
            grad: the loss's gradient at x, of x's shape.

        Returns:
            An array of x's shape.

        Raises:
            ValueError: where R has no direct form, as `has_subdiff_distance` says: it is neither
                separable nor a sum over disjoint groups; or grad has another shape.

        >>> import jax.numpy as jnp, jaxreg
        >>> jaxreg.L1(1.0).subdiff_distance(jnp.array([0.0, 2.0]), jnp.array([1.5, 1.0])).tolist()
        [0.5, 2.0]
        """
        wide, grad = self._pair(x, grad)
        return self._scatter(_compiled("_subdiff_distance", self, x, wide, grad), x)

    def critical_multiplier(self, grad_at_zero: Any) -> jax.Array:
        r"""The smallest c at which x = 0 minimizes loss + c R: where regularization paths start.

        Args:
            grad_at_zero: the loss's gradient at x = 0.

        Returns:
            A scalar; infinity where no multiple of R makes 0 a minimizer.

        Raises:
            ValueError: where R is not convex; for `MCP`, `SCAD` and their group versions that of
                `L1` or `GroupLasso` is where a path may start.

        >>> import jax.numpy as jnp, jaxreg
        >>> float(jaxreg.L1(0.5).critical_multiplier(jnp.array([1.5, -2.0])))
        4.0
        """
        grad = _tree.widen(self._gather("grad_at_zero", grad_at_zero))
        return _compiled("_critical_multiplier", self, grad_at_zero, grad)

    def __mul__(self, multiplier: Any) -> "Penalty":
        from jaxreg.penalties import algebra  # which imports the penalties

        return algebra.multiply(self, _check.nonnegative("multiplier", multiplier))

    __rmul__ = __mul__
    __array_ufunc__ = None  # so that a NumPy number leaves the product to `__rmul__`

    def __add__(self, other: Any) -> "Penalty":
        from jaxreg.penalties import algebra

        return algebra.add(self, other) if isinstance(other, Penalty) else NotImplemented

    # What a concrete penalty writes. x, grad and step are arrays of one floating dtype, step a
    # scalar or of x's shape.

    @abc.abstractmethod
    def _value(self, x: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array: ...

    def _subdiff_distance(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        raise _check.ArgumentError(
            "penalty",
            f"{type(self).__name__}, whose subdifferential has no direct form",
            "a penalty that is separable or of disjoint groups; residual(x, grad, step) is 0 at "
            "stationary points of any",
        )

    def _critical_multiplier(self, grad: jax.Array) -> jax.Array:
        raise _check.ArgumentError(
            "penalty", f"{type(self).__name__}, which is not convex", "a convex penalty"
        )

    def _gather(self, name: str, x: Any) -> jax.Array:
        """The one array that R works on."""
        return _floating(name, x)

    def _scatter(self, array: jax.Array, x: Any) -> Any:
        """The inverse of `_gather`: the array in the structure of x."""
        return array

    def _pair(self, x: Any, grad: Any) -> tuple[jax.Array, jax.Array]:
        x, grad = _tree.widen(self._gather("x", x)), self._gather("grad", grad)
        if grad.shape != x.shape:
            raise _check.ArgumentError(
                "grad", _check.describe(grad), f"an array of x's shape {x.shape}"
            )
        return x, grad.astype(x.dtype)

    def _step(self, step: Any, x: jax.Array) -> jax.Array:
        for part in filter(_check.is_concrete, jax.tree.leaves(step)):
            wrong = np.ravel(part)[~(np.ravel(part) >= 0)]
            if wrong.size:
                given = f"an array that holds {wrong[0]}" if np.ndim(part) else repr(part)
                raise _check.ArgumentError("step", given, "numbers >= 0")
        array = jnp.asarray(step) if not isinstance(step, dict) else self._gather("step", step)
        complex_ = jnp.issubdtype(array.dtype, jnp.complexfloating)
        if array.shape != () and not self.elementwise_step:
            raise _check.ArgumentError(
                "step",
                _check.describe(array),
                f"a scalar: {type(self).__name__} has no closed form in a diagonal metric, such "
                "as Adam's; use a direction with one gain for the whole leaf, such as momentum's",
            )
        if array.shape not in ((), x.shape) or complex_:
            accepted = f"a real scalar or an array of x's shape {x.shape}"
            raise _check.ArgumentError("step", _check.describe(array), accepted)
        return array.astype(x.dtype)

    def _formula(self) -> str:
        """How it is made, but for its leaves."""
        by_position, by_name = [], []
        for field in dataclasses.fields(self):
            text = repr(getattr(self, field.name))
            if field.default is dataclasses.MISSING and not field.kw_only:
                by_position.append(text)
            elif field.name != "where" and text != repr(field.default):
                by_name.append(f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(by_position + by_name)})"

    def __repr__(self) -> str:
        if self.where == _where.kernels:
            return self._formula()
        formula = f"({self._formula()})" if isinstance(self, Derived) else self._formula()
        return f"{formula}.on({self.where!r})"


def _compiled(method: str, penalty: Penalty, given: Any, *arrays: jax.Array) -> jax.Array:
    """A method on arrays of one dtype, with the penalty's numbers cast to it.

    `given` is what the user gave, whose dtype's precision counts. Compiled, so that outside of a
    user's own jit too it is one program, and its loops are compiled once for each structure and
    shape.
    """
    dtype = arrays[0].dtype
    dtypes = [jnp.asarray(x).dtype for x in jax.tree.leaves(given)]
    eps = max(float(jnp.finfo(d).eps) for d in [*dtypes, dtype])
    cast = jax.tree.map(lambda number: jnp.asarray(number, dtype), penalty)
    return _call(method, eps, cast, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(method: str, eps: float, penalty: Penalty, *arrays: jax.Array) -> jax.Array:
    object.__setattr__(penalty, "_eps", eps)  # a copy that was unflattened for this call
    return getattr(penalty, method)(*arrays)


class Derived(Penalty):
    """A penalty made of another one, ``penalty``, whose flags it has."""

    scales = None
    penalty: Penalty

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.convex

    @property
    def separable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.separable

    @property
    def sparse(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.sparse

    @property
    def elementwise_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.penalty.elementwise_step

    @property
    def has_subdiff_distance(self) -> bool:
        return self.penalty.has_subdiff_distance


def part(name: str, value: Any) -> Penalty:
    """The check of a field that holds a penalty."""
    if not isinstance(value, Penalty):
        raise _check.ArgumentError(name, _check.describe(value), "a jaxreg penalty")
    return value


_P = TypeVar("_P", bound=Penalty)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(number, static))
def penalty(cls: type[_P]) -> type[_P]:
    """Makes a subclass of `Penalty` a frozen dataclass and a pytree of its numbers."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    numbers = [f.name for f in fields if not f.metadata.get("static")]
    structure = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(self: _P) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in numbers]
        return keyed, tuple(getattr(self, name) for name in structure)

    def flatten(self: _P) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(self, n) for n in numbers], tuple(getattr(self, n) for n in structure)

    def unflatten(values: tuple[Any, ...], leaves: Any) -> _P:
        # Not through __init__: what a transformation puts in a leaf's place (a tracer, a batch of
        # strengths, None) is not for a check of arguments to judge.
        self = object.__new__(cls)
        for name, leaf in zip(numbers, leaves, strict=True):
            object.__setattr__(self, name, leaf)
        for name, value in zip(structure, values, strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
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
