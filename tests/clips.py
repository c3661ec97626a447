"""Clips, gradients and a run, for the tests of what all clips share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg

RNG = np.random.default_rng(0)
STEPS = [
    {"a": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)}, "b": RNG.normal(size=5)}
    for _ in range(4)
]
STEPS[1] = jax.tree.map(lambda g: 10 * g, STEPS[1])
STEPS[2] = jax.tree.map(np.zeros_like, STEPS[2])


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(tx, steps, params=None):
    """The updates of each step, and the last state."""
    params = jax.tree.map(jnp.ones_like, steps[0]) if params is None else params
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for grads in steps:
        updates, state = update(grads, state, params)
        out.append(updates)
    return out, state


# Every clip that multiplies leaves or units by a coefficient; the last leaf is alone in its scope.
CLIPS = {
    "clip_by_global_norm": lambda **kw: jaxreg.clip_by_global_norm(0.5, **kw),
    "clip_by_leaf_norm": lambda **kw: jaxreg.clip_by_leaf_norm(0.5, **kw),
    "clip_by_group_norm": lambda **kw: jaxreg.clip_by_group_norm({"a/*": 0.5}, **kw),
    "adaptive_clip": lambda **kw: jaxreg.adaptive_clip(0.01, **kw),
    "clip_update_rms": lambda **kw: jaxreg.clip_update_rms(0.1, **kw),
    "autoclip": lambda **kw: jaxreg.autoclip(30, window=3, **kw),
    "zclip": lambda **kw: jaxreg.zclip(warm_up=2, **kw),
    "adagc": lambda **kw: jaxreg.adagc(warm_up=2, max_norm=3.0, **kw),
}
every_clip = pytest.mark.parametrize("name", CLIPS)
GOOD = [f32(jax.tree.map(lambda g, s=s: (1 + 0.1 * s) * g, STEPS[0])) for s in range(6)]
GOOD[3] = jax.tree.map(lambda g: 20 * g, GOOD[3])
