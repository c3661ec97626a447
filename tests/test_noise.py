"""Dropout: its statistics, its keys and its arguments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg

pytestmark = pytest.mark.core
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.0, 1 / 256, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_the_rate_within_four_sigma(rate):
    n = 1_000_000
    y = jaxreg.dropout(KEY, jnp.ones(n), rate)
    sigma = np.sqrt(rate * (1 - rate) / n)
    assert abs(float((y == 0).mean()) - rate) <= 4 * sigma
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1) / np.float32(1 - rate)}


def test_the_mean_is_kept():
    x = jnp.linspace(-1, 2, 1000)
    keys = jax.random.split(KEY, 2000)
    mean = jax.vmap(lambda key: jaxreg.dropout(key, x, 0.3))(keys).mean(0)
    error = jnp.abs(mean - x) / (jnp.abs(x) * np.sqrt(0.3 / 0.7 / 2000) + 1e-9)
    assert float(error.max()) < 5


def test_the_mask_is_a_function_of_the_key():
    x = jnp.ones(100)
    chex.assert_trees_all_equal(jaxreg.dropout(KEY, x, 0.5), jaxreg.dropout(KEY, x, 0.5))
    other = jaxreg.dropout(jax.random.key(1), x, 0.5)
    assert (jaxreg.dropout(KEY, x, 0.5) != other).any()


def test_the_mask_is_the_same_in_every_dtype():
    masks = [jaxreg.dropout(KEY, jnp.ones(100, t), 0.5) == 0 for t in (jnp.float32, jnp.bfloat16)]
    chex.assert_trees_all_equal(*masks)


def test_dropped_entries_are_zero_whatever_they_were():
    x = jnp.array([jnp.nan, jnp.inf] * 50)
    y = jaxreg.dropout(KEY, x, 0.5)
    dropped = jaxreg.dropout(KEY, jnp.ones(100), 0.5) == 0
    chex.assert_trees_all_equal(jnp.where(dropped, y, 0), jnp.zeros(100))


def test_the_gradient_has_the_same_mask():
    x = jnp.linspace(1, 2, 100)
    grad = jax.grad(lambda x: jaxreg.dropout(KEY, x, 0.5).sum())(x)
    chex.assert_trees_all_close(grad, jaxreg.dropout(KEY, jnp.ones(100), 0.5))


def test_a_scheduled_rate_may_be_traced():
    traced = jax.jit(jaxreg.dropout)(KEY, jnp.ones(100), 0.5)
    chex.assert_trees_all_equal(traced, jaxreg.dropout(KEY, jnp.ones(100), 0.5))


@pytest.mark.parametrize("rate", [-0.5, 1.0, 1.5, float("nan"), "0.5"])
def test_a_rate_outside_the_interval_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate: got .*; accepted: a number in \[0, 1\)"):
        jaxreg.dropout(KEY, jnp.ones(3), rate)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="x: got an array.*int32.*real floating"):
        jaxreg.dropout(KEY, jnp.arange(3), 0.5)


@pytest.mark.parametrize("key", [None, 0, jnp.ones(2), jax.random.split(KEY, 2)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="^key: got .*; accepted: one JAX random key"):
        jaxreg.dropout(key, jnp.ones(3), 0.5)


def test_a_raw_key_is_a_key():
    x, raw = jnp.ones(100), jax.random.PRNGKey(0)
    typed = jaxreg.dropout(jax.random.wrap_key_data(raw), x, 0.5)
    chex.assert_trees_all_equal(jaxreg.dropout(raw, x, 0.5), typed)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_traced_rate_may_have_any_real_dtype(dtype):
    x = jnp.arange(3.0)
    chex.assert_trees_all_equal(jax.jit(jaxreg.dropout)(KEY, x, jnp.zeros((), dtype)), x)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.bool_])
def test_a_traced_rate_that_is_not_real_is_refused_by_its_dtype(dtype):
    name = jnp.dtype(dtype).name
    with pytest.raises(ValueError, match=rf"rate: got an array of shape \(\) and dtype {name};"):
        jax.jit(jaxreg.dropout)(KEY, jnp.ones(3), jnp.zeros((), dtype))
