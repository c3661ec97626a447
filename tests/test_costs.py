"""What clips and decays cost: XLA's counts of bytes, temporary memory and fusions in a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxreg
from jaxreg import norms

pytestmark = pytest.mark.core


@pytest.fixture
def usual(monkeypatch):
    """Without branches that are not taken as a rule, which XLA counts with the others."""
    plain = lambda self: jnp.sqrt(self.total([self._squares(x) for x in self.leaves]))  # noqa: E731
    monkeypatch.setattr(norms._Sums, "norms_by_branch", plain)
    monkeypatch.setattr(jax.lax, "cond", lambda pred, usual, other, *args: usual(*args))


class Cost(NamedTuple):
    bytes: float
    temporary: float
    fusions: int
    leaves: int


def cost(tx, width=128, depth=4):
    """Bytes a parameter by XLA's own count of a step with donated buffers."""
    params = {
        f"block_{i}": {"kernel": jnp.ones((width, 2 * width)), "bias": jnp.ones(2 * width)}
        for i in range(depth)
    }

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=0).lower((params, tx.init(params)), params)
    compiled = lowered.compile()
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    entry = compiled.as_text().partition("ENTRY")[2]
    return Cost(
        compiled.cost_analysis()["bytes accessed"] / entries,
        compiled.memory_analysis().temp_size_in_bytes / entries,
        entry.count("fusion("),
        len(jax.tree.leaves(params)),
    )


def adamw(**parts):
    return jaxreg.regularize(optax.scale_by_adam(), 1e-3, decay=0.01, **parts)


new_enough = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10), reason="XLA fused less before"
)


@new_enough
@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize(
    "make",
    [jaxreg.clip_by_global_norm, jaxreg.clip_by_leaf_norm, lambda _, **kw: jaxreg.autoclip(**kw)],
    ids=["global", "leaf", "autoclip"],
)
def test_a_clip_reads_the_gradient_once_more_and_writes_nothing(make, policy):
    """Beside 40 bytes a parameter of XLA's AdamW; optax's clip takes 60 and a gradient's copy."""
    found = cost(adamw(clip=make(1.0, on_nonfinite=policy)))
    assert 42 < found.bytes < 44.5
    assert found.temporary < 0.2


@new_enough
@pytest.mark.usefixtures("usual")
def test_a_value_clip_costs_nothing_and_adaptive_clip_reads_gradient_and_weights_once_more():
    assert cost(adamw(clip=jaxreg.clip_by_value(1.0))).bytes < 40.5
    found = cost(adamw(clip=jaxreg.adaptive_clip()))
    assert 46 < found.bytes < 50
    assert found.temporary < 0.2


@new_enough
def test_the_branch_that_is_not_taken_needs_no_copy_of_the_gradient_either():
    for clip in (jaxreg.clip_by_global_norm(1.0), jaxreg.adaptive_clip()):
        assert cost(adamw(clip=clip)).temporary < 3


# Upper bounds: XLA counts each branch, as if all of them were taken in one step. What is taken as a
# rule is above.
WITH_BRANCHES = {  # transformation, bytes and temporary memory
    **{
        policy: (adamw(clip=jaxreg.clip_by_global_norm(1.0, on_nonfinite=policy)), 48.2, 0.2)
        for policy in ("propagate", "skip")
    },
    # The branch for gradients that are not finite has room for a copy of them.
    "zero": (adamw(clip=jaxreg.clip_by_global_norm(1.0, on_nonfinite="zero")), 64.4, 4.1),
    # No branch: the old moments are there until it is known that the step is taken.
    "skip_step": (jaxreg.skip_step(adamw(clip=1.0)), 68.3, 8.1),
}


@new_enough
@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_what_a_step_costs_with_all_branches_counted(name):
    tx, most, temporary = WITH_BRANCHES[name]
    found = cost(tx)
    assert found.bytes < most
    assert found.temporary < temporary


@new_enough
@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("depth", [4, 8])
def test_decay_l2_and_a_penalty_are_fused_into_the_step(depth):
    """They add a fusion each, for numbers that all leaves share, and none for a leaf."""
    direction = optax.scale_by_adam()
    alone = cost(jaxreg.regularize(direction, 1e-3, clip=1.0), depth=depth)
    for parts in (
        {"decay": 0.01},
        {"l2": 0.01},
        {"penalty": jaxreg.L1(1e-3)},
        {"decay": 0.01, "l2": 0.01, "penalty": jaxreg.L1(1e-3)},
    ):
        found = cost(jaxreg.regularize(direction, 1e-3, clip=1.0, **parts), depth=depth)
        assert found.fusions <= alone.fusions + len(parts)
        assert found.temporary < 0.2


DECAYS = {  # bytes a parameter beside AdamW's 40, and temporary memory
    "independent": (jaxreg.weight_decay(0.01, rate=1.0), 0, 0),
    "cautious": (jaxreg.weight_decay(0.01, gate="cautious"), 0, 0),
    "huber": (jaxreg.weight_decay(0.01, profile="huber"), 0, 0),
    "l1": (jaxreg.weight_decay(0.01, profile="l1"), 0, 0),
    "toward init": (jaxreg.weight_decay(0.01, toward="init"), 4, 0),
    # Written and read, and read once more as XLA makes a loop for each array that it writes.
    "toward ema": (jaxreg.weight_decay(0.01, toward=jaxreg.ema(0.9)), 16, 0),
    # The weights after the step are written, and read for their norm and for the update.
    "constrained": (jaxreg.constrained_decay(), 16, 4),
}


@new_enough
@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_costs_the_bytes_that_it_needs(name):
    decay, more, temporary = DECAYS[name]
    found = cost(jaxreg.regularize(optax.scale_by_adam(), 1e-3, decay=decay))
    assert 39.5 < found.bytes - more < 40.3
    assert found.temporary < temporary + 0.2


def test_no_kernel_adds_up_all_leaves_and_those_of_one_shape_are_alike():
    """What makes a tree of thousands of small leaves compile in minutes."""
    leaves = [jnp.ones(8)] * 300
    program = jax.jit(jaxreg.global_norm).lower(leaves).compile().as_text()
    called = [line.partition(" fusion(")[2] for line in program.splitlines() if " fusion(" in line]
    assert len(called) > 300
    assert 0 < max(line.partition(")")[0].count("%") for line in called) <= 150
    assert "slice={[299:300]}" not in program  # of a number for each leaf
