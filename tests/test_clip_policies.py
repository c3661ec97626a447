"""What clips do with gradients that are not finite, by each policy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clips import CLIPS, GOOD, every_clip, run

import jaxreg

OF_ALL = ("clip_by_global_norm", "autoclip", "zclip")
every_bad = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)


def spoilt(grads, bad, cleaned=False):
    """With one bad entry, or with 0 in its place."""
    kernel = grads["a"]["kernel"].at[1, 2].set(0 if cleaned else bad)
    return {**grads, "a": {**grads["a"], "kernel": kernel}}


@every_clip
@every_bad
def test_skip_zeroes_the_whole_gradient_of_a_bad_step(name, bad):
    found, state = run(CLIPS[name](on_nonfinite="skip"), [*GOOD[:2], spoilt(GOOD[2], bad)])
    chex.assert_trees_all_equal(found[-1], jax.tree.map(jnp.zeros_like, GOOD[2]))
    assert (int(state.count), int(state.nonfinite)) == (3, 1)


@every_clip
@every_bad
def test_zero_clips_the_rest_as_if_bad_entries_were_zero(name, bad):
    found, state = run(CLIPS[name](on_nonfinite="zero"), [*GOOD[:2], spoilt(GOOD[2], bad)])
    alone, expected = run(CLIPS[name](), [*GOOD[:2], spoilt(GOOD[2], bad, cleaned=True)])
    chex.assert_trees_all_close(found, alone, rtol=1e-6)
    assert (int(state.count), int(state.nonfinite)) == (3, 1)
    np.testing.assert_allclose(state.norm, expected.norm, rtol=1e-6)


@every_clip
def test_propagate_makes_a_nan_nan_and_what_shares_its_norm(name):
    found = run(CLIPS[name](), [*GOOD[:2], spoilt(GOOD[2], np.nan)])[0][-1]
    kernel = np.asarray(found["a"]["kernel"])
    assert np.isnan(kernel).sum() == (4 if name == "adaptive_clip" else 12)
    assert np.isnan(found["b"]).all() == (name in OF_ALL)
    assert np.isfinite(found["b"]).all() == (name not in OF_ALL)


@every_clip
@pytest.mark.parametrize("bad", [np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("before", [0, 2])
def test_propagate_makes_an_infinity_nan_and_what_shares_its_norm_zero(name, bad, before):
    found, state = run(CLIPS[name](), [*GOOD[:before], spoilt(GOOD[2], bad)])
    kernel = np.asarray(found[-1]["a"]["kernel"])
    assert np.isnan(kernel[1, 2])
    assert np.isnan(kernel).sum() == 1
    assert (kernel == 0).sum() == (3 if name == "adaptive_clip" else 11)
    of_all = name in OF_ALL or (name == "adagc" and before == 0)  # its first steps
    assert (found[-1]["b"] == 0).all() == of_all
    assert int(state.nonfinite) == 1


@every_clip
@every_bad
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_a_bad_step_is_not_remembered(name, bad, policy):
    """In the first steps and after them: the good ones are clipped as if it had not been."""
    make = CLIPS[name]
    steps = [spoilt(GOOD[5], bad), GOOD[0], GOOD[1], spoilt(GOOD[5], bad), *GOOD[2:]]
    found, state = run(make(on_nonfinite=policy), steps)
    expected, alone = run(make(), GOOD)
    chex.assert_trees_all_equal([*found[1:3], *found[4:]], expected)
    chex.assert_trees_all_equal(state.memory, alone.memory)
    assert (int(state.count), int(state.nonfinite)) == (8, 2)


@every_clip
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_policies_do_nothing_to_finite_gradients(name, policy):
    found, _ = run(CLIPS[name](on_nonfinite=policy), GOOD)
    chex.assert_trees_all_equal(found, run(CLIPS[name](), GOOD)[0])


@pytest.mark.parametrize("semantics", ["torch", "optax", "keras"])
def test_zero_cleans_the_norms_of_other_semantics_too(semantics):
    tx = jaxreg.clip_by_global_norm(1.0, on_nonfinite="zero", semantics=semantics)
    (clipped,), state = run(tx, [jnp.array([np.nan, 3.0, np.inf, 4.0])])
    np.testing.assert_allclose(clipped, [0, 0.6, 0, 0.8], rtol=1e-6)
    assert float(state.norm) == 5


@every_bad
def test_values_are_cut_under_each_policy(bad):
    grads = jnp.array([bad, 3.0, 0.1])
    for policy, expected in {
        "propagate": [np.clip(bad, -1, 1), 1, 0.1],
        "skip": [0, 0, 0],
        "zero": [0, 1, 0.1],
    }.items():
        found, state = run(jaxreg.clip_by_value(1.0, on_nonfinite=policy), [grads, jnp.ones(3)])
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)
        np.testing.assert_array_equal(found[1], 1)
        if policy == "skip":
            assert int(state.nonfinite) == 1


def test_leaves_in_no_group_pass_as_they_are_with_what_is_not_finite():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([np.nan, 1.0]), "c": jnp.ones(2)}
    (clipped,), _ = run(jaxreg.clip_by_group_norm({"a": 1.0}), [grads])
    np.testing.assert_array_equal(clipped["b"], [np.nan, 1.0])
    chex.assert_trees_all_equal(clipped["c"], grads["c"])
    np.testing.assert_allclose(clipped["a"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_the_moments_of_a_wrapped_direction_stay_finite(policy):
    tx = jaxreg.clip_update_rms(direction=optax.scale_by_adam(), on_nonfinite=policy)
    state = tx.init(jnp.ones(2))
    for g in ([1.0, 1.0], [jnp.nan, 1.0], [1.0, 1.0]):
        updates, state = tx.update(jnp.array(g), state)
    chex.assert_tree_all_finite(state)
    assert (updates > 0.5).all()
