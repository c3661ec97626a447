"""Clips in a proximal step, whose gain their coefficients are a part of."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from clips import CLIPS, GOOD, every_clip, run
from errors import message

import jaxreg


@every_clip
def test_a_penalty_follows_the_coefficient_of_an_active_clip(name):
    """The step of the prox is the rate times the coefficient that the leaf was clipped by."""
    if name == "adaptive_clip":
        return  # has one a unit: refused, below
    rate, penalty, clip = 0.1, jaxreg.L1(0.5), CLIPS[name]()
    tx = jaxreg.proximal(optax.chain(clip, optax.identity()), rate, penalty.on("**"))
    params, state, clip_state = GOOD[0], tx.init(GOOD[0]), clip.init(GOOD[0])
    active = 0
    for grads in GOOD:
        updates, state = tx.update(grads, state, params)
        clipped, clip_state = clip.update(grads, clip_state, params)
        each = clip_state.coefficients
        each = each if each.ndim else (each,) * 3
        active += min(map(float, each)) < 1
        each = jax.tree.unflatten(jax.tree.structure(params), each)
        expected = jax.tree.map(
            lambda p, g, c: penalty.prox(p - rate * g, rate * float(c)), params, clipped, each
        )
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-7)
    assert active


def test_clip_update_rms_around_adam_multiplies_the_gain_of_adam():
    rate, penalty, adam = 0.1, jaxreg.L1(0.5), optax.scale_by_adam(b2=0.9)
    direction = jaxreg.clip_update_rms(0.5, direction=adam)
    tx = jaxreg.proximal(direction, rate, penalty.on("**"))
    params, state, inner = GOOD[0], tx.init(GOOD[0]), direction.init(GOOD[0])
    active = 0
    for grads in GOOD:
        updates, state = tx.update(grads, state, params)
        moved, inner = direction.update(grads, inner, params)
        nu, count = inner.direction.nu, inner.direction.count
        each = jax.tree.unflatten(jax.tree.structure(params), inner.clip.coefficients)
        expected = jax.tree.map(
            lambda p, u, c, v, n=count: penalty.prox(
                p - rate * u, rate * c / (jnp.sqrt(v / (1 - 0.9**n)) + 1e-8)
            ),
            params,
            moved,
            each,
            nu,
        )
        active += float(inner.clip.coefficient) < 1
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
    assert active > 3


@pytest.mark.parametrize(
    "link", [jaxreg.adaptive_clip(), jaxreg.clip_by_value(1.0)], ids=["adaptive_clip", "value"]
)
def test_a_clip_without_one_coefficient_a_leaf_is_refused_with_the_remedy(link):
    direction = optax.chain(link, optax.scale_by_adam())
    with pytest.raises(ValueError, match=r"^metric: got 'auto' for .*jaxreg.clip.*metric=") as e:
        jaxreg.proximal(direction, 0.1, jaxreg.L1(0.1))
    message(e)
    jaxreg.regularize(optax.scale_by_adam(), 0.1, clip=link).init(GOOD[0])  # without a penalty


def test_a_value_clip_and_a_penalty_go_together_with_a_metric_that_is_given():
    clip, adam = jaxreg.clip_by_value(0.1), jaxreg.metric.adam()
    penalty = jaxreg.L1(0.1).on("**")
    tx = jaxreg.proximal(optax.chain(clip, optax.scale_by_adam()), 0.1, penalty, metric=adam)
    alone = jaxreg.proximal(optax.scale_by_adam(), 0.1, penalty)
    cut = [jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), grads) for grads in GOOD]
    chex.assert_trees_all_close(run(tx, GOOD)[0], run(alone, cut)[0], rtol=1e-5, atol=1e-7)


def test_a_clip_by_units_and_a_penalty_go_together_with_a_metric_that_is_given():
    clip = jaxreg.adaptive_clip(0.01)
    tx = jaxreg.proximal(clip, 0.1, jaxreg.L1(0.1), metric=jaxreg.metric.sgd())
    w = jnp.array([[3.0], [4.0]])
    updates, _ = tx.update(w, tx.init(w), w)  # the gradient is cut to a norm of 0.05
    chex.assert_trees_all_close(optax.apply_updates(w, updates), w * 0.999 - 0.01, rtol=1e-5)


def test_a_spike_aware_clip_has_the_gain_of_its_direction():
    adam = optax.scale_by_adam()
    wrapped = jaxreg.spike_aware_clip(adam, threshold=1e30)
    found, expected = (
        run(jaxreg.proximal(d, 0.1, jaxreg.L1(0.3).on("**")), GOOD)[0] for d in (wrapped, adam)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [jaxreg.clip_by_global_norm, jaxreg.clip_by_leaf_norm])
def test_a_skipped_gradient_leaves_a_penalty_its_parameters(make):
    """The coefficient is 0, not NaN: a proximal step takes it for its gain."""
    clip = make(1.0, on_nonfinite="skip")
    tx = jaxreg.regularize(optax.identity(), 0.01, clip=clip, penalty=jaxreg.L1(0.1))
    w = jnp.array([1.0, 2.0, 3.0])
    state = tx.init(w)
    update = jax.jit(tx.update)
    for g in ([1.0, 2.0, 3.0], [jnp.nan, 1.0, 1.0], [1.0, 1.0, 1.0]):
        updates, state = update(jnp.array(g), state, w)
        w = optax.apply_updates(w, updates)
        chex.assert_tree_all_finite(w)
    assert int(jaxreg.metrics(state)["clip.nonfinite"]) == 1


@pytest.mark.parametrize(
    "wrap",
    [jaxreg.spike_aware_clip, lambda adam: jaxreg.clip_update_rms(jnp.inf, direction=adam)],
    ids=["spike_aware_clip", "clip_update_rms"],
)
def test_a_metric_that_is_given_is_that_of_the_direction_inside(wrap):
    def end(direction, metric):
        tx = jaxreg.proximal(direction, 0.01, jaxreg.L1(1e-3), metric=metric)
        w, state = jnp.ones(3), tx.init(jnp.ones(3))
        for _ in range(3):
            updates, state = tx.update(jnp.full(3, 0.01), state, w)
            w = optax.apply_updates(w, updates)
        return w

    plain = end(optax.scale_by_adam(), "auto")
    for metric in ("auto", jaxreg.metric.adam()):
        chex.assert_trees_all_close(end(wrap(optax.scale_by_adam()), metric), plain, rtol=1e-6)
