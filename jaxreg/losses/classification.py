"""Losses of predicted classes beside the cross-entropy: of one class among two or many."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check, _tree
from jaxreg.losses.cross_entropy import smoothed_cross_entropy
from jaxreg.losses.rows import Layout, times
from jaxreg.losses.targets import (
    Classes,
    Number,
    Reduction,
    class_labels,
    classes_of,
    existing,
    floating,
    mean_or_sum,
)


def sigmoid_smoothed_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: Number = 0.1,
    *,
    positive_weight: Any = None,
    where: Any = None,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""Cross-entropy of two classes, or of many that do not exclude each other.

    $-w \, q \log \sigma(x) - (1 - q) \log \sigma(-x)$ with $q = (1 - e) y + e / 2$, as Keras'
    ``BinaryCrossentropy(label_smoothing=e)`` has it; without smoothing it is torch's
    ``BCEWithLogitsLoss(pos_weight=w)``.

    Args:
        logits: x, real floating, of any shape.
        labels: y of the same shape: bools, the integers 0 and 1, or probabilities.
        smoothing: e in [0, 1), or a traced scalar.
        positive_weight: w, a number >= 0 or an array that broadcasts with the logits.
        where: bools that broadcast with the logits: the entries that count. The others have the
            loss 0, whatever they hold.
        reduction: "none" for the loss of each entry, "sum", or "mean" over those that count (0
            where none does).

    Returns:
        An array of the logits' shape, or a scalar; float32 (float64 for 64-bit logits). A traced
        label outside [0, 1] gives NaN.

    Raises:
        ValueError: where an argument is out of its range or shapes do not fit.

    >>> import jax.numpy as jnp, jaxreg
    >>> losses = jaxreg.sigmoid_smoothed_cross_entropy(jnp.array([0.0, 4.0]), jnp.array([0, 1]))
    >>> [round(float(loss), 4) for loss in losses]
    [0.6931, 0.2181]
    """
    e = _check.fraction("smoothing", smoothing)
    x = _logits(logits)
    counts = None if where is None else jnp.broadcast_to(existing(where, x.shape), x.shape)
    y = _binary(labels, x.shape, where).astype(x.dtype)
    if counts is not None:
        # Twice: an entry that does not count may be NaN, whose derivative would be, too.
        x, y = jnp.where(counts, x, 0), jnp.where(counts, y, 0)
    y = jnp.where((y >= 0) & (y <= 1), y, jnp.nan)
    e = jnp.asarray(e).astype(x.dtype)
    q = (1 - e) * y + e / 2
    positive = q
    if positive_weight is not None:
        weight = jnp.asarray(_check.strengths("positive_weight", positive_weight))
        positive *= _fitting("positive_weight", weight, x.shape).astype(x.dtype)
    losses = times(positive, jax.nn.softplus(-x)) + times(1 - q, jax.nn.softplus(x))
    return mean_or_sum(losses, reduction, counts)


def focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    gamma: Number = 2.0,
    *,
    class_weights: Any = None,
    ignore_index: int | None = None,
    where: Any = None,
    axis: int = -1,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""Cross-entropy in which easy examples weigh less, $-w_y (1 - p_y)^\gamma \log p_y$.

    Args:
        logits: as in `jaxreg.smoothed_cross_entropy`.
        labels: class indices, integers of the logits' shape without `axis`.
        gamma: $\gamma$ >= 0, or a traced scalar; 0 gives the cross-entropy.
        class_weights: w, K numbers >= 0 (the paper's alpha).
        ignore_index: the label of examples that have no loss and do not count.
        where: bools that broadcast with the logits: the classes that exist.
        axis: of the classes.
        reduction: "none"; "sum"; or "mean" over the examples whose label is not ignored.

    Returns:
        The loss of each example, or a scalar; float32 (float64 for 64-bit logits).

    Raises:
        ValueError: as `jaxreg.smoothed_cross_entropy` does, or where gamma is negative or NaN.

    Source: T.-Y. Lin et al., *Focal loss for dense object detection*, ICCV 2017, arXiv:1708.02002.

    >>> import jax.numpy as jnp, jaxreg
    >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])
    >>> [round(float(loss), 4) for loss in jaxreg.focal_loss(logits, labels)]
    [0.0018, 0.1733]
    """
    gamma = _check.nonnegative("gamma", gamma)
    options = {"ignore_index": ignore_index, "where": where, "axis": axis}
    nll = _nll(labels, logits, **options)
    weighted = nll
    classes = _classes(logits, axis, nll.dtype, class_weights)
    if classes.weights is not None:
        each = classes.at_labels(jnp.expand_dims(jnp.asarray(labels), axis), classes.weights)
        weighted = times(jnp.squeeze(each, axis), nll)
    falls = -jnp.expm1(-nll)  # 1 - p, of which a derivative loses no digit
    # A power has no derivative at 0, and its second one may overflow near it: below 1e-19 (in
    # float32) the loss is as good as 0.
    seen = falls > jnp.finfo(nll.dtype).tiny ** 0.5
    power = jnp.where(seen, falls, 1) ** jnp.asarray(gamma).astype(nll.dtype)
    # An impossible label has an infinite loss, and the finite derivative of the cross-entropy.
    impossible = nll == jnp.inf
    product = jnp.where(seen, power, falls) * jnp.where(impossible, 0, weighted)
    losses = jnp.where(impossible, weighted, product)
    return mean_or_sum(losses, reduction, _counts(labels, ignore_index))


def poly_loss(
    logits: jax.Array,
    labels: jax.Array,
    epsilon: Number = 1.0,
    smoothing: Number = 0.0,
    *,
    ignore_index: int | None = None,
    where: Any = None,
    axis: int = -1,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""Poly-1: cross-entropy with another first coefficient, $L + \epsilon \sum_k q_k (1 - p_k)$.

    The cross-entropy is $\sum_j (1 - p_y)^j / j$; this is it with $1 + \epsilon$ for j = 1. q are
    the smoothed labels.

    Args:
        logits: as in `jaxreg.smoothed_cross_entropy`.
        labels: class indices, integers of the logits' shape without `axis`.
        epsilon: $\epsilon$ >= -1, or a traced scalar.
        smoothing: e in [0, 1), or a traced scalar.
        ignore_index: the label of examples that have no loss and do not count.
        where: bools that broadcast with the logits: the classes that exist.
        axis: of the classes.
        reduction: "none"; "sum"; or "mean" over the examples whose label is not ignored.

    Returns:
        The loss of each example, or a scalar; float32 (float64 for 64-bit logits).

    Raises:
        ValueError: as `jaxreg.smoothed_cross_entropy` does, or where epsilon is below -1 or not
            finite.

    Source: Z. Leng et al., *PolyLoss*, ICLR 2022, arXiv:2204.12511.

    >>> import jax.numpy as jnp, jaxreg
    >>> round(float(jaxreg.poly_loss(jnp.array([[0.0, 0.0]]), jnp.array([1]), 2.0)[0]), 4)
    1.6931
    """
    accepted = "a finite number >= -1"
    epsilon = _check.scalar("epsilon", epsilon, accepted, lambda v: -1 <= v < math.inf)
    options = {"ignore_index": ignore_index, "where": where, "axis": axis}
    nll = _nll(labels, logits, **options)
    losses = smoothed_cross_entropy(logits, labels, smoothing, **options)
    e = jnp.asarray(smoothing).astype(nll.dtype)
    number = jnp.squeeze(_classes(logits, axis, nll.dtype, where=where).number, axis)
    # The probabilities add up to 1: what the smoothing adds is the same for all.
    number = jnp.broadcast_to(jnp.maximum(number, 1), nll.shape)
    falls = (1 - e) * -jnp.expm1(-nll) + e * (1 - 1 / number)
    counts = _counts(labels, ignore_index)
    added = jnp.asarray(epsilon).astype(nll.dtype) * falls
    losses += added if counts is None else jnp.where(counts, added, 0)
    return mean_or_sum(losses, reduction, counts)


def entropy(
    logits: jax.Array, *, where: Any = None, axis: int = -1, reduction: Reduction = "none"
) -> jax.Array:
    r"""The entropy of predicted classes in nats, $H(p) = -\sum_k p_k \log p_k$, p = softmax(x).

    Args:
        logits: x, real floating, with the classes along `axis`; -inf for an impossible class.
        where: bools that broadcast with the logits: the classes that exist.
        axis: of the classes.
        reduction: "none" for each example, "mean" or "sum".

    Returns:
        The entropy of each example, of the logits' shape without `axis`, or a scalar; float32
        (float64 for 64-bit logits).

    Raises:
        ValueError: where an argument does not fit.

    >>> import jax.numpy as jnp, jaxreg
    >>> print(jaxreg.entropy(jnp.array([[0.0, 0.0, -jnp.inf], [9.0, 0.0, 0.0]])).round(4))
    [0.6931 0.0025]
    """
    x = _logits(logits)
    if where is not None:
        x = jnp.where(existing(where, x.shape), x, -jnp.inf)
    return mean_or_sum(_entropy(axis, x), reduction)


def confidence_penalty(
    logits: jax.Array,
    strength: Number = 0.1,
    *,
    where: Any = None,
    axis: int = -1,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""The negative entropy of predicted classes, $-\beta H(p)$, to be added to a loss.

    Args:
        logits: as in `jaxreg.entropy`, like what follows.
        strength: $\beta$ >= 0, or a traced scalar.
        where: bools that broadcast with the logits: the classes that exist.
        axis: of the classes.
        reduction: "none" for each example, "mean" or "sum".

    Returns:
        As `jaxreg.entropy`: at most 0.

    Raises:
        ValueError: where an argument does not fit, or the strength is negative or NaN.

    Source: G. Pereyra et al., *Regularizing neural networks by penalizing confident output
    distributions*, 2017, arXiv:1701.06548.

    >>> import jax.numpy as jnp, jaxreg
    >>> print(jaxreg.confidence_penalty(jnp.array([[0.0, 0.0], [9.0, 0.0]])).round(4))
    [-0.0693 -0.0001]
    """
    strength = _check.nonnegative("strength", strength)
    found = entropy(logits, where=where, axis=axis, reduction=reduction)
    return -jnp.asarray(strength).astype(found.dtype) * found


def symmetric_kl(
    logits: jax.Array,
    other_logits: jax.Array,
    *,
    where: Any = None,
    axis: int = -1,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""How two predictions differ, $\frac12 (KL(p \| q) + KL(q \| p))$, as R-Drop has it.

    That is $\frac12 \sum_k (p_k - q_k) (\log p_k - \log q_k)$, 0 or more. R-Drop adds it, times a
    strength, to the mean loss of two passes with different dropout masks. It is differentiated in
    both.

    Args:
        logits: of p, real floating, with the classes along `axis`.
        other_logits: of q, of the same shape.
        where: bools that broadcast with the logits: the classes that exist.
        axis: of the classes.
        reduction: "none" for each example, "mean" or "sum".

    Returns:
        One number for each example, of the logits' shape without `axis`, or a scalar; float32
        (float64 for 64-bit logits). Infinite where only one of them holds a class impossible.

    Raises:
        ValueError: where an argument does not fit.

    Source: X. Liang et al., *R-Drop: regularized dropout for neural networks*, NeurIPS 2021,
    arXiv:2106.14448.

    >>> import jax.numpy as jnp, jaxreg
    >>> kl = jaxreg.symmetric_kl(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
    >>> print(kl.round(4))
    [0.1155]
    """
    x, other = _logits(logits), _logits(other_logits, "other_logits")
    if x.shape != other.shape:
        raise _check.ArgumentError("other_logits", _check.describe(other), f"shape {x.shape}")
    (log_p, p), (log_q, q) = (_log_softmax(z, where, axis, -jnp.inf) for z in (x, other))
    never, other_never = log_p == -jnp.inf, log_q == -jnp.inf
    either = never | other_never
    apart = jnp.where(either, 0, log_p) - jnp.where(either, 0, log_q)
    terms = jnp.where(never ^ other_never, jnp.inf, (p - q) * apart)
    return mean_or_sum(jnp.sum(terms, axis) / 2, reduction)


# Pieces -------------------------------------------------------------------------------------------


def _logits(logits: Any, name: str = "logits") -> jax.Array:
    return _tree.widen(floating(name, logits, "a real floating array"))


def _binary(labels: Any, shape: tuple[int, ...], where: Any) -> jax.Array:
    """Labels of a shape that are from 0 to 1, where they count."""
    y = jnp.asarray(labels)
    if y.shape != shape or not (y.dtype == bool or _check.is_real(y)):
        accepted = f"bools, 0 and 1, or probabilities of shape {shape}"
        raise _check.ArgumentError("labels", _check.describe(labels), accepted)
    where = True if where is None else where
    if _check.is_concrete(labels) and _check.is_concrete(where):
        # In NumPy: within a trace even a selection of constants is traced.
        counting = np.where(where, np.asarray(labels).astype(np.float64), 0)
        _check.array("labels", counting, "numbers from 0 to 1", lambda v: (v >= 0) & (v <= 1))
    return y


def _fitting(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        accepted = f"an array that broadcasts to {shape}"
        raise _check.ArgumentError(name, _check.describe(array), accepted) from None


def _nll(
    labels: Any, logits: jax.Array, *, axis: int, ignore_index: int | None, where: Any
) -> jax.Array:
    """-log p of integer labels."""
    logits = floating("logits", logits, "a real floating array with an axis of classes", rank=1)
    axis = _check.axis("axis", axis, logits)
    labels = class_labels(labels, logits.shape, axis, ignore_index, soft=False)
    options = {"ignore_index": ignore_index, "where": where, "axis": axis}
    return smoothed_cross_entropy(logits, labels, 0.0, **options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entropy(axis: int, x: jax.Array) -> jax.Array:
    log_p, p = _log_softmax(x, None, axis)
    return -jnp.sum(p * log_p, axis)


@_entropy.defjvp
def _(axis: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Without the derivatives of log p, which add up to 0 but for rounding: more than the slope of
    a confident prediction.
    """
    (x,), (dx,) = primals, tangents
    log_p, p = _log_softmax(x, None, axis)
    change = p * (dx - jnp.sum(p * dx, axis, keepdims=True))
    return -jnp.sum(p * log_p, axis), -jnp.sum(log_p * change, axis)


def _classes(
    logits: jax.Array, axis: int, dtype: Any, class_weights: Any = None, where: Any = None
) -> Classes:
    shape = jnp.shape(logits)
    return classes_of(shape, Layout(axis % len(shape)), dtype, class_weights, where)


def _counts(labels: Any, ignore_index: int | None) -> jax.Array | None:
    return None if ignore_index is None else jnp.asarray(labels) != ignore_index


def _log_softmax(
    x: jax.Array, where: Any, axis: int, impossible: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Log p, which is `impossible` for impossible classes, and p."""
    if x.ndim == 0:
        raise _check.ArgumentError("logits", _check.describe(x), "an array with an axis of classes")
    axis = _check.axis("axis", axis, x)
    possible = x != -jnp.inf
    if where is not None:
        possible &= existing(where, x.shape)
    largest = jnp.max(x, axis, keepdims=True, initial=-jnp.inf, where=possible)
    largest = jax.lax.stop_gradient(jnp.where(largest == -jnp.inf, 0, largest))
    # Selected twice: what is not chosen has a derivative of its own, which may be NaN.
    below = jnp.where(possible, x, 0) - largest
    # Beside the largest, whose logarithm keeps the digits of the others.
    is_largest = possible & (below == 0)
    others = jnp.where(is_largest, jnp.expm1(below), jnp.exp(below))
    number = jnp.sum(is_largest, axis, others.dtype, keepdims=True)
    log_sum = jnp.log1p(jnp.sum(others, axis, keepdims=True, where=possible) + (number - 1))
    log_p = below - log_sum
    return jnp.where(possible, log_p, impossible), jnp.where(possible, jnp.exp(log_p), 0)
