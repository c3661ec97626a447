"""Cross-entropy with label smoothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check, _tree


def smoothed_cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float | jax.Array = 0.1
) -> jax.Array:
    r"""Cross-entropy against labels mixed with the uniform distribution over K classes.

    With q the labels' distribution and e the smoothing, $L = -\sum_k ((1 - e) q_k + e / K) \log
    p_k$, where p = softmax(logits). As ``torch.nn.CrossEntropyLoss(label_smoothing=e)``. Labels
    q that sum to another number than 1 are taken as they are: without smoothing a row of zeros
    costs nothing. No one-hot array is made for integer labels; sums are in float32 at least, and
    the row's maximum is taken off first, so that a shift of the logits changes nothing but
    rounding.

    Args:
        logits: unnormalized log-probabilities, shape (..., K), real floating.
        labels: class indices, integers of shape (...), or probabilities of shape (..., K).
        smoothing: e in [0, 1), or a traced scalar.

    Returns:
        The loss of each example, shape (...), float32 (float64 for 64-bit logits). A traced label
        outside [0, K) gives NaN; it never wraps around.

    Raises:
        ValueError: where the smoothing is outside [0, 1), the shapes don't fit, or a concrete
            label is outside [0, K).

    Source: C. Szegedy et al., *Rethinking the Inception architecture for computer vision*, CVPR
    2016.

    >>> import jax.numpy as jnp, jaxreg
    >>> logits, labels = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0])
    >>> losses = [jaxreg.smoothed_cross_entropy(logits, labels, e) for e in (0.0, 0.3)]
    >>> [round(float(loss[0]), 6) for loss in losses]
    [0.239545, 0.639545]
    """
    smoothing = _check.fraction("smoothing", smoothing)
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
        raise _check.ArgumentError(
            "logits", _check.describe(logits), "a real floating array of shape (..., classes)"
        )
    labels = _labels(labels, logits.shape)
    centered = _tree.widen(logits)
    largest = jax.lax.stop_gradient(jnp.max(centered, axis=-1, keepdims=True))
    # A row whose logits are all -inf keeps its -inf: -inf minus -inf would be NaN.
    centered = centered - jnp.where(jnp.isfinite(largest), largest, 0)
    log_normalizer = jax.nn.logsumexp(centered, axis=-1)
    e = jnp.asarray(smoothing).astype(centered.dtype)
    total, expected = _moments(labels, centered)
    normalizer_part = _product((1 - e) * total + e, log_normalizer)
    return normalizer_part - (1 - e) * expected - _product(e, jnp.mean(centered, axis=-1))


def _product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Weight * x, 0 where the weight is 0 and x infinite: what can't happen costs nothing."""
    return weight * jnp.where((weight != 0) | jnp.isfinite(x), x, 0)


def _moments(labels: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum_k q_k and sum_k q_k logits_k for the labels' distribution q."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        q = labels.astype(logits.dtype)
        return jnp.sum(q, axis=-1), jnp.sum(_product(q, logits), axis=-1)
    at_label = jnp.take_along_axis(
        logits, labels[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )
    # Negative indices count from the end in "fill" mode too.
    return jnp.ones((), logits.dtype), jnp.where(labels < 0, jnp.nan, at_label[..., 0])


def _labels(labels: Any, shape: tuple[int, ...]) -> jax.Array:
    # In NumPy: within a trace even a comparison of constants is traced.
    concrete = np.asarray(labels) if _check.is_concrete(labels) else None
    labels = jnp.asarray(labels)
    accepted = f"integers of shape {shape[:-1]} in [0, {shape[-1]}), or probabilities of {shape}"
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != (shape[:-1] if integer else shape) or not (
        integer or jnp.issubdtype(labels.dtype, jnp.floating)
    ):
        raise _check.ArgumentError("labels", _check.describe(labels), accepted)
    if concrete is not None and integer and concrete.size:
        low, high = concrete.min(), concrete.max()
        if low < 0 or high >= shape[-1]:
            raise _check.ArgumentError("labels", f"values {low} to {high}", accepted)
    return labels
