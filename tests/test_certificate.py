"""The certificate: how far from stationary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import where

PARAMS = {"layer": {"kernel": jnp.array([[0.0, 2.0], [1.0, 0.0]]), "bias": jnp.array([1.0, 1.0])}}
GRADS = {"layer": {"kernel": jnp.array([[4.0, -1.0], [2.0, 0.5]]), "bias": jnp.array([0.0, 4.0])}}


def test_each_leaf_counts_by_its_own_penalty():
    found = jaxreg.certificate(PARAMS, GRADS, jaxreg.L1(1.0))
    kernel = np.sqrt(3.0**2 + 0 + 3.0**2 + 0)
    np.testing.assert_allclose(found.leaves["layer"]["kernel"], kernel, rtol=1e-6)
    assert found.leaves["layer"]["bias"] == 4.0
    np.testing.assert_allclose(found.total, np.hypot(kernel, 4.0), rtol=1e-6)


def test_only_the_leaves_asked_for_are_looked_at():
    found = jaxreg.certificate(PARAMS, GRADS, jaxreg.L1(1.0), where="**/bias")
    assert found.leaves["layer"]["kernel"] is None
    assert found.total == found.leaves["layer"]["bias"] == 4.0
    assert jaxreg.certificate(PARAMS, GRADS, jaxreg.L1(1.0), where.kernels).total < 4.5


def test_a_penalty_without_a_direct_form_counts_by_its_residual():
    penalty = jaxreg.SortedL1(0.5)
    found = jaxreg.certificate(PARAMS, GRADS, penalty, where.kernels, step=0.3)
    residual = penalty.residual(PARAMS["layer"]["kernel"], GRADS["layer"]["kernel"], 0.3)
    np.testing.assert_allclose(found.total, jnp.linalg.norm(residual), rtol=1e-6)


def test_a_joint_penalty_counts_over_its_leaves():
    joint = jaxreg.Joint(jaxreg.GroupLasso(1.0), {"kernel": 0, "bias": ()})
    found = jaxreg.certificate(PARAMS, GRADS, joint)
    distance = joint.subdiff_distance(PARAMS["layer"], GRADS["layer"])
    np.testing.assert_allclose(found.leaves["layer"]["bias"], jnp.linalg.norm(distance["bias"]))
    np.testing.assert_allclose(found.total, jaxreg.global_norm(distance), rtol=1e-6)


def test_it_falls_to_zero_as_an_optimizer_ends(x64):
    x = jax.random.normal(jax.random.key(0), (60, 8), jnp.float64)
    y = x[:, 0] - 2 * x[:, 1]

    def loss(params):
        return jnp.mean((x @ params["kernel"] - y) ** 2) / 2

    penalty = jaxreg.L1(0.1)
    tx = jaxreg.prox_sgd(0.3, penalty)
    params = {"kernel": jnp.zeros(8)}
    state = tx.init(params)
    before = jaxreg.certificate(params, jax.grad(loss)(params), penalty)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(400):
        params, state = step(params, state)
    after = jax.jit(lambda p: jaxreg.certificate(p, jax.grad(loss)(p), penalty))(params)
    assert before.total > 0.5
    assert after.total < 1e-12
    assert after.total.dtype == jnp.float64


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="^grads: got a tree of structure"):
        jaxreg.certificate(PARAMS, {"layer": {}}, jaxreg.L1(1.0))
    with pytest.raises(ValueError, match="^penalty: got 0.1; accepted: a jaxreg penalty"):
        jaxreg.certificate(PARAMS, GRADS, 0.1)
    with pytest.raises(ValueError, match="^where: got where.path"):
        jaxreg.certificate(PARAMS, GRADS, jaxreg.L1(1.0), "**/nothing")
