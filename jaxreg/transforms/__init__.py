"""Everything that changes gradients, updates or weights, as optax gradient transformations."""

from jaxreg.transforms.adaptive_clipping import adagc, adaptive_clip, autoclip, zclip
from jaxreg.transforms.averaging import reapply
from jaxreg.transforms.clip import ClipState, NonfiniteState
from jaxreg.transforms.clipping import (
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_value,
)
from jaxreg.transforms.decay import DecayState, L2State, ema, l2_decay, weight_decay
from jaxreg.transforms.direction_clipping import clip_update_rms, spike_aware_clip
from jaxreg.transforms.dual_averaging import DualAveragingState, ramda, rda, rmda
from jaxreg.transforms.per_example import PerExample, per_example_clip
from jaxreg.transforms.proximal import ProximalState, proximal
from jaxreg.transforms.pruning import PruningState, magnitude_pruning, n_m_pruning
from jaxreg.transforms.skipping import SkipState, skip_step
from jaxreg.transforms.sparsity import SparsityState, sparsity_target

__all__ = [
    "ClipState",
    "DecayState",
    "DualAveragingState",
    "L2State",
    "NonfiniteState",
    "PerExample",
    "ProximalState",
    "PruningState",
    "SkipState",
    "SparsityState",
    "adagc",
    "adaptive_clip",
    "autoclip",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "clip_update_rms",
    "ema",
    "l2_decay",
    "magnitude_pruning",
    "n_m_pruning",
    "per_example_clip",
    "proximal",
    "ramda",
    "rda",
    "reapply",
    "rmda",
    "skip_step",
    "sparsity_target",
    "spike_aware_clip",
    "weight_decay",
    "zclip",
]
