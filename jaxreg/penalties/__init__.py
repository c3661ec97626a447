"""Penalties and constraints: value, proximal operator and optimality in one immutable object."""

from jaxreg.penalties.base import Penalty
from jaxreg.penalties.constraints import Affine, Box, HalfSpace, LInfBall, NonNegative
from jaxreg.penalties.separable import L1, L2, ElasticNet, Huber, NonNegativeL1

__all__ = [
    "L1",
    "L2",
    "Affine",
    "Box",
    "ElasticNet",
    "HalfSpace",
    "Huber",
    "LInfBall",
    "NonNegative",
    "NonNegativeL1",
    "Penalty",
]
