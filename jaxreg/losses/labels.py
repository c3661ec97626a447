"""Labels that are softened or mixed, and the loss against them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.losses.cross_entropy import smoothed_cross_entropy
from jaxreg.losses.rows import Layout, times
from jaxreg.losses.targets import (
    Number,
    Options,
    Reduction,
    Spread,
    class_labels,
    classes_of,
    floating,
    mean_or_sum,
    soft_targets,
)


def smooth_labels(
    labels: jax.Array,
    smoothing: Number = 0.1,
    *,
    where: Any = None,
    axis: int = -1,
    spread: Spread = "uniform",
) -> jax.Array:
    r"""Labels mixed with the uniform distribution over K classes, $(1 - e) q + e / K$.

    `jaxreg.smoothed_cross_entropy` takes integer labels and makes no such array.

    Args:
        labels: probabilities q, such as one-hot ones; real floating.
        smoothing: e in [0, 1), or a traced scalar.
        where: bools that broadcast with the labels: the K classes that exist. The others get no
            share; where none does the labels stay as they are.
        axis: of the classes.
        spread: as in `jaxreg.smoothed_cross_entropy`.

    Returns:
        An array of the labels' shape and dtype.

    Raises:
        ValueError: where the labels are not real floating, or another argument does not fit.

    >>> import jax.numpy as jnp, jaxreg
    >>> two_of_three = jnp.array([True, True, False])
    >>> jaxreg.smooth_labels(jnp.array([1.0, 0.0, 0.0]), 0.5, where=two_of_three).tolist()
    [0.75, 0.25, 0.0]
    """
    options = Options(smoothing, 0.0, None, None, spread, "none").checked()
    labels = floating("labels", labels, "a real floating array, such as one-hot labels", rank=1)
    layout = Layout(_check.axis("axis", axis, labels))
    q = _tree.widen(labels)
    classes = classes_of(q.shape, layout, q.dtype, None, where)
    mixed, _, _ = soft_targets(q, classes, options)
    return jnp.where(classes.number > 0, mixed, q).astype(labels.dtype)


def mixup_loss(
    logits: jax.Array,
    labels: jax.Array,
    other_labels: jax.Array,
    weight: Number,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = smoothed_cross_entropy,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""The loss of inputs that are mixed, $\lambda \, L(y) + (1 - \lambda) \, L(y')$.

    For mixup, $\lambda x + (1 - \lambda) x'$, and CutMix with $\lambda$ the share of the image that
    stays. Cross-entropy is linear in the labels: it is the loss against mixed labels, without an
    array of them.

    Args:
        logits: as `loss` takes them.
        labels: likewise, of the first inputs.
        other_labels: of the second ones.
        weight: $\lambda$ in [0, 1]: a number, one for each example, or of the first of the axes
            that the losses have, such as one a sequence.
        loss: ``loss(logits, labels)`` gives one number an example. By default it is
            `jaxreg.smoothed_cross_entropy` with its smoothing of 0.1; ``functools.partial(...,
            smoothing=0.0)`` gives plain cross-entropy, and other options likewise.
        reduction: "none", or "mean" or "sum" over all examples.

    Returns:
        The loss of each example, or a scalar.

    Raises:
        ValueError: where the weight is not in [0, 1], its shape does not fit, `loss` reduces and
            there are several weights, or as `loss` does.

    Source: H. Zhang et al., *mixup: beyond empirical risk minimization*, ICLR 2018,
    arXiv:1710.09412; S. Yun et al., *CutMix*, ICCV 2019, arXiv:1905.04899.

    >>> import jax.numpy as jnp, jaxreg
    >>> logits = jnp.array([[2.0, 0.0, 0.0]])
    >>> mixed = jaxreg.mixup_loss(logits, jnp.array([0]), jnp.array([1]), 0.75)
    >>> soft = jaxreg.smoothed_cross_entropy(logits, jnp.array([[0.75, 0.25, 0.0]]))
    >>> round(float(mixed[0]), 5), round(float(soft[0]), 5)
    (0.82288, 0.82288)
    """
    if not callable(loss):
        raise _check.ArgumentError("loss", _check.describe(loss), "a function of logits and labels")
    first = loss(logits, labels)
    try:
        second = loss(logits, other_labels)
    except _check.ArgumentError as error:
        name = "other_labels" if error.name == "labels" else error.name
        raise _check.ArgumentError(name, error.given, error.accepted) from None
    accepted = f"numbers from 0 to 1, one or of shape {first.shape}"
    weight = _check.array("weight", weight, accepted, lambda v: (v >= 0) & (v <= 1))
    share = jnp.asarray(weight).astype(first.dtype)
    if first.ndim == 0 < share.ndim:
        accepted = 'one that gives a number for each example (reduction="none")'
        raise _check.ArgumentError("loss", "a function that gives one number in all", accepted)
    if share.shape != first.shape[: share.ndim]:
        raise _check.ArgumentError("weight", _check.describe(weight), accepted)
    share = share.reshape(share.shape + (1,) * (first.ndim - share.ndim))
    return mean_or_sum(times(share, first) + times(1 - share, second), reduction)


class OnlineLabels(NamedTuple):
    """State of `online_label_smoothing`, for K classes.

    Attributes:
        soft: (K, K); row y is the distribution that label y stands for in this epoch.
        total: (K, K); row y is the sum of the predictions for examples of y that were right.
        number: (K,); how many these are.
    """

    soft: jax.Array
    total: jax.Array
    number: jax.Array


class OnlineLabelSmoothing(NamedTuple):
    """The functions of `online_label_smoothing`."""

    init: Callable[[], OnlineLabels]
    loss: Callable[..., tuple[jax.Array, OnlineLabels]]
    next_epoch: Callable[[OnlineLabels], OnlineLabels]


def online_label_smoothing(
    classes: int, hard: Number = 0.5, *, smoothing: Number = 0.1
) -> OnlineLabelSmoothing:
    r"""Labels softened by the predictions of the epoch before (OLS).

    $L = \alpha \, CE(y) + (1 - \alpha) \, CE(S_y)$, with $S_y$ the mean prediction for the examples
    of class y that were predicted right in the last epoch. In the first epoch, and for a class
    without such examples, $S_y$ is as it was: at first $1 - e$ for y and $e / (K - 1)$ for others.

    Args:
        classes: K, a whole number >= 2.
        hard: $\alpha$ in [0, 1), or a traced scalar.
        smoothing: e of the first epoch, a number in [0, 1).

    Returns:
        Three functions, which can be jitted. ``init()`` gives the state. ``loss(state, logits,
        labels, reduction="none")``, of shapes (..., K) and (...), gives the loss of each example,
        or their "mean" or "sum", in float32 at least, and the next state, to which no gradient
        flows. ``next_epoch(state)`` ends an epoch. A traced label that is no class gives NaN, and
        changes no state.

    Raises:
        ValueError: where an argument is out of its range, or the logits have not K classes.

    Source: C.-B. Zhang et al., *Delving deep into label smoothing*, IEEE TIP 2021,
    arXiv:2011.12562.

    >>> import jax.numpy as jnp, jaxreg
    >>> ols = jaxreg.online_label_smoothing(3)
    >>> state = ols.init()
    >>> losses, state = ols.loss(state, jnp.array([[4.0, 0.0, 0.0]]), jnp.array([0]))
    >>> state = ols.next_epoch(state)
    >>> [round(float(p), 3) for p in state.soft[0]], [round(float(p), 3) for p in state.soft[1]]
    ([0.965, 0.018, 0.018], [0.05, 0.9, 0.05])
    """
    classes = _check.whole_number("classes", classes, at_least=2)
    hard = _check.fraction("hard", hard)
    smoothing = _check.fraction("smoothing", smoothing)

    def init() -> OnlineLabels:
        zeros = jnp.zeros((classes, classes), jnp.float32)
        soft = smooth_labels(jnp.eye(classes, dtype=jnp.float32), smoothing, spread="others")
        return OnlineLabels(soft, zeros, zeros[0])

    def loss(
        state: OnlineLabels, logits: jax.Array, labels: jax.Array, reduction: Reduction = "none"
    ) -> tuple[jax.Array, OnlineLabels]:
        if jnp.shape(logits)[-1:] != (classes,):
            accepted = f"an array of shape (..., {classes})"
            raise _check.ArgumentError("logits", _check.describe(logits), accepted)
        logits = jnp.asarray(logits)
        labels = class_labels(labels, logits.shape, logits.ndim - 1, None, soft=False, named=())
        ordinary = smoothed_cross_entropy(logits, labels, 0.0)
        soft = jax.lax.stop_gradient(state.soft)[labels]
        softened = smoothed_cross_entropy(logits, soft, 0.0)
        share = jnp.asarray(hard).astype(ordinary.dtype)
        # NaN of a wrong label stays NaN.
        losses = share * ordinary + (1 - share) * softened
        return mean_or_sum(losses, reduction), _counted(
            state, jax.lax.stop_gradient(logits), labels
        )

    def _counted(state: OnlineLabels, logits: jax.Array, labels: jax.Array) -> OnlineLabels:
        flat, labels = logits.reshape(-1, classes), labels.reshape(-1)
        # As a product of matrices, which adds up in any order and on any mesh.
        p = jax.nn.softmax(flat.astype(jnp.float32))
        right = (jnp.argmax(flat, -1) == labels) & jnp.isfinite(jnp.sum(p, -1))
        # 0 times NaN is NaN, of which the state would keep all rows.
        p = jnp.where(right[:, None], p, 0)
        right = jnp.where(right[:, None], jax.nn.one_hot(labels, classes, dtype=p.dtype), 0)
        total = state.total + jnp.matmul(right.T, p, precision="highest")
        return state._replace(total=total, number=state.number + jnp.sum(right, 0))

    def next_epoch(state: OnlineLabels) -> OnlineLabels:
        number = state.number[:, None]
        soft = jnp.where(number > 0, state.total / jnp.maximum(number, 1), state.soft)
        zeros = jnp.zeros_like(state.total)
        return OnlineLabels(soft, zeros, zeros[0])

    return OnlineLabelSmoothing(init, loss, next_epoch)
