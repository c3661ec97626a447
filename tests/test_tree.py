"""The global norm, in every precision and at both ends of the range."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxreg

pytestmark = pytest.mark.core


def test_accumulates_bf16_leaves_in_float32():
    leaves = [jnp.full((1000,), 0.01, jnp.bfloat16) for _ in range(100)]
    exact = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in leaves))
    assert abs(float(jaxreg.global_norm(leaves)) / exact - 1) < 1e-5


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([300.0, 300.0], jnp.float16, 300 * np.sqrt(2)),
        ([3e20, 4e20], jnp.float32, 5e20),
        ([3e-30, 4e-30], jnp.float32, 5e-30),
        ([3e38], jnp.float32, 3e38),
        ([0.0, 0.0], jnp.float32, 0.0),
        ([1.0, 1e-30], jnp.float32, 1.0),
        ([np.inf, 1.0], jnp.float32, np.inf),
        ([-np.inf, 1.0], jnp.float32, np.inf),
        ([np.nan, 1.0], jnp.float32, np.nan),
        ([np.nan, np.inf], jnp.float32, np.nan),
        ([np.nan, 3e20], jnp.float32, np.nan),
    ],
)
def test_is_right_at_both_ends_of_the_range(values, dtype, expected):
    np.testing.assert_allclose(jaxreg.global_norm(jnp.array(values, dtype)), expected, rtol=1e-6)


# From 1e-37 on, entries are among denormal numbers, which some machines take for 0.
@given(exponent=st.integers(-33, 36), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_scales_with_its_argument(exponent, seed):
    x = np.random.default_rng(seed).normal(size=17).astype(np.float32)
    scaled = (x.astype(np.float64) * 10.0**exponent).astype(np.float32)
    exact = np.linalg.norm(scaled.astype(np.float64))
    np.testing.assert_allclose(jaxreg.global_norm(scaled), exact, rtol=1e-6)


def test_complex_entries_count_by_their_modulus():
    assert float(jaxreg.global_norm({"z": jnp.array([3 + 4j])})) == 5.0


def test_trees_without_entries_have_norm_zero():
    for tree in ({}, None, [jnp.zeros((0, 3))], optax.MaskedNode()):
        assert float(jaxreg.global_norm(tree)) == 0.0


def test_gradient_is_the_unit_vector_and_zero_at_zero():
    grad = jax.grad(jaxreg.global_norm)
    chex.assert_trees_all_close(grad(jnp.array([3.0, 4.0])), jnp.array([0.6, 0.8]))
    chex.assert_trees_all_equal(grad(jnp.zeros(2)), jnp.zeros(2))
    chex.assert_trees_all_close(grad(jnp.array([3e-30, 4e-30])), jnp.array([0.6, 0.8]))


def test_float64_is_kept(x64):
    norm = jaxreg.global_norm({"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.float32)})
    assert norm.dtype == jnp.float64
    assert float(norm) == 2.0


@pytest.mark.parametrize("bad", [np.arange(3), np.array([True])])
def test_a_leaf_that_is_not_floating_is_named(bad):
    with pytest.raises(
        ValueError, match=f"tree: got {jnp.asarray(bad).dtype} values on the leaf a/0"
    ):
        jaxreg.global_norm({"a": [bad]})
