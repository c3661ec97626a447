"""Stochastic rounding of 16-bit weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message
from jax.sharding import AxisType
from sharded import check_same_where_sharded

import jaxreg
from jaxreg.transforms import rounding

pytestmark = pytest.mark.core

NARROW = [jnp.bfloat16, jnp.float16]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: jnp.dtype(dtype).name)
RNG = np.random.default_rng(0)


def doubles(x):
    with np.errstate(invalid="ignore"):  # of NaNs
        return np.asarray(x.astype(jnp.float32), np.float64)


def neighbours(x, dtype):
    """The numbers of a dtype next to float32 numbers, from its table of all numbers."""
    table = doubles(jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16).view(dtype))
    table = np.unique(table[np.isfinite(table)])
    above = np.searchsorted(table, x)
    return np.where(table[above] == x, x, table[above - 1]), table[above]


@narrow
def test_the_mean_over_all_random_bits_is_the_number_itself(dtype):
    x = np.float32(RNG.normal(size=12) * 10.0 ** RNG.integers(-4, 4, 12))
    x = np.append(x, np.float32([1.0, -1.5, 0.0, 1.0 + 2**-20]))
    drawn = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)[:, None]
    found = jax.jit(rounding._rounded, static_argnums=2)(jnp.asarray(x)[None], drawn, dtype)
    lower, upper = neighbours(x, dtype)
    found = np.asarray(found, np.float64)
    assert ((found == lower) | (found == upper)).all()
    spacing = upper - lower
    # float16 has 13 bits to drop; all in all no more than float32 itself rounds.
    np.testing.assert_allclose(found.mean(0), x.astype(np.float64), rtol=0, atol=1e-12)
    assert ((found != lower).any(0) == (spacing > 0)).all()


def test_small_numbers_of_float16_have_its_one_spacing():
    x = np.float32([3e-5, -1e-6, 2.0**-25, 2.0**-14 - 2.0**-26, 2.0**-30])
    drawn = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)[:, None]
    found = np.asarray(rounding._rounded(jnp.asarray(x)[None], drawn, jnp.float16), np.float64)
    lower, upper = neighbours(x, jnp.float16)
    assert ((found == lower) | (found == upper)).all()
    # 16 bits: to 2^-14 of the spacing 2^-24.
    np.testing.assert_allclose(found.mean(0), x, rtol=0, atol=2.0**-38)


@narrow
def test_every_number_of_the_dtype_stays(dtype):
    every = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16).view(dtype)
    for drawn in (0, 2**16 - 1):
        bits = jnp.full(every.shape, drawn, jnp.uint16)
        found = rounding._rounded(every.astype(jnp.float32), bits, dtype)
        np.testing.assert_array_equal(found, every.astype(jnp.float32))


@narrow
def test_apply_updates_gives_a_rounded_weight(dtype):
    """Where weights stay within a factor of 2, and where they go to 0, exactly."""
    p = RNG.normal(size=(40, 500)) * np.exp(RNG.uniform(-6, 6, (40, 500)))
    w = jnp.asarray(p, dtype)
    u = doubles(w) * RNG.choice([1e-6, 1e-3, 0.1, 0.4], w.shape) * RNG.choice([-1, 1], w.shape)
    u = jnp.asarray(np.where(RNG.uniform(size=w.shape) < 0.1, -doubles(w), u), jnp.float32)
    target = np.asarray(w.astype(jnp.float32) + u)
    tx = jaxreg.stochastic_rounding(optax.identity(), seed=1)

    @jax.jit
    def step(u, w):
        updates, _ = tx.update(u, tx.init(w), w)
        return updates, optax.apply_updates(w, updates)

    updates, after = step(u, w)
    assert updates.dtype == after.dtype == dtype
    lower, upper = neighbours(target, dtype)
    found = doubles(after)
    assert ((found == lower) | (found == upper)).all()
    assert (found[target == 0] == 0).all()
    # Unbiased: the deviations of all entries, each in its spacing, are independent.
    spacing = np.where(upper > lower, upper - lower, 1)
    share = (target - lower) / spacing
    score = ((found - target) / spacing).sum() / np.sqrt((share * (1 - share)).sum())
    assert abs(score) < 3


def test_decay_that_rounding_to_nearest_loses_is_there_in_expectation():
    adamw, w = optax.adamw(1e-3, weight_decay=1e-2), jnp.ones(2**16, jnp.bfloat16)
    ours = jaxreg.stochastic_rounding(adamw, seed=0)

    def run(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jnp.zeros_like(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), None, length=10)[0][0])()

    assert (run(adamw) == 1).all()
    found, steps = doubles(run(ours)), 10
    expected = (1 - 1e-5) ** steps
    deviation = np.sqrt(steps * 1e-5 * 2.0**-8 / found.size)
    assert abs(found.mean() - expected) < 3 * deviation
    assert (1 - expected) > 30 * deviation


def test_the_optimizer_inside_works_in_float32():
    """Gradients, weights and moments; leaves of 32 bits pass untouched."""
    params = {"half": jnp.asarray(RNG.normal(size=(8, 4)), jnp.bfloat16), "full": jnp.ones((3, 2))}
    grads = jax.tree.map(lambda p: p * 0.3, params)
    adam = optax.adam(0.01)
    tx = jaxreg.stochastic_rounding(adam, seed=0)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    theirs, state = adam.init(wide), tx.init(params)
    wide_grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    for _ in range(3):
        expected, theirs = adam.update(wide_grads, theirs, wide)
        updates, state = tx.update(grads, state, params)
    chex.assert_trees_all_equal(state.inner, theirs)
    chex.assert_trees_all_equal(updates["full"], expected["full"])
    assert updates["half"].dtype == jnp.bfloat16


def test_exact_zeros_of_a_penalty_stay():
    w = jnp.asarray([0.5, 0.01, -0.02, 0.0], jnp.bfloat16)
    tx = jaxreg.stochastic_rounding(jaxreg.prox_sgd(0.1, jaxreg.L1(1.0)), seed=0)
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, updates)
        assert w[1:].tolist() == [0, 0, 0]
    assert 0 < w[0] < 0.5


def test_infinities_and_nans_pass():
    w = jnp.ones(4, jnp.bfloat16)
    tx = jaxreg.stochastic_rounding(optax.sgd(1.0), seed=0)
    grads = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0])
    updates, _ = tx.update(grads, tx.init(w), w)
    after = np.asarray(optax.apply_updates(w, updates), np.float32)
    np.testing.assert_array_equal(after, [-np.inf, np.inf, np.nan, 1])


# The address of the random bits ------------------------------------------------------------------


def rounded(params, seed=0, steps=1, tx=None):
    tx = tx or jaxreg.stochastic_rounding(optax.identity(), seed=seed)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(lambda p: p * 1e-3, params), state, params)
    return updates


def test_the_bits_are_those_of_the_seed_the_step_and_the_path():
    a, b = jnp.ones(64, jnp.bfloat16), jnp.ones(64, jnp.bfloat16)
    both = rounded({"a": a, "b": b})
    chex.assert_trees_all_equal(both["b"], rounded({"b": b, "0": a, "z": jnp.ones(3)})["b"])
    chex.assert_trees_all_equal(both, jax.jit(rounded)({"a": a, "b": b}))
    for other in (rounded({"a": a}, steps=2)["a"], rounded({"a": a}, seed=1)["a"], both["b"]):
        assert (both["a"] != other).any()
    noise = jax.random.key(0)
    chex.assert_trees_all_equal(both, rounded({"a": a, "b": b}, seed=noise))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_weights_are_rounded_alike(kind):
    w = jnp.asarray(RNG.normal(size=(16, 8)), jnp.bfloat16)
    check_same_where_sharded(rounded, w, kind, "u16[16,8]")


# Use ---------------------------------------------------------------------------------------------


def test_trains_in_bf16_under_multi_steps_and_a_scan():
    x = jnp.asarray(RNG.normal(size=(32, 4)), jnp.bfloat16)
    y = jnp.sin(x.sum(1))
    params = {
        "first": jnp.asarray(0.5 * RNG.normal(size=(4, 16)), jnp.bfloat16),
        "last": jnp.asarray(0.3 * RNG.normal(size=(16,)), jnp.bfloat16),
    }

    def loss(params):
        out = jnp.tanh(x @ params["first"]) @ params["last"]
        return jnp.mean((out - y).astype(jnp.float32) ** 2)

    tx = optax.MultiSteps(jaxreg.stochastic_rounding(optax.adam(1e-3), seed=0), 2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=400)

    (after, state), values = train(params)
    assert values[-1] < 0.5 * values[0]
    assert state.inner_opt_state.count == 200
    assert after["first"].dtype == jnp.bfloat16


def test_bad_use_is_refused_with_the_arguments_name():
    with pytest.raises(ValueError, match=r"^inner: got 0\.1; accepted: an optax") as error:
        jaxreg.stochastic_rounding(0.1, seed=0)
    message(error)
    for seed in (-1, 2**32, 0.5, True, "0", jnp.ones(3)):
        with pytest.raises(ValueError, match="^seed: got .*a whole number in") as error:
            jaxreg.stochastic_rounding(optax.sgd(0.1), seed=seed)
        message(error)
    tx = jaxreg.stochastic_rounding(optax.sgd(0.1), seed=0)
    with pytest.raises(ValueError, match="params: got int32 values on the leaf n"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="params: got float8_e4m3fn values on w"):
        tx.init({"w": jnp.ones(3, jnp.float8_e4m3fn)})
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
