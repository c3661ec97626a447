"""Weight decay, decoupled and coupled, against the papers' formulas."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxreg
from jaxreg import where

pytestmark = pytest.mark.core

PARAMS = {"dense": {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0, 3.0])}}
GRADS = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)
LR = 0.01


def run(tx, steps=5):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def kernels_only(params):
    return where.kernels.mask(params)


def test_inside_regularize_it_is_adamw():
    ours = jaxreg.regularize(optax.scale_by_adam(), LR, decay=0.1)
    chex.assert_trees_all_close(
        run(ours), run(optax.adamw(LR, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_the_rate_follows_a_schedule_of_the_learning_rate():
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    ours = jaxreg.regularize(optax.scale_by_adam(), schedule, decay=0.1)
    chex.assert_trees_all_close(
        run(ours), run(optax.adamw(schedule, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_a_rate_of_its_own_makes_it_independent_of_the_learning_rate():
    for lr in (0.0, 0.1):
        tx = jaxreg.regularize(optax.identity(), lr, decay=jaxreg.weight_decay(0.1, rate=1.0))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates["dense"]["kernel"], -0.1 * PARAMS["dense"]["kernel"])
        chex.assert_trees_all_equal(updates["dense"]["bias"], jnp.zeros(2))


def test_strength_and_rate_may_be_schedules():
    tx = jaxreg.weight_decay(lambda count: 0.1 * (count + 1), rate=lambda count: 2.0**-count)
    state, factors = tx.init(PARAMS), []
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        factors.append(float(updates["dense"]["kernel"][0, 0] / -2.0))
    assert factors == pytest.approx([0.1, 0.2 / 2, 0.3 / 4])


def test_coupled_l2_is_the_gradient_of_the_penalty():
    tx, penalty = jaxreg.l2_decay(0.3), jaxreg.L2(0.3)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    kernel = PARAMS["dense"]["kernel"]
    expected = GRADS["dense"]["kernel"] + jax.grad(penalty.value)(kernel)
    chex.assert_trees_all_close(updates["dense"]["kernel"], expected)
    chex.assert_trees_all_equal(updates["dense"]["bias"], GRADS["dense"]["bias"])


def test_coupled_and_decoupled_differ_under_adam_and_agree_under_sgd():
    coupled = run(jaxreg.regularize(optax.identity(), LR, l2=0.1))
    chex.assert_trees_all_close(coupled, run(jaxreg.regularize(optax.identity(), LR, decay=0.1)))
    coupled = run(jaxreg.regularize(optax.scale_by_adam(), LR, l2=0.1))
    decoupled = run(jaxreg.regularize(optax.scale_by_adam(), LR, decay=0.1))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(coupled, decoupled, rtol=1e-4)


def test_where_chooses_the_leaves():
    tx = jaxreg.weight_decay(0.1, rate=1.0, where="**/bias")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["dense"]["kernel"], jnp.zeros((1, 2)))
    chex.assert_trees_all_close(updates["dense"]["bias"], jnp.array([-0.3, -0.3]))


def test_works_as_a_link_behind_any_optimizer():
    tx = optax.chain(optax.adam(LR), jaxreg.weight_decay(0.1, rate=LR))
    chex.assert_trees_all_close(
        run(tx), run(optax.adamw(LR, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_without_a_rate_outside_of_regularize_it_says_what_is_missing():
    tx = optax.chain(optax.adam(LR), jaxreg.weight_decay(0.1))
    with pytest.raises(ValueError, match="rate: got None outside of jaxreg.regularize"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "make", [lambda **k: jaxreg.weight_decay(0.1, 1.0, **k), lambda **k: jaxreg.l2_decay(0.1, **k)]
)
def test_bad_use_is_refused_with_the_arguments_name(make):
    with pytest.raises(ValueError, match="where: got .*matches no leaf.*dense/kernel"):
        make(where="**/kernal").init(PARAMS)
    tx = make()
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "make", [lambda **k: jaxreg.weight_decay(0.1, 1.0, **k), lambda **k: jaxreg.l2_decay(0.1, **k)]
)
def test_a_selected_leaf_that_is_not_floating_is_refused_at_init(make):
    params = {"kernel": jnp.ones((2, 2)), "count": jnp.arange(3)}
    make().init(params)
    with pytest.raises(ValueError, match="params: got int32 values on the leaf count"):
        make(where=where.everything).init(params)


def test_a_rate_and_a_strength_of_any_dtypes_go_together(strict):
    tx = jaxreg.weight_decay(jnp.float32(0.5), rate=jnp.bfloat16(0.5))
    w = jnp.ones((2, 2), jnp.bfloat16)
    updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    assert updates.tolist() == [[-0.25, -0.25]] * 2


@pytest.mark.parametrize("bad", [-0.1, float("nan"), "0.1"])
def test_bad_strengths_are_refused(bad):
    with pytest.raises(ValueError, match="^strength: got"):
        jaxreg.weight_decay(bad, 1.0)
    with pytest.raises(ValueError, match="^strength: got"):
        jaxreg.l2_decay(bad)
    with pytest.raises(ValueError, match="^rate: got"):
        jaxreg.weight_decay(0.1, bad)
