r"""Multiples and sums of penalties, where the prox is known in closed form.

- A multiple: $\mathrm{prox}_{c R}(x, step) = \mathrm{prox}_R(x, c \, step)$.
- With a squared L2 norm: $\mathrm{prox}(x, step) = \mathrm{prox}_R(x / d, step / d)$, $d = 1 + step
  \cdot l_2$.
- A convex separable R, or a total variation, within an interval: the prox of R, then the clip.
  Group norms with `NonNegative`: the clip, then the prox.
- Sums that have a name, such as ``L1 + L2``, become the class of that name.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.penalties.base import Derived, Penalty, number, part, penalty
from jaxreg.penalties.constraints import Box, Interval, NonNegative
from jaxreg.penalties.group import GroupLasso, L2Norm, SparseGroupLasso
from jaxreg.penalties.joint import Joint
from jaxreg.penalties.separable import L1, L2, ElasticNet, NonNegativeL1, ratio
from jaxreg.penalties.variation import FusedLasso, TotalVariation

Array = jax.Array
Number = float | Array


def multiply(p: Penalty, c: Number) -> Penalty:
    """C * p for c >= 0; a constraint is its own multiple."""
    if isinstance(p, (Joint, Bounded)):
        return dataclasses.replace(p, penalty=multiply(p.penalty, c))
    if isinstance(p, Ridged):
        return dataclasses.replace(p, penalty=multiply(p.penalty, c), l2=c * p.l2)
    if p.scales is None:
        return Multiple(p, c, where=p.where)
    return dataclasses.replace(p, **{name: c * getattr(p, name) for name in p.scales})


def add(a: Penalty, b: Penalty) -> Penalty:
    """A + b where its prox has a closed form."""
    if a.where != b.where:
        accepted = "penalties for the same leaves: call .on(...) on the sum"
        raise _check.ArgumentError("penalty", f"{a!r} + {b!r}", accepted)
    parts = sorted([*_parts(a), *_parts(b)], key=_place)
    total = parts[0]
    for other in parts[1:]:
        total = _same(total, other) or _named(total, other) or _general(total, other)
        if total is None:
            raise _check.ArgumentError(
                "penalty",
                f"{a!r} + {b!r}, whose prox has no closed form",
                "any penalty + L2; a separable convex penalty or a total variation + bounds; group "
                "norms + NonNegative; L1 + GroupLasso or TotalVariation; two of one kind that "
                "differ in strength; a Joint of a sum; smooth ones may also go into the loss",
            )
    return total.on(a.where)


def _parts(p: Penalty) -> list[Penalty]:
    """The penalties that a sum was made of, so that their order does not matter."""
    match p:
        case Ridged():
            return [*_parts(p.penalty), L2(p.l2)]
        case Bounded():
            return [*_parts(p.penalty), p.interval]
        case ElasticNet():
            return [L1(p.l1), L2(p.l2)]
        case NonNegativeL1():
            return [L1(p.strength), NonNegative()]
        case SparseGroupLasso():
            return [L1(p.l1), GroupLasso(p.group, groups=p.groups, weights=p.weights)]
        case FusedLasso():
            return [L1(p.l1), TotalVariation(p.variation, axis=p.axis)]
    return [p.on(_where.kernels)]


def _place(p: Penalty) -> int:
    """L1 first, then what it goes into; bounds and the square last."""
    return (
        0 if isinstance(p, L1) else 2 if isinstance(p, Interval) else 3 if isinstance(p, L2) else 1
    )


def _same(a: Penalty, b: Penalty) -> Penalty | None:
    """Two of one kind, whose strengths add up."""
    if isinstance(a, Joint) and isinstance(b, Joint) and a.members == b.members:
        return dataclasses.replace(a, penalty=a.penalty + b.penalty)
    if type(a) is not type(b) or not a.scales:
        return None
    fixed = [f.name for f in dataclasses.fields(a) if f.name not in a.scales]
    if not all(_equal(getattr(a, name), getattr(b, name)) for name in fixed):
        return None
    return dataclasses.replace(a, **{n: _total(getattr(a, n), getattr(b, n)) for n in a.scales})


def _total(a: Number, b: Number) -> Number:
    """The sum of two strengths, each a scalar or of x's shape."""
    if jnp.ndim(a) and jnp.ndim(b) and jnp.shape(a) != jnp.shape(b):
        given = f"arrays of shape {jnp.shape(a)} and {jnp.shape(b)}"
        raise _check.ArgumentError("strength", given, "scalars, or arrays of one shape")
    return a + b


def _equal(a: Any, b: Any) -> bool:
    """Whether two fields are known to be equal: traced numbers are only where they are the same."""
    if a is b:
        return True
    if not (_check.is_concrete(a) and _check.is_concrete(b)):
        return type(a) is type(b) and not _check.is_number(a) and a == b
    return jnp.shape(a) == jnp.shape(b) and bool(jnp.all(jnp.asarray(a) == jnp.asarray(b)))


def _named(a: Penalty, b: Penalty) -> Penalty | None:
    """Sums that are a class of their own."""
    one_strength = isinstance(a, L1) and jnp.ndim(a.strength) == 0
    match a, b:
        case Interval(), Interval():
            (lower, upper), (low, up) = a.bounds(), b.bounds()
            return Box(_extreme("max", lower, low), _extreme("min", upper, up))
        case L1(), NonNegative():
            return NonNegativeL1(a.strength)
        case L1(), L2() if one_strength:
            return ElasticNet(a.strength, b.strength)
        case ElasticNet(), L2():
            return dataclasses.replace(a, l2=a.l2 + b.strength)
        case L1(), GroupLasso() if one_strength:
            return SparseGroupLasso(a.strength, b.strength, groups=b.groups, weights=b.weights)
        case SparseGroupLasso(), GroupLasso():
            same = a.groups == b.groups and _equal(a.weights, b.weights)
            return dataclasses.replace(a, group=a.group + b.strength) if same else None
        case L1(), TotalVariation() if one_strength:
            return FusedLasso(a.strength, b.strength, axis=b.axis)
        case FusedLasso(), TotalVariation() if a.axis == b.axis:
            return dataclasses.replace(a, variation=a.variation + b.strength)
        case Bounded(), Interval():
            return dataclasses.replace(a, interval=_named(a.interval, b))
        case Joint(), L2():
            return dataclasses.replace(a, penalty=a.penalty + b)
        case Ridged(), L2():
            return Ridged(a.penalty, a.l2 + b.strength)
    return None


def _general(a: Penalty, b: Penalty) -> Penalty | None:
    if isinstance(a, Joint):
        return None
    if isinstance(b, L2):
        return Ridged(a, b.strength)
    if isinstance(b, Interval):
        convex_coordinates = a.separable and a.convex
        variation = isinstance(a, (TotalVariation, FusedLasso))
        norms = isinstance(a, (GroupLasso, L2Norm, SparseGroupLasso))
        nonnegative = _equal(b.bounds()[0], 0.0) and _equal(b.bounds()[1], jnp.inf)
        if convex_coordinates or variation or (norms and nonnegative):
            return Bounded(a, b)
    return None


def _extreme(which: Literal["max", "min"], a: Any, b: Any) -> Any:
    """The larger or smaller of two bounds; a Python number where both are."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return max(a, b) if which == "max" else min(a, b)
    return jnp.maximum(a, b) if which == "max" else jnp.minimum(a, b)


@penalty
class Multiple(Derived):
    """c * R for an R whose multiples are of another form."""

    penalty: Penalty = number(part)
    multiplier: Number

    def _value(self, x: Array) -> Array:
        return self.multiplier * self.penalty._value(x)

    def _prox(self, x: Array, step: Array) -> Array:
        return self.penalty._prox(x, self.multiplier * step)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        c = jnp.asarray(self.multiplier)
        safe = jnp.where(c > 0, c, 1)
        return jnp.where(c > 0, c * self.penalty._subdiff_distance(x, grad / safe), jnp.abs(grad))

    def _critical_multiplier(self, grad: Array) -> Array:
        return ratio(self.penalty._critical_multiplier(grad), self.multiplier)

    def _formula(self) -> str:
        return f"{self.multiplier!r} * {self.penalty._formula()}"


@penalty
class Ridged(Derived):
    r"""$R(x) + \frac{l_2}{2} \|x\|^2$."""

    penalty: Penalty = number(part)
    l2: Number

    def _value(self, x: Array) -> Array:
        return self.penalty._value(x) + self.l2 / 2 * jnp.sum(jnp.square(x))

    def _prox(self, x: Array, step: Array) -> Array:
        divisor = 1 + step * self.l2
        return self.penalty._prox(x / divisor, step / divisor)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        return self.penalty._subdiff_distance(x, grad + self.l2 * x)

    def _critical_multiplier(self, grad: Array) -> Array:
        return self.penalty._critical_multiplier(grad)  # the square is flat at 0

    def _formula(self) -> str:
        return f"{self.penalty._formula()} + L2({self.l2!r})"


@penalty
class Bounded(Derived):
    """R within an interval: the same bounds for each coordinate."""

    penalty: Penalty = number(part)
    interval: Interval = number(part)

    @property
    def has_subdiff_distance(self) -> bool:
        return self.separable

    def _value(self, x: Array) -> Array:
        return self.penalty._value(x) + self.interval._value(x)

    def _prox(self, x: Array, step: Array) -> Array:
        if isinstance(self.penalty, (GroupLasso, L2Norm, SparseGroupLasso)):
            return self.penalty._prox(self.interval._prox(x, step), step)
        return self.interval._prox(self.penalty._prox(x, step), step)

    def _subdiff_distance(self, x: Array, grad: Array) -> Array:
        if not self.separable:
            return super()._subdiff_distance(x, grad)
        lower, upper = self.interval.bounds()
        # Where R alone would move a coordinate beyond the bound that it is at, it may stay.
        move = self.penalty._prox(x - grad, jnp.ones((), x.dtype)) - x
        held = ((x <= lower) & (move < 0)) | ((x >= upper) & (move > 0))
        distance = jnp.where(held, 0, self.penalty._subdiff_distance(x, grad))
        return jnp.where((x < lower) | (x > upper), jnp.inf, distance)

    def _critical_multiplier(self, grad: Array) -> Array:
        if isinstance(self.penalty, (TotalVariation, FusedLasso)):
            given = f"{self!r}, whose critical multiplier has no direct form"
            raise _check.ArgumentError("penalty", given, "the penalty without bounds")
        # Only what would push 0 to where the bounds allow needs a penalty to hold it.
        lower, upper = self.interval.bounds()
        zero = jnp.zeros_like(grad)
        held = jnp.where(lower < 0, jnp.maximum(grad, 0), 0)
        held += jnp.where(upper > 0, jnp.minimum(grad, 0), 0)
        return self.penalty._critical_multiplier(held) + self.interval._value(zero)

    def _formula(self) -> str:
        return f"{self.penalty._formula()} + {self.interval._formula()}"
