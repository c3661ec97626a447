"""Cross-entropy with label smoothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.losses.rows import Layout, index_loss, soft_loss
from jaxreg.losses.shardings import decided_by_xla
from jaxreg.losses.targets import (
    Number,
    Options,
    Reduction,
    Spread,
    class_labels,
    classes_of,
    floating,
    index_targets,
    reduced,
    soft_targets,
)


def smoothed_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: Number = 0.1,
    *,
    z_loss: Number = 0.0,
    soft_cap: Number | None = None,
    ignore_index: int | None = None,
    class_weights: Any = None,
    where: Any = None,
    axis: int = -1,
    spread: Spread = "uniform",
    reduction: Reduction = "none",
) -> jax.Array:
    r"""Cross-entropy against labels mixed with the uniform distribution over K classes.

    With q the labels' distribution, e the smoothing, w the classes' weights and p the softmax,

    $$L = -\sum_k w_k \left((1 - e) q_k + \frac{e}{K}\right) \log p_k + z \log^2 \sum_k \exp x_k.$$

    As ``torch.nn.CrossEntropyLoss(weight, ignore_index=..., label_smoothing=e)``. Labels q that sum
    to another number than 1 are taken as they are: without smoothing a row of zeros costs nothing.
    No one-hot array is made for integer labels. Sums are in float32 at least; a shift of the logits
    changes nothing but rounding, and a confident prediction keeps the digits of its gradient.
    Differentiable in every argument that is a number, to any order, and forward as well as in
    reverse.

    Args:
        logits: unnormalized log-probabilities, real floating, with the classes along `axis`. A
            logit of -inf is an impossible class, which costs nothing unless it has a share.
        labels: class indices, integers of the shape without `axis`; or probabilities of the
            logits' shape.
        smoothing: e in [0, 1), or a traced scalar.
        z_loss: z >= 0, or a traced scalar: draws the log of the sum of exponentials to 0 (1e-4 in
            PaLM).
        soft_cap: c > 0: logits become c tanh(x / c), within (-c, c).
        ignore_index: the integer label of examples that have no loss and no gradient, whatever
            their logits are, and that are not counted in the mean.
        class_weights: w, K numbers >= 0.
        where: bools that broadcast with the logits: the classes that exist. The others have
            probability 0 and no share of the smoothing (which is e over the number of those that
            exist), whatever their logits are; a label among them costs infinity. A row without a
            class has the loss NaN.
        axis: of the classes.
        spread: "uniform" gives every class e / K; "others" gives the label 1 - e, and the other
            classes e / (K - 1) (fairseq, and I. Goodfellow et al.).
        reduction: "none" for the loss of each example; "sum"; or "mean", over the examples that
            count: with class weights each as often as its label's weight, $\sum_k w_k q_k$, says.
            It is 0 where none counts.

    Returns:
        The loss of each example, of the logits' shape without `axis`, or a scalar; float32 (float64
        for 64-bit logits). A traced label that is no class gives NaN; it never wraps around.

    Raises:
        ValueError: where an argument is out of its range, shapes do not fit, or a concrete label
            is no class.

    Source: C. Szegedy et al., *Rethinking the Inception architecture for computer vision*, CVPR
    2016. z-loss: A. Chowdhery et al., *PaLM*, arXiv:2204.02311. Soft cap: Gemma 2,
    arXiv:2408.00118.

    >>> import jax.numpy as jnp, jaxreg
    >>> logits, labels = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([0, -1])
    >>> losses = jaxreg.smoothed_cross_entropy(logits, labels, 0.3, ignore_index=-1)
    >>> [round(float(loss), 6) for loss in losses]
    [0.639545, 0.0]
    """
    options = Options(smoothing, z_loss, soft_cap, ignore_index, spread, reduction).checked()
    accepted = "a real floating array with an axis of classes"
    logits = floating("logits", logits, accepted, rank=1)
    axis = _check.axis("axis", axis, logits)
    labels = class_labels(labels, logits.shape, axis, options.ignore_index)
    given = {"logits": logits, "labels": labels, "class_weights": class_weights, "where": where}
    given |= options._asdict()
    kept = axis if reduction == "none" else None
    return decided_by_xla(functools.partial(_loss, axis=axis), given, logits, kept)


def _loss(
    logits: jax.Array, labels: jax.Array, class_weights: Any, where: Any, axis: int, **options: Any
) -> jax.Array:
    layout, chosen = Layout(axis), Options(**options)
    x = chosen.capped(_tree.widen(logits))
    classes = classes_of(x.shape, layout, x.dtype, class_weights, where)
    if classes.exist is not None:
        x = jnp.where(classes.exist, x, -jnp.inf)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        v, z, weight = soft_targets(labels.astype(x.dtype), classes, chosen)
        losses = soft_loss(layout, x, v, z)
    else:
        targets, weight = index_targets(jnp.expand_dims(labels, axis), classes, chosen)
        losses = index_loss(layout, x, targets)
    return reduced(losses, weight, classes, chosen)
