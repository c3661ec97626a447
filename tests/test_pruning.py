"""Pruning by magnitude and in n:m patterns, and penalties that are steered to a share of zeros."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jaxreg

RNG = np.random.default_rng(0)
PARAMS = {
    "large": {"kernel": jnp.asarray(RNG.normal(size=(100, 80)), jnp.float32), "bias": jnp.ones(80)},
    "small": {"kernel": jnp.asarray(3 * RNG.normal(size=(20, 10)), jnp.float32)},
}


def share(*arrays):
    return sum(int((x == 0).sum()) for x in arrays) / sum(x.size for x in arrays)


def descend(tx, params=PARAMS, steps=1, grads=None):
    state = tx.init(params)
    for _ in range(steps):
        updates = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# Magnitude ---------------------------------------------------------------------------------------


def test_global_pruning_keeps_the_largest_of_all():
    after, _ = descend(jaxreg.magnitude_pruning(0.8))
    kernels = [PARAMS[name]["kernel"] for name in ("large", "small")]
    everything = np.sort(np.abs(np.concatenate([k.ravel() for k in kernels])))
    threshold = everything[round(0.8 * everything.size)]
    for name, kernel in zip(("large", "small"), kernels, strict=True):
        expected = np.where(np.abs(kernel) >= threshold, kernel, 0)
        chex.assert_trees_all_equal(after[name]["kernel"], expected)
    chex.assert_trees_all_equal(after["large"]["bias"], PARAMS["large"]["bias"])


def test_pruning_by_layer_gives_each_the_same_share():
    after, _ = descend(jaxreg.magnitude_pruning(0.9, scope="layer"))
    assert share(after["large"]["kernel"]) == pytest.approx(0.9, abs=1e-4)
    assert share(after["small"]["kernel"]) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
def test_erdos_renyi_keeps_in_proportion_to_the_sum_of_the_axes(sparsity):
    after, _ = descend(jaxreg.magnitude_pruning(sparsity, scope="erk"))
    kernels = after["large"]["kernel"], after["small"]["kernel"]
    assert share(*kernels) == pytest.approx(sparsity, abs=2e-4)
    kept = [int((k != 0).sum()) for k in kernels]
    if kept[1] < kernels[1].size:
        assert abs(kept[0] - kept[1] * 180 / 30) <= 6  # one weight of the small one


def test_the_cubic_schedule_of_zhu_and_gupta():
    schedule = optax.polynomial_schedule(0.0, 0.9, 3, transition_steps=10, transition_begin=2)
    tx, params = jaxreg.magnitude_pruning(schedule), PARAMS
    state = tx.init(params)
    for t in range(14):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        progress = np.clip((t - 2) / 10, 0, 1)
        expected = 0.9 * (1 - (1 - progress) ** 3)
        found = share(params["large"]["kernel"], params["small"]["kernel"])
        assert found == pytest.approx(expected, abs=2e-4)


def test_masks_are_chosen_anew_in_every_so_many_steps():
    schedule = optax.linear_schedule(0.0, 0.8, 8)
    tx = jaxreg.magnitude_pruning(schedule, every=4)
    shares, params = [], PARAMS
    state = tx.init(params)
    for _ in range(9):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        shares.append(share(params["large"]["kernel"], params["small"]["kernel"]))
    expected = [0.0] * 4 + [0.4] * 4 + [0.8]
    np.testing.assert_allclose(shares, expected, atol=2e-4)


def test_masks_are_chosen_by_the_weights_before_the_step():
    tx = jaxreg.magnitude_pruning(0.5)
    w = jnp.array([1.0, 2.0, 3.0, 4.0])
    updates, _ = tx.update(jnp.array([10.0, 0.0, 0.0, 0.0]), tx.init(w), w)
    np.testing.assert_array_equal(optax.apply_updates(w, updates), [0.0, 0.0, 3.0, 4.0])


def test_settings_that_are_no_numbers_are_static_under_injection():
    make = optax.inject_hyperparams(
        jaxreg.magnitude_pruning, static_args=("scope", "every", "where")
    )
    after, _ = descend(make(sparsity=0.8, scope="layer", every=2))
    assert share(after["small"]["kernel"]) == pytest.approx(0.8, abs=1e-4)


def test_what_was_pruned_stays_zero_whatever_its_gradient():
    tx = optax.chain(optax.adam(0.1), jaxreg.magnitude_pruning(0.5))
    first, state = descend(tx)
    grads = jax.tree.map(lambda p: jnp.where(p == 0, 100.0, 1.0), first)
    params = first
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name in ("large", "small"):
        chex.assert_trees_all_equal(params[name]["kernel"] == 0, first[name]["kernel"] == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_equal_weights_are_pruned_to_the_number(dtype, scope):
    """In 16 bits many weights are equal; the first of them are kept."""
    params = {"a": {"kernel": jnp.ones((10, 10), dtype)}, "b": {"kernel": jnp.ones((5, 8), dtype)}}
    after, _ = descend(jaxreg.magnitude_pruning(0.75, scope=scope), params)
    kernels = after["a"]["kernel"], after["b"]["kernel"]
    assert share(*kernels) == 0.75
    assert kernels[0].dtype == dtype


def test_a_kept_weight_that_passes_through_zero_is_not_taken_for_a_pruned_one():
    tx = jaxreg.magnitude_pruning(0.5)
    w = jnp.array([1.0, 2.0, 3.0, 4.0])
    state = tx.init(w)
    updates, state = tx.update(jnp.zeros(4), state, w)
    w = optax.apply_updates(w, updates)
    updates, state = tx.update(jnp.array([0.0, 0.0, -3.0, 0.0]), state, w)
    assert state.masks[0].tolist() == [False, False, True, True]


def test_updates_that_are_narrower_than_the_weights_prune_to_exact_zeros():
    w = jnp.array([0.1234567, 2.0, 3.0, 0.2345678])
    tx = jaxreg.magnitude_pruning(0.5)
    updates, _ = tx.update(jnp.zeros(4, jnp.bfloat16), tx.init(w), w)
    assert optax.apply_updates(w, updates).tolist() == [0.0, 2.0, 3.0, 0.0]


def test_without_sparsity_nothing_is_pruned_whatever_its_rank():
    params = {"scalar": jnp.array(1.0), "kernel": jnp.ones((3, 2))}
    tx = jaxreg.magnitude_pruning(0.0, scope="erk", where="*")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


# n:m ---------------------------------------------------------------------------------------------


def test_a_ramp_goes_from_dense_to_n_of_m():
    tx = jaxreg.n_m_pruning(optax.linear_schedule(4, 2, 4), 4)
    counts, params = [], PARAMS
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        blocks = np.asarray(params["large"]["kernel"]).reshape(25, 4, 80)
        counts.append(set(np.unique((blocks != 0).sum(1)).tolist()))
    assert counts == [{4}, {4}, {3}, {3}, {2}, {2}]
    expected = jaxreg.NM(2, 4).prox(PARAMS["large"]["kernel"])
    chex.assert_trees_all_equal(params["large"]["kernel"], expected)


# A target ----------------------------------------------------------------------------------------


def digits_loss():
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)

    def logits(params, x):
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
        return hidden @ params["second"]["kernel"] + params["second"]["bias"]

    def loss(params, rows):
        found = logits(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(found, y[rows]).mean()

    def accuracy(params):
        return float((logits(params, x[1400:]).argmax(1) == y[1400:]).mean())

    return loss, accuracy


def network(key):
    first, second = jax.random.split(key)
    return {
        "first": {"kernel": jax.random.normal(first, (64, 128)) / 8, "bias": jnp.zeros(128)},
        "second": {"kernel": jax.random.normal(second, (128, 10)) / 11, "bias": jnp.zeros(10)},
    }


def train(tx, loss, steps, batch=64):
    """The share of zeros in the kernels after each step, and the parameters in the end."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, 1400)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        params = optax.apply_updates(params, updates)
        kernels = [params[name]["kernel"] for name in ("first", "second")]
        zeros = sum(jnp.sum(k == 0) for k in kernels) / sum(k.size for k in kernels)
        return (params, state), zeros

    params = network(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), zeros = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys))(params)
    return params, state, np.asarray(zeros)


@pytest.mark.thorough
@pytest.mark.parametrize("target", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(
    "make",
    [
        lambda penalty, steps: jaxreg.prox_adam(1e-3, penalty),
        lambda penalty, steps: jaxreg.prox_adam(optax.cosine_decay_schedule(1e-3, steps), penalty),
        lambda penalty, steps: jaxreg.prox_sgd(0.05, penalty, momentum=0.9),
    ],
    ids=["adam", "adam with a schedule", "momentum"],
)
def test_a_target_is_reached_and_held_on_digits(target, make):
    loss, accuracy = digits_loss()
    steps = 3000
    penalty = jaxreg.sparsity_target(jaxreg.L1(1e-5), target)
    params, _, zeros = train(make(penalty, steps), loss, steps)
    assert np.abs(zeros[-steps // 10 :] - target).max() <= 0.01
    assert accuracy(params) > 0.84


@pytest.mark.parametrize("strength", [1e-8, 1e-3, 1.0])
def test_the_strength_that_it_begins_with_does_not_matter_for_the_target(strength):
    loss, _ = digits_loss()
    penalty = jaxreg.sparsity_target(jaxreg.L1(strength), 0.8)
    _, state, zeros = train(jaxreg.prox_adam(1e-3, penalty), loss, 1500)
    assert np.abs(zeros[-150:] - 0.8).max() <= 0.01
    assert float(state.penalties[0].sparsity) == pytest.approx(float(zeros[-1]), abs=1e-6)


def test_whole_groups_can_be_the_target():
    loss, _ = digits_loss()
    group = jaxreg.GroupLasso(1e-4).on("first/kernel")
    tx = jaxreg.prox_adam(1e-3, jaxreg.sparsity_target(group, 0.5))
    params, _, _ = train(tx, loss, 2000)
    kernel = np.asarray(params["first"]["kernel"])
    assert abs((kernel == 0).mean() - 0.5) <= 0.01
    # Weights of black pixels, which see no gradient, fade away in the units that stay.
    assert abs((kernel == 0).all(0).mean() - 0.5) <= 0.02


def test_a_target_may_be_a_schedule():
    loss, _ = digits_loss()
    target = optax.linear_schedule(0.5, 0.9, 1000, 500)
    penalty = jaxreg.sparsity_target(jaxreg.L1(1e-4), target, rate=0.2)
    _, _, zeros = train(jaxreg.prox_adam(1e-3, penalty), loss, 2000)
    for t in (500, 1000, 1400, 1999):
        assert zeros[t] == pytest.approx(float(target(t)), abs=0.01)


def steered(target, steps=200, rate=0.5, learning_rate=0.5, extra=()):
    """From w = a down |w - a|^2 / 2, for four weights."""
    a = jnp.array([0.1, 0.2, 1.0, 2.0])
    penalty = jaxreg.sparsity_target(jaxreg.L1(0.01), target, rate=rate)
    tx = jaxreg.prox_sgd(learning_rate, [penalty, *extra])
    w, state, multipliers = a, tx.init(a), []
    update = jax.jit(lambda w, state: tx.update(w - a, state, w))
    for _ in range(steps):
        updates, state = update(w, state)
        w = optax.apply_updates(w, updates)
        multipliers.append(float(state.penalties[0].multiplier))
    return w, np.array(multipliers)


def test_on_target_the_strength_stays():
    """Any strength from 0.2 to 1 gives this share: the first one that did is kept."""
    w, multipliers = steered(0.5)
    assert (w == 0).tolist() == [True, True, False, False]
    assert np.ptp(multipliers[-100:]) == 0
    assert multipliers[-1] < 60


def test_a_target_of_zero_changes_nothing():
    w, multipliers = steered(0.0)
    assert np.ptp(multipliers) == 0
    assert (w != 0).all()


def test_a_share_that_can_not_be_had_becomes_the_nearest_one():
    w, _ = steered(0.55)
    assert (w == 0).tolist() == [True, True, False, False]


def test_a_step_of_zero_leaves_the_strength_in_range():
    rising = optax.linear_schedule(0.25, 0.75, 100, 50)
    rate = lambda count: jnp.where(count < 50, 0.5, 0.0)  # noqa: E731
    _, multipliers = steered(rising, learning_rate=rate)
    assert np.isfinite(multipliers).all()
    assert multipliers[-1] == multipliers[60]


def test_the_share_counts_what_other_penalties_do():
    a = jnp.array([-1.0, 0.1, 1.0, 2.0])
    target = jaxreg.sparsity_target(jaxreg.L1(0.01), 0.5, rate=0.5)
    tx = jaxreg.prox_sgd(0.5, [target, jaxreg.NonNegative()])
    w, state = a, tx.init(a)
    for _ in range(100):
        updates, state = tx.update(w - a, state, w)
        w = optax.apply_updates(w, updates)
    assert (w == 0).tolist() == [True, True, False, False]
    assert float(state.penalties[0].sparsity) == 0.5


def test_a_penalty_may_be_a_function_of_the_step_count():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    tx = jaxreg.prox_sgd(1.0, lambda count: jaxreg.L1(schedule(count)))
    w, seen = jnp.array([3.0]), []
    state = tx.init(w)
    for _ in range(4):
        updates, state = tx.update(jnp.zeros(1), state, w)
        w = optax.apply_updates(w, updates)
        seen.append(float(w[0]))
    np.testing.assert_allclose(seen, [3.0, 2.75, 2.25, 1.5], rtol=1e-6)


# Averages ----------------------------------------------------------------------------------------


def test_reapply_brings_back_zeros_and_constraints_after_an_average():
    penalties = [jaxreg.L1(0.5).on("a"), jaxreg.UnitNorm(groups=0).on("b")]
    average = {"a": jnp.array([1e-3, -2.0]), "b": jnp.array([0.3, 0.4]), "c": jnp.ones(2)}
    after = jaxreg.reapply(penalties, average, step=0.1)
    chex.assert_trees_all_close(after["a"], jnp.array([0.0, -1.95]), rtol=1e-6)
    chex.assert_trees_all_close(after["b"], jnp.array([0.6, 0.8]), rtol=1e-6)
    chex.assert_trees_all_equal(after["c"], average["c"])


# Bad arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxreg.magnitude_pruning(1.0), r"sparsity: got 1.0; accepted: a number in \[0, 1"),
        (lambda: jaxreg.magnitude_pruning(0.5, scope="gobal"), "scope: got 'gobal'.*'global'"),
        (lambda: jaxreg.magnitude_pruning(0.5, every=0), "every: got 0"),
        (lambda: jaxreg.n_m_pruning(5, 4), "n: got 5; accepted: a whole number <= m = 4"),
        (
            lambda: jaxreg.n_m_pruning(2, 3).init(PARAMS),
            "m: got 3 on large/kernel; accepted: a divisor of 100",
        ),
        (
            lambda: jaxreg.prox_sgd(
                0.1, [jaxreg.sparsity_target(jaxreg.L1(0.1), t) for t in (0.5, 0.8)]
            ).init(PARAMS),
            "penalty: got two sparsity_targets on large/kernel",
        ),
        (lambda: jaxreg.sparsity_target(jaxreg.L1(0.1), 1.0), "target: got 1.0"),
        (lambda: jaxreg.sparsity_target(jaxreg.L1(0.1), -0.1), "target: got -0.1"),
        (lambda: jaxreg.sparsity_target(jaxreg.L1(0.1), 0.5, rate=0), "rate: got 0"),
        (lambda: jaxreg.sparsity_target(jaxreg.L2(0.1), 0.5), r"penalty: got L2\(0.1\)"),
        (lambda: jaxreg.sparsity_target(jaxreg.TopK(3), 0.5), r"penalty: got TopK\(3\)"),
        (lambda: jaxreg.sparsity_target(jaxreg.L1(0), 0.5), r"penalty: got L1\(0.0\).* is not 0"),
        (lambda: jaxreg.sparsity_target(jaxreg.ElasticNet(0, 0.1), 0.5), "strength is not 0"),
        (lambda: jaxreg.sparsity_target(jaxreg.MCP(0.0), 0.5), "strength is not 0"),
        (lambda: jaxreg.reapply("l1", PARAMS), "penalty: got 'l1'; accepted: a jaxreg penalty"),
        (
            lambda: jaxreg.prox_sgd(0.1, lambda count: 3).init(PARAMS),
            "penalty: got a function that gives 3",
        ),
        (
            lambda: jaxreg.L1(optax.constant_schedule(0.1)),
            "strength: got a function; .*lambda count",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pruning_needs_params():
    tx = jaxreg.magnitude_pruning(0.5)
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(PARAMS, tx.init(PARAMS))
