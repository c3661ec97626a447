"""Losses: pure functions (predictions, targets) -> loss of each example."""

from jaxreg.losses.cross_entropy import smoothed_cross_entropy
from jaxreg.losses.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy", "smoothed_cross_entropy"]
