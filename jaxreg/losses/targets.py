"""The arguments that losses over classes share, and what each row weighs its classes with."""

from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check
from jaxreg.losses.rows import IndexTargets, Layout

Number = float | jax.Array
Spread = Literal["uniform", "others"]
Reduction = Literal["none", "mean", "sum"]


class Options(NamedTuple):
    """The arguments of these names."""

    smoothing: Number
    z_loss: Number
    soft_cap: Number | None
    ignore_index: int | None
    spread: Spread
    reduction: Reduction

    def checked(self) -> "Options":
        """The same.

        Raises:
            ValueError: where one is not accepted.
        """
        cap, ignored = self.soft_cap, self.ignore_index
        return Options(
            _check.fraction("smoothing", self.smoothing),
            _check.nonnegative("z_loss", self.z_loss),
            None if cap is None else _check.positive_finite("soft_cap", cap),
            None if ignored is None else _check.integer("ignore_index", ignored),
            cast(Spread, _check.choice("spread", self.spread, get_args(Spread))),
            cast(Reduction, _check.choice("reduction", self.reduction, get_args(Reduction))),
        )

    def capped(self, logits: jax.Array) -> jax.Array:
        """The logits within (-c, c)."""
        return logits if self.soft_cap is None else soft_capped(logits, self.soft_cap)


def soft_capped(logits: jax.Array, soft_cap: Number) -> jax.Array:
    """c tanh(x / c); an impossible class, of -inf, stays impossible."""  # noqa: D403
    cap = jnp.asarray(soft_cap).astype(logits.dtype)
    return jnp.where(logits == -jnp.inf, logits, cap * jnp.tanh(logits / cap))


class Classes(NamedTuple):
    """The classes of logits. Arrays have the logits' rank and dtype.

    Attributes:
        layout: where they are.
        size: how many classes there are, those that do not exist included.
        number: how many of them exist.
        weights: of a device's own classes; None for 1.
        shares: the weights, and 0 for classes that do not exist; None for 1.
        total: the sum of the shares over all classes.
        exist: bools of a device's own classes; None for all.
    """

    layout: Layout
    size: int
    number: jax.Array
    weights: jax.Array | None
    shares: jax.Array | None
    total: jax.Array
    exist: jax.Array | None

    def at_labels(self, labels: jax.Array, figures: jax.Array) -> jax.Array:
        """Figures of the classes at labels, which are counted from a device's first class."""
        return self.layout.added(self.layout.at_label(figures, labels))[0]


def classes_of(
    shape: tuple[int, ...], layout: Layout, dtype: Any, class_weights: Any, where: Any
) -> Classes:
    """The classes of logits of a shape, by the arguments of these names."""
    axis, ones = layout.axis, (1,) * len(shape)
    along = (*ones[:axis], shape[axis], *ones[axis + 1 :])
    size = shape[axis] * layout.devices()
    total = number = jnp.full(ones, size, dtype)
    weights = exist = None
    if class_weights is not None:
        accepted = f"{shape[axis]} finite numbers >= 0, one a class"
        class_weights = _check.array("class_weights", class_weights, accepted, _check.is_weight)
        if np.shape(class_weights) != (shape[axis],):
            raise _check.ArgumentError("class_weights", _check.describe(class_weights), accepted)
        weights = jnp.asarray(class_weights).astype(dtype).reshape(along)
    shares = weights
    if where is not None:
        exist = existing(where, shape)
        exist = jnp.broadcast_to(exist, np.broadcast_shapes(exist.shape, along))
        shares = exist.astype(dtype)
        (number,) = layout.added(layout.sum(shares))
        shares = shares if weights is None else shares * weights
    if shares is not None:
        (total,) = layout.added(layout.sum(shares))
    return Classes(layout, size, number, weights, shares, total, exist)


def existing(where: Any, shape: tuple[int, ...]) -> jax.Array:
    """Bools that broadcast to a shape, of its rank."""
    exist = jnp.asarray(where)
    padded = (1,) * (len(shape) - exist.ndim) + exist.shape
    pairs = zip(padded, shape, strict=False)
    fits = len(padded) == len(shape) and all(n in (1, m) for n, m in pairs)
    if exist.dtype != bool or not fits:
        accepted = f"bools that broadcast to the shape of the logits, {shape}"
        raise _check.ArgumentError("where", _check.describe(where), accepted)
    return exist.reshape(padded)


def floating(name: str, x: Any, accepted: str, rank: int = 0) -> jax.Array:
    """A real floating array of a rank at least."""
    numbers = _check.is_number(x) or isinstance(x, (list, tuple))
    array = jnp.asarray(x) if numbers else None
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim < rank:
        raise _check.ArgumentError(name, _check.describe(x), accepted)
    return array


def class_labels(
    labels: Any,
    shape: tuple[int, ...],
    axis: int,
    ignore_index: int | None,
    *,
    soft: bool = True,
    named: tuple[str, ...] = ("axis", "ignore_index"),
) -> jax.Array:
    """Labels that fit logits of a shape: integers of its rows, or probabilities of the shape.

    Args:
        labels: to be checked.
        shape: of the logits.
        axis: of the classes.
        ignore_index: an integer label that is no class.
        soft: whether they may be probabilities.
        named: which of these arguments the user can give, for hints.
    """
    rows, count = shape[:axis] + shape[axis + 1 :], shape[axis]
    ignored = "" if ignore_index is None else f" or {ignore_index}"
    accepted = f"integers of shape {rows} in [0, {count}){ignored}"
    accepted += f", or floating probabilities of shape {shape}" if soft else ""
    labels = np.asarray(labels) if isinstance(labels, (list, tuple)) else labels
    # In NumPy: within a trace even a comparison of constants is traced.
    concrete = np.asarray(labels) if _check.is_concrete(labels) else None
    if not _check.is_number(labels):
        raise _check.ArgumentError("labels", _check.describe(labels), accepted)
    labels = jnp.asarray(labels)
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    floating = soft and jnp.issubdtype(labels.dtype, jnp.floating)
    if not ((integer and labels.shape == rows) or (floating and labels.shape == shape)):
        others = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == labels.shape]
        turned = others and integer and axis not in others and "axis" in named
        hint = f"; they fit logits whose classes are along axis={others[0]}" if turned else ""
        raise _check.ArgumentError("labels", _check.describe(labels), accepted + hint)
    if floating and concrete is not None:
        _check.array("labels", concrete, "finite numbers >= 0", _check.is_weight)
    if floating and ignore_index is not None:
        given = f"{ignore_index} with labels that are probabilities"
        raise _check.ArgumentError("ignore_index", given, "None, or integer labels")
    if integer and concrete is not None:
        wrong = (concrete < 0) | (concrete >= count)
        if ignore_index is not None:
            wrong &= concrete != ignore_index
        if wrong.any():
            value = concrete[wrong].flat[0]
            hint = f"; ignore_index={value} leaves its examples out"
            hint = "" if ignored or value >= 0 or "ignore_index" not in named else hint
            raise _check.ArgumentError("labels", f"the value {value}", accepted + hint)
    # 8 bits can't count 300 classes.
    narrow = integer and jnp.iinfo(labels.dtype).bits < 32
    return labels.astype(jnp.int32) if narrow else labels


def index_targets(
    labels: jax.Array, classes: Classes, options: Options
) -> tuple[IndexTargets, jax.Array]:
    """The targets of rows whose labels have length 1 along the axis, and how often each counts."""
    dtype = classes.number.dtype
    counts = jnp.ones(labels.shape, dtype)
    if options.ignore_index is not None:
        counts = (labels != options.ignore_index).astype(dtype)
        labels = jnp.where(labels == options.ignore_index, 0, labels)
    is_class = (labels >= 0) & (labels < classes.size)
    labels = classes.layout.local_labels(labels, classes.size)
    weight = counts
    if classes.weights is not None:
        weight = counts * classes.at_labels(labels, classes.weights)
    on, off, z = jnp.where(is_class, weight, jnp.nan), None, None
    if not _is_zero(options.smoothing):
        e = jnp.asarray(options.smoothing).astype(dtype)
        if options.spread == "uniform":
            on, off = on * (1 - e), counts * _share(e, classes)
        else:
            e, others = _of_others(e, classes)
            off = counts * (e / others)
            back = (
                off if classes.shares is None else off * classes.at_labels(labels, classes.shares)
            )
            on = on * (1 - e) - back
    if not _is_zero(options.z_loss):
        z = counts * jnp.asarray(options.z_loss).astype(dtype)
    return IndexTargets(labels, on, off, classes.shares, classes.total, z), weight


def _share(e: jax.Array, classes: Classes) -> jax.Array:
    """A class's share, e / K; finite where no class exists, and so none has a share."""
    return e / jnp.maximum(classes.number, 1)


def _of_others(e: jax.Array, classes: Classes) -> tuple[jax.Array, jax.Array]:
    """The smoothing, and the number of classes beside the label: one that is alone keeps all."""
    is_alone = classes.number < 2
    return jnp.where(is_alone, 0, e), jnp.where(is_alone, 1, classes.number - 1)


def soft_targets(
    q: jax.Array, classes: Classes, options: Options
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """The targets of rows with a distribution q, the z-loss, and how often each row counts."""
    dtype = classes.number.dtype
    weigh = lambda v, w: v if w is None else v * w  # noqa: E731
    v = weigh(q, classes.weights)
    weight = ones = jnp.ones_like(classes.layout.sum(q))
    if classes.weights is not None:
        weight = classes.layout.sum(v)
    if not _is_zero(options.smoothing):
        e = jnp.asarray(options.smoothing).astype(dtype)
        if options.spread == "uniform":
            share = jnp.broadcast_to(_share(e, classes), q.shape)
        else:
            e, others = _of_others(e, classes)
            share = e * (1 - q) / others
        v = (1 - e) * v + weigh(share, classes.shares)
    z = None if _is_zero(options.z_loss) else ones * jnp.asarray(options.z_loss).astype(dtype)
    return v, z, weight


def reduced(losses: jax.Array, weight: jax.Array, classes: Classes, options: Options) -> jax.Array:
    """The losses of rows that count `weight` times, reduced."""
    if options.reduction == "none":
        return jnp.squeeze(losses, classes.layout.axis)
    if options.reduction == "sum":
        return jnp.sum(losses)
    return jnp.sum(losses) * inverse(jnp.sum(weight))


def mean_or_sum(
    losses: jax.Array, reduction: Reduction, counts: jax.Array | None = None
) -> jax.Array:
    """Losses of which only those that `counts` chooses exist, reduced; the mean of none is 0."""
    _check.choice("reduction", reduction, get_args(Reduction))
    if counts is not None:
        losses = jnp.where(counts, losses, 0)
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    if reduction == "sum":
        return total
    number = losses.size if counts is None else jnp.sum(counts)
    return total * inverse(jnp.asarray(number, total.dtype))


def inverse(number: jax.Array) -> jax.Array:
    """1 / number, and 0 of 0: the mean of nothing is 0."""
    return jnp.where(number > 0, 1 / jnp.where(number > 0, number, 1), 0)


def _is_zero(value: Any) -> bool:
    return _check.is_host(value) and value == 0
