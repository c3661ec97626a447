r"""Cross-entropy of rows of logits, and its gradient, to the last bits of a confident prediction.

With the labels' distribution v (smoothed, and weighted, so that its sum is any number), lse the
logarithm of the sum of exponentials and z the coefficient of the z-loss,

$$L = \sum_k v_k (lse - x_k) + z \, lse^2, \qquad
\partial L / \partial x_k = p_k \left(\sum_j v_j + 2 z \, lse\right) - v_k.$$

Where p is near 1 for the label, both are differences of nearly equal numbers. So a derivative's sum
of exponentials is taken without the label: with e = exp(x - max) and s = e_label + others, the loss
has log1p(s - 1), and the gradient 1 - p_label = others / s. The exponentials are made once, and
become the gradient in their place.

Logits are float32 at least; figures of a row have length 1 along the axis of the classes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


class Layout(NamedTuple):
    """Where the classes are.

    Attributes:
        axis: of the logits, counted from 0.
        axis_name: the mesh axis of a ``shard_map`` along which classes are sharded, or None.
    """

    axis: int
    axis_name: str | None = None

    def devices(self) -> int:
        """How many hold a part of the classes each."""
        return 1 if self.axis_name is None else jax.lax.psum(1, self.axis_name)

    def local_labels(self, labels: jax.Array, count: int) -> jax.Array:
        """Labels out of `count`, counted from the device's first class."""
        if self.axis_name is None:
            return labels
        first = jax.lax.axis_index(self.axis_name) * (count // self.devices())
        return labels - first.astype(labels.dtype)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest logit, and 0 of a row of -inf: -inf minus -inf would be NaN."""
        found = jax.lax.stop_gradient(jnp.max(x, self.axis, keepdims=True))
        found = found if self.axis_name is None else jax.lax.pmax(found, self.axis_name)
        return jnp.where(found == -jnp.inf, 0, found)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over a device's own classes."""
        return jnp.sum(x, self.axis, keepdims=True)

    def added(self, *figures: jax.Array) -> tuple[jax.Array, ...]:
        """The figures of all devices, in one collective."""
        return figures if self.axis_name is None else jax.lax.psum(figures, self.axis_name)

    def is_label(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Where a class is the label; by comparison, which a sharded axis takes, too."""
        return jax.lax.broadcasted_iota(labels.dtype, x.shape, self.axis) == labels

    def class_numbers(self, x: jax.Array, dtype: Any) -> jax.Array:
        """0, 1, ... along the axis, as an array that is read.

        On a CPU it takes XLA as long to count classes one by one as their exponentials take.
        """
        count = x.shape[self.axis]
        shape = [count if i == self.axis else 1 for i in range(x.ndim)]
        # Behind a barrier: else XLA sees that these are numbers to be counted.
        numbers = np.arange(count, dtype=dtype).reshape(shape)
        return jax.lax.optimization_barrier(jnp.asarray(numbers))

    def at_label(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """The label's entry of a device that has it, and 0 elsewhere."""
        # Negative indices count from the end, also in "fill" mode.
        labels = jnp.where(labels < 0, x.shape[self.axis], labels)
        return jnp.take_along_axis(x, labels, self.axis, mode="fill", fill_value=0)


# Integer labels -----------------------------------------------------------------------------------


class IndexTargets(NamedTuple):
    """What rows with integer labels weigh their classes with: v_k = on [k = label] + off w_k.

    Attributes:
        labels: of each row. Under a mesh axis they are counted from its device's first class.
        on: what the label has beside its share of `off`; NaN where it is no class.
        off: what every class has, times its weight; None for nothing, at no cost.
        weights: w, which broadcast with the logits; None for 1.
        total: the sum of w over all classes.
        z: the coefficient of the z-loss; None for none, at no cost.
    """

    labels: jax.Array
    on: jax.Array
    off: jax.Array | None
    weights: jax.Array | None
    total: jax.Array
    z: jax.Array | None

    def counts(self) -> jax.Array:
        """Whether a row has a loss. One that has none may hold anything."""
        factors = [f for f in (self.on, self.off, self.z) if f is not None]
        return functools.reduce(jnp.logical_or, [f != 0 for f in factors])


class Sums(NamedTuple):
    """The sums of a row.

    Attributes:
        largest: the largest logit m; 0 where all are -inf.
        at_label: the label's logit.
        others: the sum of exp(x - m) over the classes that are not the label.
        away: the sum of w (m - x) over all classes; None where it is not needed.
    """

    largest: jax.Array
    at_label: jax.Array
    others: jax.Array
    away: jax.Array | None

    def log_sum(self) -> jax.Array:
        """Log sum exp(x - m), so that lse = m + log_sum."""
        return jnp.log1p(jnp.expm1(self.at_label - self.largest) + self.others)

    def parts(self, targets: IndexTargets) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """What on, off and z are the factors of."""
        log_sum = self.log_sum()
        every = None if self.away is None else times(targets.total, log_sum) + self.away
        return self.largest - self.at_label + log_sum, every, jnp.square(self.largest + log_sum)


def index_loss_of(row: Sums, targets: IndexTargets) -> jax.Array:
    """L of the sums."""
    factors = (targets.on, targets.off, targets.z)
    pairs = zip(factors, row.parts(targets), strict=True)
    terms = [times(f, part) for f, part in pairs if f is not None and part is not None]
    return sum(terms[1:], terms[0])


def index_sums(layout: Layout, x: jax.Array, targets: IndexTargets) -> tuple[jax.Array, Sums]:
    """The exponentials exp(x - m) of all classes but the label, which has 0, and the sums."""
    largest = layout.largest(x)
    is_label = layout.class_numbers(x, targets.labels.dtype) == targets.labels
    others = jnp.where(is_label, 0, jnp.exp(x - largest))
    return others, _sums(layout, x, largest, targets, others)


def _sums(
    layout: Layout, x: jax.Array, largest: jax.Array, targets: IndexTargets, others: jax.Array
) -> Sums:
    figures = [layout.sum(others), layout.at_label(x, targets.labels)]
    if targets.off is not None:
        # The maximum is taken off here too: a sum of large logits would lose their differences.
        # Behind a barrier: else XLA keeps x - m, an array of the logits' size, to use it twice.
        below = x - jax.lax.optimization_barrier(largest)
        if targets.weights is not None:
            # 0 * -inf is 0: not by a selection, in front of which XLA would keep an array, too.
            below = targets.weights * jnp.maximum(below, jnp.finfo(x.dtype).min)
        figures.append(-layout.sum(below))
    total, at_label, *away = layout.added(*figures)
    found = away[0] if away else None
    if found is not None and targets.weights is not None:
        # An impossible class, that has a weight above 1e-8.
        found = jnp.where(found > 1e-8 * jnp.finfo(x.dtype).max, jnp.inf, found)
    return Sums(largest, at_label, total, found)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def index_loss(layout: Layout, x: jax.Array, targets: IndexTargets) -> jax.Array:
    """L for integer labels, differentiable in all that is no integer, to any order."""
    # For the value alone the label stays in: XLA fuses such a sum with its exponentials.
    largest = layout.largest(x)
    row = _sums(layout, x, largest, targets, jnp.exp(x - largest))
    row = row._replace(others=row.others - jnp.exp(row.at_label - largest))
    return index_loss_of(row, targets)


@functools.partial(index_loss.defjvp, symbolic_zeros=True)
def _(layout: Layout, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, targets), (dx, d) = primals, tangents
    others, row = index_sums(layout, x, targets)
    label, every, square = row.parts(targets)
    tangent = jnp.zeros_like(label)
    if _moves(dx):
        known = jax.lax.stop_gradient((others, row))
        gradient = index_gradient(layout, x, targets, *known)
        tangent += layout.added(layout.sum(gradient * dx))[0]
    for factor, part in ((d.on, label), (d.off, every), (d.z, square)):
        if _moves(factor) and part is not None:
            tangent += factor * _finite(part)
    if targets.off is not None and _moves(d.total):
        tangent += d.total * (targets.off * _finite(row.log_sum()))
    if targets.off is not None and _moves(d.weights):
        losses = targets.off * _finite(row.largest - x)
        tangent += layout.added(layout.sum(d.weights * losses))[0]
    return index_loss_of(row, targets), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def index_gradient(
    layout: Layout, x: jax.Array, targets: IndexTargets, others: jax.Array, row: Sums
) -> jax.Array:
    """dL/dx of the exponentials and sums of `index_sums`; differentiable, to any order."""
    labels, on, off, weights, total, z = targets
    at = jnp.exp(row.at_label - row.largest)
    inverse = 1 / (at + row.others)
    p_label, p_others = at * inverse, row.others * inverse
    # All of a row has the same factor of p but its label, where the two terms cancel.
    factor, share, at_label = on, 0, -on * p_others
    if off is not None:
        own = jnp.ones_like(on) if weights is None else layout.at_label(weights, labels)
        factor += off * total
        share = off if weights is None else off * weights
        at_label += off * ((total - own) * p_label - own * p_others)
    if z is not None:
        push = 2 * z * (row.largest + row.log_sum())
        factor += push
        at_label += push * p_label
    is_label = layout.is_label(x, labels)
    gradient = jnp.where(is_label, at_label, others * (inverse * factor) - share)
    return jnp.where(targets.counts(), gradient, 0)


@index_gradient.defjvp
def _(layout: Layout, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, targets, *known), (dx, d, *_) = primals, tangents
    is_label = layout.is_label(x, targets.labels).astype(x.dtype)

    def plain(x: jax.Array, on: Any, off: Any, weights: Any, total: Any, z: Any) -> jax.Array:
        x = jnp.where(targets.counts(), x, 0)
        v, factor = on * is_label, on
        if off is not None:
            v = v + (off if weights is None else off * weights)
            factor = on + off * total
        return _plain_gradient(layout, x, v, factor, z)

    _, change = jax.jvp(plain, (x, *targets[1:]), (dx, *d[1:]))
    return index_gradient(layout, x, targets, *known), jnp.where(targets.counts(), change, 0)


def _plain_gradient(
    layout: Layout, x: jax.Array, v: jax.Array, factor: jax.Array, z: Any
) -> jax.Array:
    """dL/dx by the formula, for its own derivatives."""
    largest = layout.largest(x)
    e = jnp.exp(x - largest)
    (s,) = layout.added(layout.sum(e))
    if z is not None:
        factor = factor + 2 * z * (largest + jnp.log(s))
    return e / s * factor - v


# Any distribution v -------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def soft_loss(layout: Layout, x: jax.Array, v: jax.Array, z: jax.Array | None) -> jax.Array:
    """L for v of x's shape, differentiable to any order. None for z is 0, at no cost."""
    return _soft_parts(layout, x, v, z)[0]


def _soft_parts(layout: Layout, x: jax.Array, v: jax.Array, z: Any) -> tuple[jax.Array, ...]:
    """L; the exponentials of all but the largest classes; m; s - 1; and log s."""
    largest = layout.largest(x)
    is_largest = x == largest
    # 0 for the largest, yet with its derivative.
    others = jnp.where(is_largest, jnp.expm1(x - largest), jnp.exp(x - largest))
    number = layout.sum(is_largest.astype(x.dtype))
    less = layout.sum(others) + (number - 1)
    log_sum = jnp.log1p(less)
    loss = times(layout.sum(v), log_sum) + layout.sum(times(v, largest - x))
    if z is not None:
        loss += times(z, jnp.square(largest + log_sum))
    return loss, others, largest, less, log_sum


@functools.partial(soft_loss.defjvp, symbolic_zeros=True)
def _(layout: Layout, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, v, z), (dx, dv, dz) = primals, tangents
    loss, *known = _soft_parts(layout, x, v, z)
    largest, log_sum = known[1], known[3]
    tangent = jnp.zeros_like(loss)
    if _moves(dx):
        gradient = _soft_gradient(layout, x, v, z, jax.lax.stop_gradient(known))
        tangent += layout.sum(gradient * dx)
    if _moves(dv):
        tangent += layout.sum(dv * _finite(largest - x + log_sum))
    if _moves(dz):
        tangent += dz * _finite(jnp.square(largest + log_sum))
    return loss, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _soft_gradient(layout: Layout, x: jax.Array, v: jax.Array, z: Any, known: Any) -> jax.Array:
    others, largest, less, log_sum = known
    inverse = 1 / (1 + less)
    is_largest = x == largest
    p = jnp.where(is_largest, 1, others) * inverse
    falls = less * inverse  # 1 - p of the largest, of which no digit is lost
    # Of the largest all other classes' weights: their own sum loses no digit to a weight near 1.
    rest_of, largest_of = (layout.sum(jnp.where(mask, v, 0)) for mask in (~is_largest, is_largest))
    total = rest_of + jnp.where(is_largest, largest_of - v, largest_of)
    gradient = total * p - v * jnp.where(is_largest, falls, 1)
    return gradient if z is None else gradient + 2 * z * (largest + log_sum) * p


@_soft_gradient.defjvp
def _(layout: Layout, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, v, z, known), (dx, dv, dz, _) = primals, tangents

    def plain(x: jax.Array, v: jax.Array, z: Any) -> jax.Array:
        return _plain_gradient(layout, x, v, layout.sum(v), z)

    return _soft_gradient(layout, x, v, z, known), jax.jvp(plain, (x, v, z), (dx, dv, dz))[1]


# Small pieces -------------------------------------------------------------------------------------


def times(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Weight * x, 0 where the weight is 0 and x infinite: what can't happen costs nothing."""
    return weight * jnp.where((weight != 0) | jnp.isfinite(x), x, 0)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _moves(tangent: Any) -> bool:
    return not (tangent is None or isinstance(tangent, SymbolicZero))
