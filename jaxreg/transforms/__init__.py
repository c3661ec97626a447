"""Everything that changes gradients, updates or weights, as optax gradient transformations."""

from jaxreg.transforms.adaptive_clipping import adagc, adaptive_clip, autoclip, zclip
from jaxreg.transforms.anchored import (
    EwcState,
    SelectiveProjectionState,
    diagonal_fisher,
    ewc,
    selective_projection_decay,
)
from jaxreg.transforms.averaging import (
    AverageState,
    averaged_params,
    ema_of_params,
    reapply,
    swa,
)
from jaxreg.transforms.clip import ClipState, NonfiniteState
from jaxreg.transforms.clipping import (
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_value,
)
from jaxreg.transforms.constrained_decay import ConstrainedDecayState, constrained_decay
from jaxreg.transforms.constraints import constrain
from jaxreg.transforms.decay import DecayState, L2State, ema, l2_decay, weight_decay
from jaxreg.transforms.direction_clipping import clip_update_rms, spike_aware_clip
from jaxreg.transforms.dual_averaging import DualAveragingState, ramda, rda, rmda
from jaxreg.transforms.hyperball import HyperballState, hyperball
from jaxreg.transforms.lookahead import LookaheadState, lookahead
from jaxreg.transforms.per_example import PerExample, per_example_clip
from jaxreg.transforms.perturbation import (
    GradientNoiseState,
    asam,
    centralize,
    gradient_noise,
    sam,
)
from jaxreg.transforms.proximal import ProximalState, proximal
from jaxreg.transforms.pruning import PruningState, magnitude_pruning, n_m_pruning
from jaxreg.transforms.rounding import StochasticRoundingState, stochastic_rounding
from jaxreg.transforms.skipping import SkipState, skip_step
from jaxreg.transforms.sparsity import SparsityState, sparsity_target
from jaxreg.transforms.spectral_decay import SpectralDecayState, spectral_cap, spectral_decay
from jaxreg.transforms.timescale import decay_from_timescale
from jaxreg.transforms.watching import WatchState, watch

__all__ = [
    "AverageState",
    "ClipState",
    "ConstrainedDecayState",
    "DecayState",
    "DualAveragingState",
    "EwcState",
    "GradientNoiseState",
    "HyperballState",
    "L2State",
    "LookaheadState",
    "NonfiniteState",
    "PerExample",
    "ProximalState",
    "PruningState",
    "SelectiveProjectionState",
    "SkipState",
    "SparsityState",
    "SpectralDecayState",
    "StochasticRoundingState",
    "WatchState",
    "adagc",
    "adaptive_clip",
    "asam",
    "autoclip",
    "averaged_params",
    "centralize",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_value",
    "clip_update_rms",
    "constrain",
    "constrained_decay",
    "decay_from_timescale",
    "diagonal_fisher",
    "ema",
    "ema_of_params",
    "ewc",
    "gradient_noise",
    "hyperball",
    "l2_decay",
    "lookahead",
    "magnitude_pruning",
    "n_m_pruning",
    "per_example_clip",
    "proximal",
    "ramda",
    "rda",
    "reapply",
    "rmda",
    "sam",
    "selective_projection_decay",
    "skip_step",
    "sparsity_target",
    "spectral_cap",
    "spectral_decay",
    "spike_aware_clip",
    "stochastic_rounding",
    "swa",
    "watch",
    "weight_decay",
    "zclip",
]
