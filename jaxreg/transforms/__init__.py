"""Everything that changes gradients, updates or weights, as optax gradient transformations."""

from jaxreg.transforms.averaging import reapply
from jaxreg.transforms.clipping import ClipState, clip_by_global_norm
from jaxreg.transforms.decay import DecayState, l2_decay, weight_decay
from jaxreg.transforms.dual_averaging import DualAveragingState, ramda, rda, rmda
from jaxreg.transforms.proximal import ProximalState, proximal
from jaxreg.transforms.pruning import PruningState, magnitude_pruning, n_m_pruning
from jaxreg.transforms.sparsity import SparsityState, sparsity_target

__all__ = [
    "ClipState",
    "DecayState",
    "DualAveragingState",
    "ProximalState",
    "PruningState",
    "SparsityState",
    "clip_by_global_norm",
    "l2_decay",
    "magnitude_pruning",
    "n_m_pruning",
    "proximal",
    "ramda",
    "rda",
    "reapply",
    "rmda",
    "sparsity_target",
    "weight_decay",
]
