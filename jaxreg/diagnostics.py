"""What an optimizer's state tells of its last step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.transforms.clip import ClipState, NonfiniteState
from jaxreg.transforms.constrained_decay import ConstrainedDecayState
from jaxreg.transforms.decay import DecayState, L2State
from jaxreg.transforms.skipping import SkipState
from jaxreg.transforms.spectral_decay import SpectralDecayState
from jaxreg.transforms.watching import WatchState

Scalars = dict[str, jax.Array]


def metrics(opt_state: Any) -> Scalars:
    """The scalars in an optimizer's state that are worth logging, by name.

    Works under ``jit``, on the state of any chain or wrapper of optax that has transformations of
    this library in it; nothing is computed but a few scalars.

    Args:
        opt_state: the state of an optax transformation.

    Returns:
        Of a clip ``norm``, ``clipped_norm`` and ``coefficient`` (the smallest one) in the last
        step, ``clip_rate``, the share of steps so far that were clipped, and ``nonfinite``, the
        number of those with an infinity or a NaN; of `jaxreg.skip_step` ``norm``, ``limit``,
        ``skipped`` and ``nonfinite`` (counts). Of clips that cut entries (`jaxreg.clip_by_value`,
        `jaxreg.spike_aware_clip`) ``nonfinite`` under "skip", and nothing else. Of
        `jaxreg.weight_decay` and `jaxreg.spectral_decay` ``amount``, rate * strength of the last
        step, whatever gate and profile make of it: what they leave out is not counted, as that
        would read all weights once more. Of `jaxreg.l2_decay` ``amount``, its strength. Of
        `jaxreg.constrained_decay` ``multiplier``, the mean over leaves, and ``largest``. Of
        `jaxreg.watch` the norms of weights and update, ``update_ratio``, ``angle`` (radians) and
        the share of ``zeros``: with it, what hyperball, anchors and projections do is seen, which
        tell nothing themselves. The names begin with ``clip.``, ``skip.``, ``decay.``,
        ``spectral_decay.``, ``l2.``, ``constrained_decay.`` or ``weights.``, and with ``clip0.``,
        ``clip1.``, ... where there are several, in the order of the state.

    Raises:
        ValueError: for a transformation in place of its state.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.regularize(optax.scale_by_adam(), 1e-3, clip=1.0)
    >>> w = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(w), w)
    >>> {name: round(float(value), 3) for name, value in jaxreg.metrics(state).items()}
    {'clip.norm': 5.0, 'clip.clipped_norm': 1.0, 'clip.coefficient': 0.2, 'clip.clip_rate': 1.0,
     'clip.nonfinite': 0.0}
    """
    if _check.is_transformation(opt_state):
        accepted = "its state, such as tx.init(params)"
        raise _check.ArgumentError("opt_state", "a transformation", accepted)
    found: dict[str, list[Scalars]] = {}
    for name, scalars in _found(opt_state):
        found.setdefault(name, []).append(scalars)
    return {
        f"{name}{i if len(all_of_it) > 1 else ''}.{key}": value
        for name, all_of_it in found.items()
        for i, scalars in enumerate(all_of_it)
        for key, value in scalars.items()
    }


def _found(state: Any) -> list[tuple[str, Scalars]]:
    """What each state of a known kind tells, the outer ones first."""
    told: list[tuple[str, Scalars]] = []
    for node in _tree.nodes(state, tuple(_TOLD)):
        name, scalars = _TOLD[type(node)]
        told.append((name, scalars(node)))
        if isinstance(node, SkipState):
            told += _found(node.inner)
    return told


def _fields(*names: str) -> Callable[[Any], Scalars]:
    """Fields of a state, as they are."""
    return lambda state: {name: getattr(state, name) for name in names}


def _of_clip(state: ClipState) -> Scalars:
    return {
        "norm": state.norm,
        "clipped_norm": state.clipped_norm,
        "coefficient": state.coefficient,
        "clip_rate": state.clipped / jnp.maximum(state.count, 1),
        "nonfinite": state.nonfinite,
    }


def _of_constrained_decay(state: ConstrainedDecayState) -> Scalars:
    multipliers = state.multiplier
    mean = jnp.sum(multipliers) / max(multipliers.size, 1)
    return {"multiplier": mean, "largest": jnp.max(multipliers, initial=0)}


def _of_watch(state: WatchState) -> Scalars:
    return {
        "norm": state.weight_norm,
        "update_norm": state.update_norm,
        "update_ratio": state.ratio,
        "angle": state.angle,
        "zeros": state.zeros,
    }


# What the name of a kind of state begins with, and what it tells.
_TOLD: dict[type, tuple[str, Callable[[Any], Scalars]]] = {
    ClipState: ("clip", _of_clip),
    NonfiniteState: ("clip", _fields("nonfinite")),
    SkipState: ("skip", _fields("norm", "limit", "skipped", "nonfinite")),
    DecayState: ("decay", _fields("amount")),
    SpectralDecayState: ("spectral_decay", _fields("amount")),
    L2State: ("l2", _fields("amount")),
    ConstrainedDecayState: ("constrained_decay", _of_constrained_decay),
    WatchState: ("weights", _of_watch),
}
