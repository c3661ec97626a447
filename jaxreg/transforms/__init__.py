"""Everything that changes gradients, updates or weights, as optax gradient transformations."""

from jaxreg.transforms.clipping import ClipState, clip_by_global_norm
from jaxreg.transforms.decay import DecayState, l2_decay, weight_decay
from jaxreg.transforms.proximal import ProximalState, proximal

__all__ = [
    "ClipState",
    "DecayState",
    "ProximalState",
    "clip_by_global_norm",
    "l2_decay",
    "proximal",
    "weight_decay",
]
