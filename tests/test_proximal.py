"""Proximal transformations: order, metrics, exact zeros, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import metric

PARAMS = {"dense": {"kernel": jnp.array([[2.0, -0.01]]), "bias": jnp.array([3.0, 0.01])}}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def one_step(tx, params=PARAMS, grads=GRADS):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


# What a step does --------------------------------------------------------------------------------


def test_the_order_is_clip_l2_direction_rate_decay_penalty():
    p, g, lr = np.array([2.0, -1.0]), np.array([3.0, 4.0]), 0.1
    tx = jaxreg.regularize(
        optax.identity(), lr, clip=1.0, l2=0.3, decay=0.2, penalty=jaxreg.L1(0.5)
    )
    stepped, _ = one_step(tx, jnp.array(p, jnp.float32), jnp.array(g, jnp.float32))
    coefficient = 1 / 5
    gradient = coefficient * g + 0.3 * p
    moved = p - lr * gradient - lr * 0.2 * p
    threshold = lr * coefficient * 0.5
    expected = np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
    chex.assert_trees_all_close(stepped, expected.astype(np.float32), rtol=1e-6)


def test_without_a_penalty_regularize_is_the_plain_optimizer():
    chex.assert_trees_all_close(
        one_step(jaxreg.regularize(optax.scale_by_adam(), 0.1))[0],
        one_step(optax.adam(0.1))[0],
        rtol=1e-6,
    )
    # and takes directions whose metric nobody knows
    chex.assert_trees_all_close(
        one_step(jaxreg.regularize(optax.scale_by_lion(), 0.1))[0],
        one_step(optax.lion(0.1, weight_decay=0.0))[0],
        rtol=1e-6,
    )


def test_with_strength_zero_the_aliases_are_optax():
    for ours, theirs in (
        (jaxreg.prox_sgd(0.1, jaxreg.L1(0)), optax.sgd(0.1)),
        (jaxreg.prox_sgd(0.1, jaxreg.L1(0), 0.9), optax.sgd(0.1, momentum=0.9)),
        (jaxreg.prox_sgd(0.1, jaxreg.L1(0), 0.9, True), optax.sgd(0.1, 0.9, nesterov=True)),
        (jaxreg.prox_adam(0.1, jaxreg.L1(0), b1=0.8, eps=0.1), optax.adam(0.1, b1=0.8, eps=0.1)),
        (jaxreg.prox_adam(0.1, jaxreg.L1(0), nesterov=True), optax.nadam(0.1)),
    ):
        chex.assert_trees_all_close(one_step(ours)[0], one_step(theirs)[0], rtol=1e-5)


def test_penalties_act_on_kernels_by_default_and_on_what_they_are_put():
    stepped, _ = one_step(jaxreg.prox_sgd(0.0001, jaxreg.L1(1000.0)))
    assert stepped["dense"]["kernel"][0, 1] == 0
    chex.assert_trees_all_close(stepped["dense"]["bias"], PARAMS["dense"]["bias"] - 0.0001)
    parts = [jaxreg.L1(1000.0).on("**/bias"), jaxreg.NonNegative()]
    stepped, _ = one_step(jaxreg.prox_sgd(0.0001, parts))
    assert stepped["dense"]["bias"][1] == 0
    assert stepped["dense"]["kernel"].tolist() == [[pytest.approx(1.9999), 0.0]]


def test_a_learning_rate_of_zero_changes_nothing():
    for tx in (
        jaxreg.prox_adam(0.0, jaxreg.L1(1.0)),
        jaxreg.prox_sgd(lambda count: 0.0 * count, jaxreg.ElasticNet(1.0, 1.0), 0.9),
        jaxreg.regularize(optax.scale_by_adam(), 0.0, clip=1.0, decay=1.0, penalty=jaxreg.L1(1.0)),
    ):
        chex.assert_trees_all_equal(one_step(tx)[0], PARAMS)


def test_the_step_follows_a_schedule():
    tx = jaxreg.prox_sgd(lambda count: 0.1 * (count + 1), jaxreg.L1(1.0))
    w, zero = jnp.array([1.0]), jnp.zeros(1)
    state = tx.init(w)
    for expected in (0.9, 0.7, 0.4, 0.0):
        updates, state = tx.update(zero, state, w)
        w = optax.apply_updates(w, updates)
        chex.assert_trees_all_close(w, jnp.array([expected]), atol=1e-6)


def test_a_coordinate_that_saw_no_gradient_has_gain_one():
    """A row of an embedding that was not in the batch shrinks by lr * strength, not by 1 / eps."""
    tx = jaxreg.prox_adam(0.01, jaxreg.L1(0.5))
    stepped, _ = one_step(tx, jnp.array([1.0, 1.0]), jnp.array([0.0, 100.0]))
    assert float(stepped[0]) == pytest.approx(1 - 0.01 * 0.5)


# Exact zeros -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_exact_zeros_survive_apply_updates(dtype, jit):
    """Where the prox gives zero, computed here from its parts, apply_updates gives zero."""
    rng = np.random.default_rng(0)
    params, grads = (jnp.asarray(rng.normal(size=20_000), dtype) for _ in range(2))
    penalty, direction, rate = jaxreg.L1(2.0), optax.scale_by_adam(), 0.3
    tx = jaxreg.prox_adam(rate, penalty)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state, direction_state = tx.init(params), direction.init(params)
    for _ in range(3):
        u, direction_state = direction.update(grads, direction_state, params)
        wide, u = params.astype(jnp.float32), u.astype(jnp.float32)
        target, step_size = wide - rate * u, rate * metric.adam()(direction_state, params)
        # A hair less, so that rounding in another order of operations moves no entry over.
        zero = penalty.prox(target, 0.999 * step_size) == 0
        params, state = step(params, state, grads)
        assert params.dtype == dtype
        assert 0.05 < float(zero.mean()) < 0.95
        assert (params[zero] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_weights_are_rounded_once(dtype):
    """What apply_updates gives is the float32 step, rounded, wherever it keeps its magnitude."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=5000), dtype)
    grads = jnp.asarray(rng.normal(size=5000), dtype)
    stepped, _ = one_step(jaxreg.prox_sgd(0.05, jaxreg.L1(0.1)), params, grads)
    wide = params.astype(jnp.float32)
    exact = jaxreg.L1(0.1).prox(wide - jnp.float32(0.05) * grads.astype(jnp.float32), 0.05)
    ratio = exact / wide
    same_magnitude = (ratio > 0.5) & (ratio < 2)
    assert same_magnitude.mean() > 0.9
    chex.assert_trees_all_equal(
        jnp.where(same_magnitude, stepped, 0), jnp.where(same_magnitude, exact.astype(dtype), 0)
    )


# Directions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), optax.sgd(0.1), optax.adamw(optax.linear_schedule(0.1, 0.0, 5))],
    ids=["adam", "sgd", "adamw"],
)
def test_a_whole_optimizer_is_refused_as_a_direction(optimizer):
    """It would ascend: its sign is flipped already."""
    for make in (
        lambda: jaxreg.regularize(optimizer, 0.1),
        lambda: jaxreg.regularize(optimizer, 0.1, clip=1.0),
        lambda: jaxreg.proximal(optimizer, 0.1, jaxreg.L1(0.1)),
        lambda: jaxreg.proximal(optimizer, 0.1, jaxreg.L1(0.1), metric=metric.adam()),
    ):
        with pytest.raises(ValueError, match=r"direction: got a whole optimizer.*scale_by_adam"):
            make()
    for factor in (2.0, np.float32(2.0), jnp.float32(2.0)):
        jaxreg.regularize(optax.chain(optax.trace(0.9), optax.scale(factor)), 0.1)


BY_LAYER = {"dense": {"kernel": "kernel", "bias": "rest"}}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 0.1, 5)),
        optax.masked(optax.adam(0.1), True),
        optax.masked(optax.adam(0.1), {"dense": {"kernel": True, "bias": False}}),
        optax.masked(optax.sgd(0.1), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.MultiSteps(optax.adam(0.1), 1),
        optax.partition({"kernel": optax.adam(0.1), "rest": optax.sgd(0.1)}, BY_LAYER),
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.contrib.schedule_free_adamw(),
        jaxreg.prox_adam(0.1, jaxreg.L1(0.1)),
        jaxreg.regularize(optax.identity(), 0.1, decay=0.1),
    ],
    ids=lambda tx: getattr(tx.update, "__qualname__", "tx").split(".")[0],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_whole_optimizer_in_a_wrapper_is_refused_at_init(optimizer, jit):
    for options in ({}, {"clip": 1.0}, {"penalty": jaxreg.L1(0.1), "metric": metric.sgd()}):

        def init(params, options=options):
            return jaxreg.regularize(optimizer, 0.1, **options).init(params)

        with pytest.raises(ValueError, match=r"direction: got a whole optimizer.*scale_by_adam"):
            (jax.jit(init) if jit else init)(PARAMS)


@pytest.mark.parametrize(
    "direction",
    [
        optax.masked(optax.scale_by_adam(), {"dense": {"kernel": True, "bias": False}}),
        optax.partition({"kernel": optax.scale_by_adam(), "rest": optax.identity()}, BY_LAYER),
        optax.add_noise(10.0, 0.5, 0),
        optax.add_decayed_weights(10.0),
        optax.scale_by_trust_ratio(),
        optax.scale_by_lion(),
        optax.centralize(),
        optax.set_to_zero(),
    ],
    ids=lambda tx: tx.update.__qualname__.split(".")[0],
)
def test_a_direction_is_no_whole_optimizer(direction):
    links = (jaxreg.clip_by_global_norm(1.0), direction, optax.scale_by_learning_rate(0.1))
    ours, _ = one_step(jaxreg.regularize(direction, 0.1, clip=1.0))
    chex.assert_trees_all_close(ours, one_step(optax.chain(*links))[0], rtol=1e-6)


def test_auto_refuses_l2_behind_a_gain_that_it_would_not_have():
    for direction in (optax.trace(0.9), optax.scale_by_adam()):
        chain = optax.chain(direction, jaxreg.l2_decay(0.5))
        with pytest.raises(ValueError, match="l2_decay behind a link with a gain"):
            jaxreg.proximal(chain, 0.1, jaxreg.L1(0.1))


def test_l2_before_the_clip_is_weaker_by_its_coefficient_and_the_penalty_is_not():
    """The minimizers of (w - 3)^2 / 2 + (s/2) w^2, with a clip that stays active in coupled L2."""
    minimum, strength = 3.0, 1.0
    ends = {}
    for name, part in (("l2", strength), ("penalty", jaxreg.L2(strength))):
        tx = jaxreg.regularize(optax.identity(), 0.1, clip=0.5, **{name: part})
        w = jnp.array([[0.0]])
        state = tx.init(w)

        @jax.jit
        def update(w, state, tx=tx):
            updates, state = tx.update(w - minimum, state, w)
            return optax.apply_updates(w, updates), state

        for _ in range(300):
            w, state = update(w, state)
        ends[name] = float(w[0, 0])
    assert ends["penalty"] == pytest.approx(minimum / (1 + strength), rel=1e-4)
    coefficient = 0.5 / (minimum - ends["l2"])
    assert ends["l2"] == pytest.approx(minimum / (1 + strength / coefficient), rel=1e-4)


# Bad arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxreg.prox_adam(-0.1, jaxreg.L1(0.1)), "learning_rate: got -0.1"),
        (lambda: jaxreg.prox_adam(0.1, 0.1), "penalty: got 0.1; accepted: a jaxreg penalty"),
        (lambda: jaxreg.prox_adam(0.1, [jaxreg.L1(0.1), None]), "penalty: got None"),
        (
            lambda: jaxreg.proximal(
                optax.identity(), 0.1, jaxreg.L1(0.1), metric=jaxreg.metric.sgd
            ),
            r"metric: got the function jaxreg.metric.sgd; accepted: .* jaxreg.metric.sgd\(\)",
        ),
        (lambda: jaxreg.prox_adam(0.1, "l1"), "penalty: got 'l1'; accepted: a jaxreg penalty"),
        (lambda: jaxreg.prox_adam(0.1, jaxreg.L1(0.1), b1=1.0), "b1: got 1.0"),
        (lambda: jaxreg.prox_sgd(0.1, jaxreg.L1(0.1), momentum=1.5), "momentum: got 1.5"),
        (lambda: jaxreg.regularize(optax.identity(), 0.1, clip=0.0), "clip: got 0.0"),
        (lambda: jaxreg.regularize(optax.identity(), 0.1, l2=-1.0), "l2: got -1.0"),
        (lambda: jaxreg.regularize(optax.identity(), 0.1, decay=-1.0), "decay: got -1.0"),
        (lambda: jaxreg.regularize(optax.identity(), 0.1, penalty=3), "penalty: got 3"),
        (lambda: jaxreg.regularize("adam", 0.1), "direction: got 'adam'"),
        (
            lambda: jaxreg.proximal(optax.identity(), 0.1, jaxreg.L1(0.1), metric="adam"),
            "metric: got 'adam'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_penalties_on_one_leaf_without_a_closed_form_sum_are_refused():
    tx = jaxreg.prox_sgd(0.1, [jaxreg.L1(0.1), jaxreg.LInf(0.1).on("dense/*")])
    with pytest.raises(ValueError, match=r"L1\(0.1\) and LInf\(0.1\).*dense/kernel.*closed-form"):
        tx.init(PARAMS)


def test_a_penalty_without_a_leaf_is_refused_at_init():
    with pytest.raises(ValueError, match="matches no leaf.*dense/bias"):
        jaxreg.prox_adam(0.1, jaxreg.L1(0.1).on("dens/*")).init(PARAMS)


def test_a_leaf_that_is_not_floating_is_refused_at_init():
    with pytest.raises(ValueError, match="int32 values on the leaf kernel"):
        jaxreg.prox_adam(0.1, jaxreg.L1(0.1)).init({"kernel": jnp.arange(4).reshape(2, 2)})
    with pytest.raises(ValueError, match="params: got 1.5 on the leaf kernel; .*floating arrays"):
        jaxreg.regularize(optax.identity(), 0.1).init({"kernel": 1.5})


def test_update_without_params_is_refused():
    tx = jaxreg.prox_adam(0.1, jaxreg.L1(0.1))
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(GRADS, tx.init(PARAMS))


# What it costs -----------------------------------------------------------------------------------


def bytes_accessed(tx, params):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    found = compiled.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["bytes accessed"]


@pytest.mark.parametrize("penalty", [jaxreg.L1(0.1), jaxreg.MCP(0.1), jaxreg.Box(-1, 1)], ids=repr)
def test_the_proximal_step_moves_no_bytes_beside_those_of_adam(penalty):
    """By XLA's own count: it is fused into the update."""
    params = {"kernel": jnp.ones((256, 256))}
    adam = bytes_accessed(optax.adam(0.1), params)
    assert bytes_accessed(jaxreg.prox_adam(0.1, penalty), params) <= 1.01 * adam


def test_a_class_of_penalties_is_no_schedule_of_them():
    """The step count would become its strength, in silence."""
    for make in (
        lambda: jaxreg.prox_adam(0.1, jaxreg.L1),
        lambda: jaxreg.regularize(optax.identity(), 0.1, penalty=[jaxreg.L2(0.1), jaxreg.L1]),
    ):
        with pytest.raises(ValueError, match="^penalty: got .*accepted: a jaxreg penalty"):
            make()
