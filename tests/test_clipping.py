"""Clipping by the global norm, where peers are silently wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg

pytestmark = pytest.mark.core


def clip(max_norm, grads):
    tx = jaxreg.clip_by_global_norm(max_norm)
    return tx.update(grads, tx.init(grads))


def test_a_gradient_inside_the_limit_is_returned_bit_for_bit():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for limit in (5.0, 6.0, jnp.inf):
        clipped, state = clip(limit, grads)
        chex.assert_trees_all_equal(clipped, grads)
        assert state.coefficient == 1


def test_a_gradient_outside_is_scaled_to_the_limit():
    clipped, state = clip(1.0, {"a": jnp.array([3.0]), "b": jnp.array([4.0])})
    chex.assert_trees_all_close(clipped, {"a": jnp.array([0.6]), "b": jnp.array([0.8])})
    assert (float(state.norm), float(state.coefficient)) == (5.0, pytest.approx(0.2))


def test_bf16_gradients_are_clipped_to_the_norm_asked_for():
    grads = [jnp.full((1000,), 0.01, jnp.bfloat16) for _ in range(300)]
    clipped, state = clip(1.0, grads)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in clipped))
    assert abs(norm - 1) < 2.0**-8
    assert abs(float(state.norm) / (0.0100098 * 300_000**0.5) - 1) < 1e-5


@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=["overflow", "underflow"])
def test_squares_out_of_range_do_not_zero_or_blow_up_the_gradient(scale):
    grads = jnp.array([3.0, 4.0]) * scale
    clipped, _ = clip(scale, grads)
    chex.assert_trees_all_close(clipped / scale, jnp.array([0.6, 0.8]), rtol=1e-6)


def test_a_zero_gradient_stays_zero():
    clipped, state = clip(1e-38, jnp.zeros(3))
    chex.assert_trees_all_equal(clipped, jnp.zeros(3))
    assert state.coefficient == 1


def test_non_finite_gradients_propagate_as_documented():
    clipped, _ = clip(1.0, jnp.array([jnp.inf, 1.0]))
    np.testing.assert_array_equal(clipped, [np.nan, 0.0])
    clipped, _ = clip(1.0, jnp.array([jnp.nan, 1.0]))
    np.testing.assert_array_equal(clipped, [np.nan, np.nan])


def test_a_strongly_typed_limit_and_bf16_gradients_go_together():
    clipped, _ = clip(jnp.float32(1.0), jnp.array([3.0, 4.0], jnp.bfloat16))
    assert clipped.dtype == jnp.bfloat16


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "1", jnp.ones(2)])
def test_refuses_a_limit_that_is_not_positive(bad):
    with pytest.raises(ValueError, match=r"^max_norm: got .*; accepted: a number > 0\.$"):
        jaxreg.clip_by_global_norm(bad)


def test_under_jit_the_norm_of_a_sharded_gradient_is_global():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    grads = jax.device_put(jnp.ones((16, 4)), sharding)
    clipped, state = jax.jit(lambda g: clip(1.0, g))(grads)
    assert state.norm == 8.0
    assert clipped.sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_close(clipped, jnp.full((16, 4), 0.125))


def test_the_coefficient_says_what_became_of_a_non_finite_gradient():
    assert clip(1.0, jnp.array([jnp.inf, 1.0]))[1].coefficient == 0
    assert np.isnan(clip(1.0, jnp.array([jnp.nan, 1.0]))[1].coefficient)


def test_a_leaf_that_is_not_a_floating_array_is_refused_at_init():
    for leaf, given in ((jnp.arange(3), "int32 values"), (1.5, "1.5")):
        with pytest.raises(ValueError, match=f"params: got {given} on the leaf w"):
            jaxreg.clip_by_global_norm(1.0).init({"w": leaf})
