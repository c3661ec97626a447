"""Penalties and constraints: value, proximal operator and optimality in one immutable object."""

from jaxreg.penalties.base import Penalty
from jaxreg.penalties.constraints import Box, NonNegative
from jaxreg.penalties.separable import L1, L2, ElasticNet

__all__ = ["L1", "L2", "Box", "ElasticNet", "NonNegative", "Penalty"]
