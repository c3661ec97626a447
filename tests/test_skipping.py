"""Steps that are left out as a whole."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg

pytestmark = pytest.mark.core

NORMS = [1, 2, 1, 1.5, 30, 1.2, 0.1, 50, 45, 60, 55, 1, 1e3, 2]


def steps(norms=NORMS):
    return [{"w": jnp.array([0.6, 0.8]) * n, "b": jnp.zeros(())} for n in norms]


PARAMS = {"w": jnp.ones(2), "b": jnp.ones(())}


def run(tx, gradients, params=PARAMS):
    """The updates of each step, and the states, the first of all included."""
    states, out = [tx.init(params)], []
    update = jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, states[-1], params)
        out.append(updates)
        states.append(state)
    return out, states


def skips(norms, window, sigmas):
    """Whether each step is left out, and the limits, in NumPy."""
    skipped, limits = [], []
    for t, norm in enumerate(norms):
        last = norms[:t][-window:]
        enough = t >= max(2, window // 2)
        limit = np.mean(last) + sigmas * np.std(last, ddof=1) if enough else np.inf
        limits.append(limit)
        skipped.append(bool(norm > limit))
    return skipped, limits


@pytest.mark.parametrize("window", [2, 4, 5, 128])
@pytest.mark.parametrize("sigmas", [0.5, 2.0, 6.0])
def test_steps_far_above_the_last_norms_are_left_out(window, sigmas):
    skipped, limits = skips(NORMS, window, sigmas)
    found, states = run(jaxreg.skip_step(optax.sgd(1.0), sigmas, window=window), steps())
    for grads, updates, state, skip, limit in zip(
        steps(), found, states[1:], skipped, limits, strict=True
    ):
        expected = jax.tree.map(lambda g, skip=skip: 0 * g if skip else -g, grads)
        chex.assert_trees_all_close(updates, expected)
        np.testing.assert_allclose(state.limit, limit, rtol=1e-5)
    assert int(states[-1].skipped) == sum(skipped)
    assert window == 128 or sigmas > 2 or any(skipped)


def test_the_first_half_window_of_steps_is_taken():
    found, _ = run(jaxreg.skip_step(optax.sgd(1.0), window=8), steps([1, 1, 1, 1e6, 1e9]))
    assert float(found[3]["w"][0]) == pytest.approx(-6e5)
    assert float(found[4]["w"][0]) == pytest.approx(-6e8) or found[4]["w"][0] == 0


def test_the_inner_state_is_as_if_the_step_had_not_been():
    """Adam's moments and its count, bit for bit."""
    norms = [1.0, 1.1, 0.9, 1.0, 100.0, 1.05]
    tx = jaxreg.skip_step(optax.adamw(0.1), window=4)
    found, states = run(tx, steps(norms))
    chex.assert_trees_all_equal(states[5].inner, states[4].inner)
    assert int(states[5].inner[0].count) == 4
    chex.assert_trees_all_equal(found[4], jax.tree.map(jnp.zeros_like, PARAMS))
    expected, alone = run(optax.adamw(0.1), steps([*norms[:4], norms[5]]))
    chex.assert_trees_all_close(found[5], expected[-1], rtol=1e-6)
    chex.assert_trees_all_close(states[-1].inner, alone[-1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_gradient_leaves_the_state_inside_bit_identical(bad, at):
    """optax: momentum that is NaN for ever."""
    tx = jaxreg.skip_step(optax.adamw(0.1), window=4)
    gradients = steps([1.0, 1.1, 0.9, 1.0, 1.2])
    spoilt = jax.tree.map(lambda g: g.at[..., -1:].set(bad) if g.ndim else g, gradients[0])
    found, states = run(tx, [*gradients[:at], spoilt, *gradients[at:]])
    expected, alone = run(tx, gradients)
    chex.assert_trees_all_equal(found[at], jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(states[at + 1].inner, states[at].inner)
    chex.assert_trees_all_equal(states[at + 1].history, states[at].history)
    chex.assert_trees_all_equal([*found[:at], *found[at + 1 :]], expected)
    chex.assert_trees_all_equal(states[-1].inner, alone[-1].inner)
    chex.assert_trees_all_equal(states[-1].limit, alone[-1].limit)
    last = states[-1]
    assert (int(last.count), int(last.skipped), int(last.nonfinite)) == (6, 1, 1)


def test_other_policies_for_what_is_not_finite():
    gradients = [*steps([1.0, 1.1, 0.9]), {"w": jnp.array([np.nan, 0.8]), "b": jnp.zeros(())}]
    zero, states = run(jaxreg.skip_step(optax.sgd(1.0), window=4, on_nonfinite="zero"), gradients)
    np.testing.assert_allclose(zero[-1]["w"], [0, -0.8], rtol=1e-6)
    assert (int(states[-1].skipped), int(states[-1].nonfinite)) == (0, 1)
    chex.assert_trees_all_equal(states[-1].history, states[-2].history)
    np.testing.assert_allclose(states[-1].norm, 0.8, rtol=1e-6)
    tx = jaxreg.skip_step(optax.sgd(1.0), window=4, on_nonfinite="propagate")
    passed, states = run(tx, gradients)
    np.testing.assert_array_equal(passed[-1]["w"], np.float32([np.nan, -0.8]))
    chex.assert_trees_all_equal(states[-1].history, states[-2].history)
    spike = [*gradients[:3], {"w": jnp.array([np.nan, 1e6]), "b": jnp.zeros(())}]
    tx = jaxreg.skip_step(optax.sgd(1.0), window=4, on_nonfinite="zero")
    chex.assert_trees_all_equal(run(tx, spike)[0][-1], jax.tree.map(jnp.zeros_like, PARAMS))


def test_infinite_sigmas_leave_out_what_is_not_finite_alone():
    tx = jaxreg.skip_step(optax.sgd(1.0), np.inf, window=4)
    found, states = run(tx, [*steps([1, 1, 1, 1e9]), *steps([np.nan])])
    assert float(found[3]["w"][1]) == pytest.approx(-8e8)
    chex.assert_trees_all_equal(found[4], jax.tree.map(jnp.zeros_like, PARAMS))
    assert int(states[-1].skipped) == 1


def test_equal_norms_and_norms_of_any_size():
    for scale in (1e25, 1.0, 1e-25):
        tx = jaxreg.skip_step(optax.sgd(1.0), window=4)
        _, states = run(tx, steps([scale, 1.1 * scale, 0.9 * scale, scale, 5 * scale]))
        assert int(states[-1].skipped) == 1
    _, states = run(jaxreg.skip_step(optax.sgd(1.0), window=4), steps([0.0] * 6))
    assert int(states[-1].skipped) == 0


def test_a_lasting_change_of_scale_is_followed():
    _, states = run(
        jaxreg.skip_step(optax.sgd(1.0), window=4), steps([1, 1.1, 0.9, 1, *[10.0] * 6])
    )
    assert [int(s.skipped) for s in states[5:]] == [1] * 6


def test_around_multi_steps_a_bad_micro_batch_does_not_poison_the_accumulator():
    """optax: one infinity in it, and the accumulator is NaN for good."""
    tx = jaxreg.skip_step(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), window=8)
    good, bad = steps([1.0, 3.0]), steps([np.inf])
    found, states = run(tx, [good[0], *bad, good[1]])
    np.testing.assert_allclose(found[-1]["w"], [-1.2, -1.6], rtol=1e-6)
    assert int(states[-1].inner.gradient_step) == 1


def test_extra_arguments_reach_what_is_inside():
    def update(updates, state, params=None, *, scale, **extra):
        return jax.tree.map(lambda u: scale * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = jaxreg.skip_step(inner)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, scale=2.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: 2 * p, PARAMS))
