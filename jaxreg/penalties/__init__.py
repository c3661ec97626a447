"""Penalties and constraints: value, proximal operator and optimality in one immutable object."""

from jaxreg.penalties.balls import L1Ball, L2Ball, MaxNorm, Simplex, UnitNorm
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.cardinality import NM, TopK
from jaxreg.penalties.constraints import Affine, Box, HalfSpace, LInfBall, NonNegative
from jaxreg.penalties.group import GroupLasso, GroupMCP, GroupSCAD, L2Norm, SparseGroupLasso
from jaxreg.penalties.joint import Joint
from jaxreg.penalties.matrix import Nuclear, Orthogonal, Rank, SpectralBall
from jaxreg.penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum, LTwoThirds
from jaxreg.penalties.norms import ExclusiveLasso, LInf
from jaxreg.penalties.ordered import SortedL1
from jaxreg.penalties.overlapping import OverlappingGroupLasso
from jaxreg.penalties.separable import L1, L2, ElasticNet, Huber, NonNegativeL1
from jaxreg.penalties.values import penalty_value
from jaxreg.penalties.variation import FusedLasso, TotalVariation
from jaxreg.penalties.variation2d import TotalVariation2D

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "NM",
    "SCAD",
    "Affine",
    "Box",
    "ElasticNet",
    "ExclusiveLasso",
    "FusedLasso",
    "GroupLasso",
    "GroupMCP",
    "GroupSCAD",
    "HalfSpace",
    "Huber",
    "Joint",
    "L1Ball",
    "L2Ball",
    "L2Norm",
    "LHalf",
    "LInf",
    "LInfBall",
    "LTwoThirds",
    "LogSum",
    "MaxNorm",
    "NonNegative",
    "NonNegativeL1",
    "Nuclear",
    "Orthogonal",
    "OverlappingGroupLasso",
    "Penalty",
    "Rank",
    "Simplex",
    "SortedL1",
    "SparseGroupLasso",
    "SpectralBall",
    "TopK",
    "TotalVariation",
    "TotalVariation2D",
    "UnitNorm",
    "penalty_value",
]
