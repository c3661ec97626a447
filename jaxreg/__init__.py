"""Regularization for JAX: pure functions, composed as optax gradient transformations."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxreg import groups as groups
    from jaxreg import where as where
    from jaxreg._check import ArgumentError as ArgumentError
    from jaxreg.compression import Compressed as Compressed
    from jaxreg.compression import compress as compress
    from jaxreg.diagnostics import metrics as metrics
    from jaxreg.explanation import Explanation as Explanation
    from jaxreg.explanation import explain as explain
    from jaxreg.losses import activity_penalty as activity_penalty
    from jaxreg.losses import confidence_penalty as confidence_penalty
    from jaxreg.losses import entropy as entropy
    from jaxreg.losses import focal_loss as focal_loss
    from jaxreg.losses import gradient_penalty as gradient_penalty
    from jaxreg.losses import jacobian_penalty as jacobian_penalty
    from jaxreg.losses import linear_cross_entropy as linear_cross_entropy
    from jaxreg.losses import mixup_loss as mixup_loss
    from jaxreg.losses import online_label_smoothing as online_label_smoothing
    from jaxreg.losses import orthogonality_penalty as orthogonality_penalty
    from jaxreg.losses import poly_loss as poly_loss
    from jaxreg.losses import sigmoid_smoothed_cross_entropy as sigmoid_smoothed_cross_entropy
    from jaxreg.losses import smooth_labels as smooth_labels
    from jaxreg.losses import smoothed_cross_entropy as smoothed_cross_entropy
    from jaxreg.losses import symmetric_kl as symmetric_kl
    from jaxreg.noise import dropout as dropout
    from jaxreg.norms import global_norm as global_norm
    from jaxreg.norms import leaf_norms as leaf_norms
    from jaxreg.norms import rms as rms
    from jaxreg.optimality import certificate as certificate
    from jaxreg.optimizers import prox_adagrad as prox_adagrad
    from jaxreg.optimizers import prox_adam as prox_adam
    from jaxreg.optimizers import prox_adamw as prox_adamw
    from jaxreg.optimizers import prox_rmsprop as prox_rmsprop
    from jaxreg.optimizers import prox_sgd as prox_sgd
    from jaxreg.optimizers import regularize as regularize
    from jaxreg.penalties import L0 as L0
    from jaxreg.penalties import L1 as L1
    from jaxreg.penalties import L2 as L2
    from jaxreg.penalties import MCP as MCP
    from jaxreg.penalties import NM as NM
    from jaxreg.penalties import SCAD as SCAD
    from jaxreg.penalties import Affine as Affine
    from jaxreg.penalties import Box as Box
    from jaxreg.penalties import ElasticNet as ElasticNet
    from jaxreg.penalties import ExclusiveLasso as ExclusiveLasso
    from jaxreg.penalties import FusedLasso as FusedLasso
    from jaxreg.penalties import GroupLasso as GroupLasso
    from jaxreg.penalties import GroupMCP as GroupMCP
    from jaxreg.penalties import GroupSCAD as GroupSCAD
    from jaxreg.penalties import HalfSpace as HalfSpace
    from jaxreg.penalties import Huber as Huber
    from jaxreg.penalties import Joint as Joint
    from jaxreg.penalties import L1Ball as L1Ball
    from jaxreg.penalties import L2Ball as L2Ball
    from jaxreg.penalties import L2Norm as L2Norm
    from jaxreg.penalties import LHalf as LHalf
    from jaxreg.penalties import LInf as LInf
    from jaxreg.penalties import LInfBall as LInfBall
    from jaxreg.penalties import LogSum as LogSum
    from jaxreg.penalties import LTwoThirds as LTwoThirds
    from jaxreg.penalties import MaxNorm as MaxNorm
    from jaxreg.penalties import NonNegative as NonNegative
    from jaxreg.penalties import NonNegativeL1 as NonNegativeL1
    from jaxreg.penalties import Nuclear as Nuclear
    from jaxreg.penalties import Orthogonal as Orthogonal
    from jaxreg.penalties import OverlappingGroupLasso as OverlappingGroupLasso
    from jaxreg.penalties import Penalty as Penalty
    from jaxreg.penalties import Rank as Rank
    from jaxreg.penalties import Simplex as Simplex
    from jaxreg.penalties import SortedL1 as SortedL1
    from jaxreg.penalties import SparseGroupLasso as SparseGroupLasso
    from jaxreg.penalties import SpectralBall as SpectralBall
    from jaxreg.penalties import TopK as TopK
    from jaxreg.penalties import TotalVariation as TotalVariation
    from jaxreg.penalties import TotalVariation2D as TotalVariation2D
    from jaxreg.penalties import UnitNorm as UnitNorm
    from jaxreg.penalties import penalty_value as penalty_value
    from jaxreg.transforms import adagc as adagc
    from jaxreg.transforms import adaptive_clip as adaptive_clip
    from jaxreg.transforms import asam as asam
    from jaxreg.transforms import autoclip as autoclip
    from jaxreg.transforms import averaged_params as averaged_params
    from jaxreg.transforms import centralize as centralize
    from jaxreg.transforms import clip_by_global_norm as clip_by_global_norm
    from jaxreg.transforms import clip_by_group_norm as clip_by_group_norm
    from jaxreg.transforms import clip_by_leaf_norm as clip_by_leaf_norm
    from jaxreg.transforms import clip_by_value as clip_by_value
    from jaxreg.transforms import clip_update_rms as clip_update_rms
    from jaxreg.transforms import constrain as constrain
    from jaxreg.transforms import constrained_decay as constrained_decay
    from jaxreg.transforms import decay_from_timescale as decay_from_timescale
    from jaxreg.transforms import diagonal_fisher as diagonal_fisher
    from jaxreg.transforms import ema as ema
    from jaxreg.transforms import ema_of_params as ema_of_params
    from jaxreg.transforms import ewc as ewc
    from jaxreg.transforms import gradient_noise as gradient_noise
    from jaxreg.transforms import hyperball as hyperball
    from jaxreg.transforms import l2_decay as l2_decay
    from jaxreg.transforms import lookahead as lookahead
    from jaxreg.transforms import magnitude_pruning as magnitude_pruning
    from jaxreg.transforms import metric as metric
    from jaxreg.transforms import n_m_pruning as n_m_pruning
    from jaxreg.transforms import per_example_clip as per_example_clip
    from jaxreg.transforms import proximal as proximal
    from jaxreg.transforms import ramda as ramda
    from jaxreg.transforms import rda as rda
    from jaxreg.transforms import reapply as reapply
    from jaxreg.transforms import rmda as rmda
    from jaxreg.transforms import sam as sam
    from jaxreg.transforms import selective_projection_decay as selective_projection_decay
    from jaxreg.transforms import skip_step as skip_step
    from jaxreg.transforms import sparsity_target as sparsity_target
    from jaxreg.transforms import spectral_cap as spectral_cap
    from jaxreg.transforms import spectral_decay as spectral_decay
    from jaxreg.transforms import spike_aware_clip as spike_aware_clip
    from jaxreg.transforms import stochastic_rounding as stochastic_rounding
    from jaxreg.transforms import swa as swa
    from jaxreg.transforms import watch as watch
    from jaxreg.transforms import weight_decay as weight_decay
    from jaxreg.transforms import zclip as zclip

__version__ = "0.1.0"

# Where each public name lives. Modules are loaded when a name is first used (PEP 562), so that
# `import jaxreg` costs next to nothing and needs no optional dependency.
_HOMES = {
    "asam": "jaxreg.transforms",
    "averaged_params": "jaxreg.transforms",
    "centralize": "jaxreg.transforms",
    "ema_of_params": "jaxreg.transforms",
    "gradient_noise": "jaxreg.transforms",
    "lookahead": "jaxreg.transforms",
    "sam": "jaxreg.transforms",
    "stochastic_rounding": "jaxreg.transforms",
    "swa": "jaxreg.transforms",
    "metrics": "jaxreg.diagnostics",
    "Explanation": "jaxreg.explanation",
    "explain": "jaxreg.explanation",
    "per_example_clip": "jaxreg.transforms",
    "skip_step": "jaxreg.transforms",
    "spike_aware_clip": "jaxreg.transforms",
    "clip_update_rms": "jaxreg.transforms",
    "adagc": "jaxreg.transforms",
    "zclip": "jaxreg.transforms",
    "autoclip": "jaxreg.transforms",
    "adaptive_clip": "jaxreg.transforms",
    "clip_by_value": "jaxreg.transforms",
    "clip_by_leaf_norm": "jaxreg.transforms",
    "clip_by_group_norm": "jaxreg.transforms",
    "rms": "jaxreg.norms",
    "leaf_norms": "jaxreg.norms",
    "ArgumentError": "jaxreg._check",
    "L0": "jaxreg.penalties",
    "L1": "jaxreg.penalties",
    "L2": "jaxreg.penalties",
    "MCP": "jaxreg.penalties",
    "NM": "jaxreg.penalties",
    "SCAD": "jaxreg.penalties",
    "Affine": "jaxreg.penalties",
    "Box": "jaxreg.penalties",
    "Compressed": "jaxreg.compression",
    "ElasticNet": "jaxreg.penalties",
    "ExclusiveLasso": "jaxreg.penalties",
    "GroupLasso": "jaxreg.penalties",
    "GroupMCP": "jaxreg.penalties",
    "GroupSCAD": "jaxreg.penalties",
    "HalfSpace": "jaxreg.penalties",
    "Huber": "jaxreg.penalties",
    "L1Ball": "jaxreg.penalties",
    "L2Ball": "jaxreg.penalties",
    "L2Norm": "jaxreg.penalties",
    "Joint": "jaxreg.penalties",
    "LHalf": "jaxreg.penalties",
    "LInf": "jaxreg.penalties",
    "LInfBall": "jaxreg.penalties",
    "LTwoThirds": "jaxreg.penalties",
    "LogSum": "jaxreg.penalties",
    "MaxNorm": "jaxreg.penalties",
    "NonNegative": "jaxreg.penalties",
    "NonNegativeL1": "jaxreg.penalties",
    "Penalty": "jaxreg.penalties",
    "Simplex": "jaxreg.penalties",
    "SparseGroupLasso": "jaxreg.penalties",
    "TopK": "jaxreg.penalties",
    "UnitNorm": "jaxreg.penalties",
    "certificate": "jaxreg.optimality",
    "compress": "jaxreg.compression",
    "FusedLasso": "jaxreg.penalties",
    "Nuclear": "jaxreg.penalties",
    "Orthogonal": "jaxreg.penalties",
    "OverlappingGroupLasso": "jaxreg.penalties",
    "Rank": "jaxreg.penalties",
    "SortedL1": "jaxreg.penalties",
    "SpectralBall": "jaxreg.penalties",
    "TotalVariation": "jaxreg.penalties",
    "TotalVariation2D": "jaxreg.penalties",
    "clip_by_global_norm": "jaxreg.transforms",
    "dropout": "jaxreg.noise",
    "global_norm": "jaxreg.norms",
    "groups": "jaxreg.groups",
    "ema": "jaxreg.transforms",
    "l2_decay": "jaxreg.transforms",
    "magnitude_pruning": "jaxreg.transforms",
    "n_m_pruning": "jaxreg.transforms",
    "metric": "jaxreg.transforms.metric",
    "prox_adagrad": "jaxreg.optimizers",
    "prox_adam": "jaxreg.optimizers",
    "prox_adamw": "jaxreg.optimizers",
    "prox_rmsprop": "jaxreg.optimizers",
    "prox_sgd": "jaxreg.optimizers",
    "proximal": "jaxreg.transforms",
    "regularize": "jaxreg.optimizers",
    "linear_cross_entropy": "jaxreg.losses",
    "confidence_penalty": "jaxreg.losses",
    "entropy": "jaxreg.losses",
    "focal_loss": "jaxreg.losses",
    "gradient_penalty": "jaxreg.losses",
    "jacobian_penalty": "jaxreg.losses",
    "mixup_loss": "jaxreg.losses",
    "online_label_smoothing": "jaxreg.losses",
    "orthogonality_penalty": "jaxreg.losses",
    "poly_loss": "jaxreg.losses",
    "sigmoid_smoothed_cross_entropy": "jaxreg.losses",
    "smooth_labels": "jaxreg.losses",
    "symmetric_kl": "jaxreg.losses",
    "activity_penalty": "jaxreg.losses",
    "penalty_value": "jaxreg.penalties",
    "smoothed_cross_entropy": "jaxreg.losses",
    "ramda": "jaxreg.transforms",
    "rda": "jaxreg.transforms",
    "reapply": "jaxreg.transforms",
    "rmda": "jaxreg.transforms",
    "sparsity_target": "jaxreg.transforms",
    "watch": "jaxreg.transforms",
    "constrain": "jaxreg.transforms",
    "constrained_decay": "jaxreg.transforms",
    "decay_from_timescale": "jaxreg.transforms",
    "diagonal_fisher": "jaxreg.transforms",
    "ewc": "jaxreg.transforms",
    "hyperball": "jaxreg.transforms",
    "selective_projection_decay": "jaxreg.transforms",
    "spectral_cap": "jaxreg.transforms",
    "spectral_decay": "jaxreg.transforms",
    "weight_decay": "jaxreg.transforms",
    "where": "jaxreg.where",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxreg' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
