"""Penalties of a model's derivatives, kernels and activations, and values of penalties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxreg

few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 is the same for all
)
NAN = np.nan
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def mlp(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


PARAMS = {"first": normal(0, 3, 5), "second": normal(1, 5, 4)}


# Jacobians ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_the_jacobian_of_a_linear_map_with_orthogonal_rows_is_exact(dtype, x64):
    # J^T v has squares of v alone, all 1: no sign matters. Powers of 2, exact in every dtype.
    kernel = jnp.asarray([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype)
    inputs = jnp.asarray(normal(0, 4, 3), dtype)
    for samples in (1, 3):
        found = jaxreg.jacobian_penalty(lambda x: x @ kernel, inputs, KEY, samples=samples)
        assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
        np.testing.assert_allclose(found, [20.0] * 4, rtol=1e-6)
    total = jaxreg.jacobian_penalty(lambda x: x @ kernel, inputs, KEY, reduction="sum")
    mean = jaxreg.jacobian_penalty(lambda x: x @ kernel, inputs, KEY, reduction="mean")
    np.testing.assert_allclose([total, mean], [80.0, 20.0], rtol=1e-6)


def test_the_mean_over_keys_is_the_norm_of_the_jacobian(x64):
    inputs, function = normal(2, 2, 3), lambda x: mlp(PARAMS, x)
    jacobians = jax.vmap(jax.jacobian(function))(inputs)
    expected = np.square(jacobians).sum((1, 2))

    @jax.jit
    def estimates(key):
        return jaxreg.jacobian_penalty(function, inputs, key)

    keys = jax.random.split(jax.random.key(7), 40_000)
    found = np.asarray(jax.vmap(estimates)(keys))
    error = found.std(0, ddof=1) / np.sqrt(len(keys))
    assert np.all(error < 0.006 * expected)
    assert np.all(np.abs(found.mean(0) - expected) < 4 * error)
    samples = jaxreg.jacobian_penalty(function, inputs, jax.random.key(8), samples=len(keys))
    assert np.all(np.abs(samples - expected) < 4 * error)
    assert not np.array_equal(estimates(keys[0]), estimates(keys[1]))


def test_the_jacobian_penalty_is_differentiable_in_parameters(x64):
    """The Jacobian of w sin(x) is diagonal, and the estimate exact."""
    w, x = normal(0, 3), normal(1, 4, 3)

    def penalty(w):
        return jaxreg.jacobian_penalty(lambda x: w * jnp.sin(x), x, KEY, reduction="sum")

    squares = np.square(np.cos(x)).sum(0)
    np.testing.assert_allclose(penalty(w), (w**2 * squares).sum(), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(penalty)(w), 2 * w * squares, rtol=1e-13)
    np.testing.assert_allclose(jax.hessian(penalty)(w), np.diag(2 * squares), atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_examples_have_no_penalty(reduction):
    for found in (
        jaxreg.jacobian_penalty(rows, X[:0], KEY, reduction=reduction),
        jaxreg.gradient_penalty(rows, X[:0], 1.0, reduction=reduction),
    ):
        np.testing.assert_array_equal(found, np.zeros((0,) if reduction == "none" else ()))


# Gradients ----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 99),
    rows=st.integers(0, 3),
    dtype=st.sampled_from([np.float64, np.float32, np.float16]),
    target=st.sampled_from([0.0, 1.0]),
    column=st.booleans(),
)
@few
def test_the_gradient_penalty_agrees_with_the_formula(seed, rows, dtype, target, column, x64):
    inputs = jnp.asarray(normal(seed, rows, 2, 2), dtype)

    def function(x):
        return jnp.sum(jnp.square(x) / 2, (1, 2)).reshape((-1, 1) if column else -1)

    x = np.asarray(inputs).astype(np.float64)
    expected = (np.sqrt((x**2).sum((1, 2))) - target) ** 2  # the gradient is x
    wide = np.float64 if dtype == np.float64 else np.float32
    mean = expected.mean() if rows else 0.0
    for reduction, wanted in (("none", expected), ("mean", mean), ("sum", expected.sum())):
        found = jaxreg.gradient_penalty(function, inputs, target, reduction=reduction)
        assert found.dtype == wide
        # A square root and a square of numbers up to 5, summed over 3 rows.
        np.testing.assert_allclose(found, wanted, atol=3 * 8 * 25 * np.finfo(wide).eps)


def test_derivatives_of_the_gradient_penalty_are_right(x64):
    w, x = normal(0, 3), normal(1, 4, 3)

    def penalty(w, target):
        return jaxreg.gradient_penalty(lambda x: x @ w, x, target, reduction="mean")

    norm = np.linalg.norm(w)
    by_w, by_target = jax.grad(penalty, (0, 1))(w, 0.5)
    np.testing.assert_allclose(by_w, 2 * (norm - 0.5) * w / norm, rtol=1e-13)
    np.testing.assert_allclose(by_target, -2 * (norm - 0.5), rtol=1e-13)
    unit = w / norm
    expected = 2 * np.outer(unit, unit) + 2 * (1 - 0.5 / norm) * (np.eye(3) - np.outer(unit, unit))
    np.testing.assert_allclose(jax.hessian(penalty)(w, 0.5), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_where_the_gradient_is_0_so_is_the_derivative(target):
    def penalty(w):
        return jaxreg.gradient_penalty(lambda x: x @ w, jnp.ones((2, 3)), target, reduction="sum")

    value, derivative = jax.value_and_grad(penalty)(jnp.zeros(3))
    assert value == 2 * target**2
    np.testing.assert_array_equal(derivative, jnp.zeros(3))
    chex.assert_tree_all_finite(jax.hessian(penalty)(jnp.zeros(3)))


# Kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 2, 2, 3), (2, 1, 1, 6), (0, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_orthogonality_of_kernels_agrees_with_the_formula(shape, dtype, x64):
    kernel = jnp.asarray(normal(0, *shape), dtype)
    w = np.asarray(kernel).astype(np.float64).reshape(int(np.prod(shape[:-1])), shape[-1])
    w = w if w.shape[0] >= w.shape[1] else w.T
    off = w.T @ w - np.eye(w.shape[1])
    value, gradient = jax.value_and_grad(jaxreg.orthogonality_penalty)({"kernel": kernel})
    wide = np.float64 if dtype == np.float64 else np.float32
    assert (value.dtype, gradient["kernel"].dtype) == (wide, dtype)
    # Sums of at most 8 products, and a square.
    np.testing.assert_allclose(value, (off**2).sum(), rtol=16 * np.finfo(wide).eps)
    slope = 4 * w @ off if shape[-1] == w.shape[1] else (4 * w @ off).T
    found = np.asarray(gradient["kernel"]).astype(np.float64).ravel()
    largest = np.abs(slope).max(initial=0)
    tolerance = float(jnp.finfo(dtype).eps) / 2 + 16 * np.finfo(wide).eps
    np.testing.assert_allclose(found, slope.ravel(), atol=tolerance * largest)


def test_orthogonality_adds_up_over_the_kernels_of_a_tree(x64):
    a, b = normal(0, 3, 3), normal(1, 4, 2)
    params = {
        "a": {"kernel": a, "bias": np.ones(3)},
        "b": {"kernel": b.astype(np.float32), "steps": np.array(3)},
        "none": None,
    }
    parts = [jaxreg.orthogonality_penalty(w) for w in (a, b.astype(np.float32))]
    np.testing.assert_allclose(jaxreg.orthogonality_penalty(params), sum(parts), rtol=1e-6)
    alone = jaxreg.orthogonality_penalty(params, where="a/kernel")
    np.testing.assert_allclose(alone, parts[0], rtol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 2, 3)])
def test_orthonormal_kernels_cost_nothing_and_have_no_gradient(shape, x64):
    w = jaxreg.Orthogonal().prox(jnp.asarray(normal(0, *shape)).reshape(-1, shape[-1]))
    value, gradient = jax.value_and_grad(jaxreg.orthogonality_penalty)(w.reshape(shape))
    np.testing.assert_allclose(value, 0, atol=1e-26)
    np.testing.assert_allclose(gradient, jnp.zeros(shape), atol=1e-13)


# Values of penalties ------------------------------------------------------------------------------

TREE = {
    "a": {"kernel": normal(0, 3, 2).astype(np.float32), "bias": normal(1, 2).astype(np.float32)},
    "b": {"kernel": normal(2, 2, 4).astype(np.float32)},
}
KERNELS = (TREE["a"]["kernel"], TREE["b"]["kernel"])


def test_the_value_of_a_penalty_is_the_sum_over_its_leaves():
    l1 = sum(np.abs(w).sum(dtype=np.float64) for w in KERNELS)
    squares = sum(np.square(w).sum(dtype=np.float64) for w in KERNELS)
    value = jaxreg.penalty_value
    np.testing.assert_allclose(value(jaxreg.L1(0.1), TREE), 0.1 * l1, rtol=1e-6)
    both = [jaxreg.L1(0.1), jaxreg.L2(0.3)]
    np.testing.assert_allclose(value(both, TREE), 0.1 * l1 + 0.15 * squares, rtol=1e-6)
    # No closed-form prox of the sum; its value there is.
    pair = [jaxreg.L1(0.1), jaxreg.MCP(0.2), jaxreg.GroupLasso(0.1).on("a/kernel")]
    parts = sum(value(part, TREE) for part in pair)
    np.testing.assert_allclose(value(pair, TREE), parts, rtol=1e-6)
    bias = 0.1 * np.abs(TREE["a"]["bias"]).sum()
    np.testing.assert_allclose(value(jaxreg.L1(0.1), TREE, where="a/bias"), bias, rtol=1e-6)
    own = jaxreg.L1(0.1).on("a/bias")
    np.testing.assert_allclose(value(own, TREE), bias, rtol=1e-6)
    everywhere = value([own, jaxreg.L1(0.1)], TREE, where=jaxreg.where.everything)
    np.testing.assert_allclose(everywhere, 2 * (0.1 * l1 + bias), rtol=1e-6)
    assert value([], TREE) == 0


def test_the_gradient_of_an_l2_value_is_l2_decay():
    gradient = jax.grad(lambda p: jaxreg.penalty_value(jaxreg.L2(0.3), p))(TREE)
    tx = jaxreg.l2_decay(0.3)
    updates, _ = tx.update(optax.tree.zeros_like(TREE), tx.init(TREE), TREE)
    chex.assert_trees_all_close(gradient, updates, rtol=1e-6)


def test_the_gradient_by_the_strength_is_the_value_for_strength_1():
    slope = jax.grad(lambda s: jaxreg.penalty_value(jaxreg.L1(s), TREE))(0.7)
    np.testing.assert_allclose(slope, jaxreg.penalty_value(jaxreg.L1(1.0), TREE), rtol=1e-6)


def test_the_value_of_a_joint_penalty_and_of_a_constraint():
    joint = jaxreg.Joint(jaxreg.GroupLasso(0.5), {"kernel": 0, "bias": ()}).on("a/*")
    kernel, bias = TREE["a"]["kernel"], TREE["a"]["bias"]
    unit = jaxreg.Joint(jaxreg.GroupLasso(0.5), {"kernel": 0, "bias": ()})
    expected = unit.value({"kernel": kernel, "bias": bias})
    np.testing.assert_allclose(jaxreg.penalty_value(joint, TREE), expected, rtol=1e-6)
    sizes = jnp.abs(jnp.concatenate([w.ravel() for w in KERNELS])).max()
    box = lambda bound: jaxreg.penalty_value(jaxreg.LInfBall(bound), TREE)  # noqa: E731
    assert box(sizes * 1.01) == 0
    assert box(sizes * 0.99) == np.inf
    assert jaxreg.penalty_value([jaxreg.LInfBall(sizes * 0.99), jaxreg.L1(1.0)], TREE) == np.inf


def test_values_are_wide_and_leaves_without_a_penalty_may_hold_anything(x64):
    kernel = jnp.full((100, 10), 0.1, jnp.bfloat16)
    params = {"kernel": kernel, "steps": jnp.array(3), "key": KEY, "bias": jnp.ones(2, complex)}
    found = jax.jit(lambda p: jaxreg.penalty_value(jaxreg.L1(1.0), p))(params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1000 * float(kernel[0, 0]), rtol=1e-6)
    wide = {"kernel": kernel, "b": {"kernel": np.full((2, 2), 0.1)}}
    assert jaxreg.penalty_value(jaxreg.L1(1.0), wide).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_the_activity_penalty_is_that_of_each_example(dtype, x64):
    activations = jnp.asarray(normal(0, 4, 3, 2), dtype)
    a = np.asarray(activations).astype(np.float64)
    found = jaxreg.activity_penalty(activations, jaxreg.ElasticNet(0.5, 2 * 0.25))
    wide = np.float64 if dtype == np.float64 else np.float32
    assert found.dtype == wide
    expected = 0.5 * np.abs(a).sum((1, 2)) + 0.25 * (a**2).sum((1, 2))
    np.testing.assert_allclose(found, expected, rtol=8 * np.finfo(wide).eps)
    groups = jaxreg.activity_penalty(activations, jaxreg.GroupLasso(0.5))
    looped = [jaxreg.GroupLasso(0.5).value(x) for x in activations]
    np.testing.assert_allclose(groups, looped, rtol=8 * np.finfo(wide).eps)
    gradient = jax.grad(lambda x: jaxreg.activity_penalty(x, jaxreg.L1(0.5)).sum())(activations)
    np.testing.assert_array_equal(np.asarray(gradient).astype(float), 0.5 * np.sign(a))
    for reduction, numpy in (("mean", np.mean), ("sum", np.sum)):
        reduced = jaxreg.activity_penalty(activations, jaxreg.L1(0.5), reduction=reduction)
        total = numpy(0.5 * np.abs(a).sum((1, 2)))
        np.testing.assert_allclose(reduced, total, rtol=8 * np.finfo(wide).eps)
    assert jaxreg.activity_penalty(activations[:0], jaxreg.L1(0.5)).shape == (0,)
    assert jaxreg.activity_penalty(activations[:, 0, 0], jaxreg.L1(0.5)).shape == (4,)


# Bad input ----------------------------------------------------------------------------------------

X = jnp.ones((2, 3))
JACOBIAN, GRADIENT = jaxreg.jacobian_penalty, jaxreg.gradient_penalty


def rows(x):
    return jnp.sum(x, -1)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: JACOBIAN(rows, X.astype(int), KEY), "inputs"),
        (lambda: JACOBIAN(rows, jnp.ones(()), KEY), "inputs"),
        (lambda: JACOBIAN(rows, X, KEY, samples=0), "samples"),
        (lambda: JACOBIAN(rows, X, KEY, samples=1.5), "samples"),
        (lambda: JACOBIAN(rows, X, KEY, reduction="average"), "reduction"),
        (lambda: JACOBIAN(jnp.sum, X, KEY), "function"),
        (lambda: JACOBIAN(jnp.transpose, X, KEY), "function"),
        (lambda: JACOBIAN(lambda x: (x, x), X, KEY), "function"),
        (lambda: JACOBIAN(lambda x: jnp.argmax(x, -1), X, KEY), "function"),
        (lambda: JACOBIAN(3, X, KEY), "function"),
        (lambda: JACOBIAN(X, rows, KEY), "inputs"),
        (lambda: JACOBIAN(rows, X, 0), "key"),
        (lambda: JACOBIAN(rows, X, None), "key"),
        (lambda: GRADIENT(rows, X.astype(int)), "inputs"),
        (lambda: GRADIENT(rows, X, -1.0), "target"),
        (lambda: GRADIENT(rows, X, NAN), "target"),
        (lambda: GRADIENT(rows, X, reduction="average"), "reduction"),
        (lambda: GRADIENT(lambda x: x, X), "function"),
        (lambda: GRADIENT(jnp.sum, X), "function"),
        (lambda: GRADIENT(jnp.sum, X[:1]), "function"),
        (lambda: GRADIENT(lambda x: {"loss": rows(x)}, X), "function"),
        (lambda: GRADIENT("critic", X), "function"),
        (lambda: jaxreg.orthogonality_penalty({"kernel": X[0]}, "kernel"), "params"),
        (lambda: jaxreg.orthogonality_penalty({"kernel": X.astype(int)}), "params"),
        (lambda: jaxreg.orthogonality_penalty({"kernel": X.astype(complex)}), "params"),
        (lambda: jaxreg.orthogonality_penalty({"kernel": X}, where="none"), "where"),
        (lambda: jaxreg.orthogonality_penalty({"kernel": X}, where=3), "where"),
        (lambda: jaxreg.penalty_value(0.1, TREE), "penalty"),
        (lambda: jaxreg.penalty_value([jaxreg.L1(0.1), "L2"], TREE), "penalty"),
        (lambda: jaxreg.penalty_value(jaxreg.L1(0.1), {"kernel": X.astype(int)}), "penalty"),
        (lambda: jaxreg.penalty_value(jaxreg.L1(0.1), TREE, where="none"), "where"),
        (lambda: jaxreg.penalty_value(jaxreg.L1(0.1), TREE, where=3), "where"),
        (lambda: jaxreg.activity_penalty(X, 0.1), "penalty"),
        (lambda: jaxreg.activity_penalty(X, None), "penalty"),
        (lambda: jaxreg.activity_penalty(jnp.ones(()), jaxreg.L1(0.1)), "activations"),
        (lambda: jaxreg.activity_penalty(X.astype(int), jaxreg.L1(0.1)), "activations"),
        (lambda: jaxreg.activity_penalty(X[0], jaxreg.Nuclear(0.1)), "activations"),
        (lambda: jaxreg.activity_penalty(X, jaxreg.L1(0.1), reduction="average"), "reduction"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(jaxreg.ArgumentError) as error:
        call()
    assert message(error).startswith(f"{name}: got ")
