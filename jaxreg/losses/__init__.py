"""Losses: pure functions (predictions, targets) -> loss of each example."""

from jaxreg.losses.classification import (
    confidence_penalty,
    entropy,
    focal_loss,
    poly_loss,
    sigmoid_smoothed_cross_entropy,
    symmetric_kl,
)
from jaxreg.losses.cross_entropy import smoothed_cross_entropy
from jaxreg.losses.functions import (
    activity_penalty,
    gradient_penalty,
    jacobian_penalty,
    orthogonality_penalty,
)
from jaxreg.losses.labels import mixup_loss, online_label_smoothing, smooth_labels
from jaxreg.losses.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "activity_penalty",
    "confidence_penalty",
    "entropy",
    "focal_loss",
    "gradient_penalty",
    "jacobian_penalty",
    "linear_cross_entropy",
    "mixup_loss",
    "online_label_smoothing",
    "orthogonality_penalty",
    "poly_loss",
    "sigmoid_smoothed_cross_entropy",
    "smooth_labels",
    "smoothed_cross_entropy",
    "symmetric_kl",
]
