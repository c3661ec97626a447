"""Regularized dual averaging: its formulas, its solutions, and a support that stays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg._roots import cube_root

RNG = np.random.default_rng(0)
START = RNG.normal(size=(3, 2))
GRADIENTS = RNG.normal(size=(6, 3, 2))
S = 0.7


def run(tx, gradients=GRADIENTS, start=START):
    w = jnp.asarray(start)
    state = tx.init(w)
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g), state, w)
        w = optax.apply_updates(w, updates)
    return w


def soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def test_rda_is_the_papers_formula(x64):
    t, mean = len(GRADIENTS), GRADIENTS.mean(0)
    expected = soft(START - 0.3 * np.sqrt(t) * mean, 0.3 * np.sqrt(t) * S)
    chex.assert_trees_all_close(run(jaxreg.rda(0.3, jaxreg.L1(S))), expected, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_rmda_is_the_papers_algorithm(momentum, x64):
    schedule = optax.linear_schedule(0.3, 0.1, 5)
    w, v, alpha = START, 0.0, 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        s = float(schedule(jnp.int32(t - 1))) * np.sqrt(t)
        v, alpha = v + s * g, alpha + s
        w = momentum * w + (1 - momentum) * soft(START - v / np.sqrt(t), alpha * S / np.sqrt(t))
    found = run(jaxreg.rmda(schedule, jaxreg.L1(S), momentum))
    chex.assert_trees_all_close(found, w, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_ramda_is_the_papers_algorithm(momentum, x64):
    w, v, u, alpha = START, 0.0, 0.0, 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        s = 0.3 * np.sqrt(t)
        v, u, alpha = v + s * g, u + s * g**2, alpha + s
        scale = np.cbrt(u) + 1e-3
        w = momentum * w + (1 - momentum) * soft(START - v / scale, alpha * S / scale)
    found = run(jaxreg.ramda(0.3, jaxreg.L1(S), momentum, eps=1e-3))
    chex.assert_trees_all_close(found, w, rtol=1e-12)


def test_without_a_penalty_ramda_is_madgrad():
    """The reference values are those of the update that its paper prints, from w = 1 with g = w."""
    tx = jaxreg.ramda(0.1, jaxreg.L1(0.0), momentum=0.9)
    w = jnp.ones(())
    state = tx.init(w[None])
    w, z, nu, s = 1.0, 1.0, 0.0, 0.0
    ours = jnp.ones(1)
    for k in range(5):
        weight = 0.1 * np.sqrt(k + 1)
        s, nu = s + weight * w, nu + weight * w**2
        z = 1.0 - s / (np.cbrt(nu) + 1e-6)
        w = 0.9 * w + 0.1 * z
        updates, state = tx.update(ours, state, ours)
        ours = ours + updates
    chex.assert_trees_all_close(ours, np.full(1, w, np.float32), rtol=1e-5)


def test_the_support_is_stable_under_sampling_noise_where_prox_adams_is_not():
    """A lasso with 3 of 20 coefficients, batches of 8 rows; the last tenth of the run counts."""
    rng = np.random.default_rng(0)
    x, truth = rng.normal(size=(100, 20)), np.zeros(20)
    truth[:3] = 2.0, -1.0, 0.5
    y = x @ truth + 0.1 * rng.normal(size=100)
    strength = 0.1 * np.abs(x.T @ y).max() / 100
    x, y, penalty = jnp.asarray(x), jnp.asarray(y), jaxreg.L1(strength)
    steps = 20_000

    def supports(tx):
        def step(carry, key):
            w, state = carry
            rows = jax.random.randint(key, (8,), 0, 100)
            grad = x[rows].T @ (x[rows] @ w - y[rows]) / 8
            updates, state = tx.update(grad, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w != 0

        w = jnp.zeros(20)
        keys = jax.random.split(jax.random.key(0), steps)
        _, nonzero = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), keys))()
        return np.unique(np.asarray(nonzero[-steps // 10 :]), axis=0)

    right = [truth != 0]
    for tx in (
        jaxreg.rda(0.1, penalty),
        jaxreg.rmda(0.01, penalty),
        jaxreg.ramda(0.005, penalty),
    ):
        chex.assert_trees_all_equal(supports(tx), np.array(right))
    assert (
        len(supports(jaxreg.prox_adam(optax.cosine_decay_schedule(0.01, 2 * steps), penalty))) > 1
    )


def test_the_start_is_a_copy_so_that_params_can_be_donated():
    tx = jaxreg.ramda(0.1, jaxreg.L1(0.1))
    w = jnp.ones(4)
    state = tx.init(w)
    update = jax.jit(lambda w, state: tx.update(w, state, w), donate_argnums=0)
    update(w, state)
    assert not state.start.is_deleted()


def test_what_needs_one_step_for_all_is_for_rda_and_rmda():
    w, penalty = jnp.eye(3), jaxreg.Nuclear(0.5)
    with pytest.raises(ValueError, match=r"penalty: got Nuclear\(0.5\).*rmda takes this one"):
        jaxreg.ramda(0.1, penalty).init(w)
    for make in (jaxreg.rda, jaxreg.rmda):
        tx = make(0.1, penalty)
        updates, _ = tx.update(w, tx.init(w), w)
        chex.assert_trees_all_close(w + updates, 0.85 * jnp.eye(3), rtol=1e-5)


def test_cube_roots_of_the_whole_range():
    z = np.array([0.0, 5e-38, 1e-20, 0.3, 1.0, 8.0, 3.4e38], np.float32)
    np.testing.assert_allclose(cube_root(jnp.asarray(z)), np.cbrt(z), rtol=3e-7)
    largest = np.cbrt(np.finfo(np.float32).max)
    assert float(cube_root(jnp.array(jnp.inf))) == pytest.approx(float(largest), rel=1e-6)
    for z in (1e-20, 1e25):
        slope = float(jax.grad(cube_root)(jnp.float32(z)))
        assert slope == pytest.approx(z ** (-2 / 3) / 3, rel=1e-5)
    assert float(jax.grad(cube_root)(jnp.zeros(()))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxreg.rda(-1.0, jaxreg.L1(0.1)), "learning_rate: got -1.0"),
        (
            lambda: jaxreg.rda(optax.constant_schedule(0.1), jaxreg.L1(0.1)),
            "learning_rate: got a schedule; .* rmda takes a schedule",
        ),
        (
            lambda: jaxreg.ramda(0.1, jaxreg.L1(0.1)).init(jnp.ones(3, jnp.complex64)),
            "params: got complex values",
        ),
        (lambda: jaxreg.rmda(0.1, jaxreg.L1(0.1), momentum=1.0), "momentum: got 1.0"),
        (lambda: jaxreg.ramda(0.1, jaxreg.L1(0.1), eps=0.0), "eps: got 0.0"),
        (lambda: jaxreg.ramda(0.1, 0.1), "penalty: got 0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
