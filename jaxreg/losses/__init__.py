"""Losses: pure functions (predictions, targets) -> loss of each example."""

from jaxreg.losses.cross_entropy import smoothed_cross_entropy

__all__ = ["smoothed_cross_entropy"]
