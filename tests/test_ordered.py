"""The sorted L1 norm and isotonic regression."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from scipy.special import ndtri
from sklearn.isotonic import isotonic_regression

from jaxreg.penalties.ordered import SortedL1, isotonic
from jaxreg.penalties.separable import L1

SIZES = (0, 1, 2, 3, 5, 31, 32, 33, 1000, 4097)
SHAPES = {
    "random": lambda n: np.random.default_rng(n).normal(size=n),
    "walk": lambda n: np.cumsum(np.random.default_rng(n).normal(size=n)),
    "decreasing": lambda n: -np.arange(n) / 7,
    "increasing": lambda n: np.arange(n) / 7,
    "concave": lambda n: -((np.arange(n) - n / 2) ** 2) / (n + 1),
    "convex": lambda n: ((np.arange(n) - n / 3) ** 2) / (n + 1),
    "root": lambda n: np.sqrt(np.arange(n)),
    "alternating": lambda n: (-1.0) ** np.arange(n) + np.arange(n) / (n + 1),
    "ties": lambda n: np.random.default_rng(n).integers(0, 4, n) * 0.1,
    "constant": lambda n: np.full(n, 0.1),
    "growing": lambda n: 1.1 ** np.minimum(np.arange(n), 300),
    "shrinking": lambda n: 0.5 ** np.arange(n),
    "far_from_zero": lambda n: 100 + np.random.default_rng(n).normal(size=n),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
fit = jax.jit(isotonic)
WEIGHTS = np.array([2.0, 1.5, 1.5, 1.0, 0.25, 0.0])


def oracle(y) -> np.ndarray:
    y = np.asarray(y, np.float64)
    return isotonic_regression(y, increasing=False) if y.size else y


def sample(seed: int = 0, shape: tuple[int, ...] = (6,)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 2)


# Isotonic regression ---------------------------------------------------------------------------


@every_shape
def test_isotonic_agrees_with_scikit_learn(shape, x64):
    for n in SIZES:
        y = SHAPES[shape](n)
        fitted = np.asarray(fit(y))
        np.testing.assert_allclose(fitted, oracle(y), rtol=0, atol=1e-13 * np.abs([1, *y]).max())
        assert (np.diff(fitted) <= 0).all()


@every_shape
def test_isotonic_keeps_the_digits_of_float32_in_long_arrays(shape):
    y = np.float32(SHAPES[shape](100_000))
    fitted = np.asarray(fit(y))
    assert np.abs(fitted - oracle(y)).max() <= 3e-7 * np.abs(y).max()
    assert (np.diff(fitted) <= 0).all()


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=70), st.sampled_from([1.0, 0.1, 1 / 3]))
@settings(max_examples=100, deadline=None)
def test_isotonic_is_right_and_monotone_at_ties_and_near_them(numbers, unit):
    y = np.float32(numbers) * np.float32(unit)
    y = np.concatenate([y, np.repeat(y[-1:], 70 - y.size)])  # of one size: one compilation
    fitted = np.asarray(fit(y))
    np.testing.assert_allclose(fitted, oracle(y), atol=2e-6)
    assert (np.diff(fitted) <= 0).all()


def test_isotonic_leaves_a_nonincreasing_array_as_it_is():
    y = -np.sort(-np.float32(np.random.default_rng(0).integers(0, 30, 1000) * 0.1))
    np.testing.assert_array_equal(fit(y), y)


def test_isotonic_works_along_the_last_axis_and_under_vmap(x64):
    y = sample(0, (3, 2, 37))
    expected = np.apply_along_axis(oracle, -1, y)
    np.testing.assert_allclose(isotonic(y), expected, atol=1e-13)
    np.testing.assert_allclose(jax.vmap(jax.vmap(isotonic))(y), expected, atol=1e-13)
    np.testing.assert_allclose(jax.vmap(isotonic, in_axes=2, out_axes=2)(y)[:, 0, 0].shape, 3)
    tangent = sample(1, y.shape)
    whole = jax.jvp(isotonic, (y,), (tangent,))[1]
    mapped = jax.vmap(jax.vmap(lambda y, t: jax.jvp(isotonic, (y,), (t,))[1]))(y, tangent)
    np.testing.assert_allclose(whole, mapped, atol=1e-14)
    np.testing.assert_allclose(
        jax.grad(lambda y: jnp.vdot(isotonic(y), tangent))(y),
        jax.vmap(jax.vmap(jax.grad(lambda y, t: isotonic(y) @ t)))(y, tangent),
        atol=1e-14,
    )


def test_the_derivative_of_isotonic_takes_means_over_its_blocks(x64):
    y = jnp.array([4.0, 1.0, 3.0, 2.0, 0.0, 0.0])  # a tie that is no block
    blocks = np.zeros((6, 6))
    blocks[0, 0] = blocks[4, 4] = blocks[5, 5] = 1
    blocks[1:4, 1:4] = 1 / 3
    np.testing.assert_allclose(jax.jacfwd(isotonic)(y), blocks, atol=1e-15)
    np.testing.assert_allclose(jax.jacrev(isotonic)(y), blocks, atol=1e-15)
    assert not jax.hessian(lambda y: jnp.sum(isotonic(y) * jnp.arange(6.0)))(y).any()


@every_shape
def test_the_derivative_of_isotonic_is_that_of_its_partition(shape, x64):
    """Projections: P y is the fit, P P = P, and <u, P t> = <P u, t>."""
    for n in (0, 1, 5, 33, 1000):
        y, t, u = jnp.asarray(SHAPES[shape](n)), sample(n, (n,)), sample(n + 1, (n,))
        fitted, project = jax.linearize(isotonic, y)
        scale = np.abs([1, *np.asarray(y)]).max()
        np.testing.assert_allclose(project(y), fitted, rtol=0, atol=1e-13 * scale)
        np.testing.assert_allclose(project(project(t)), project(t), atol=1e-13)
        transposed = jax.vjp(isotonic, y)[1](u)[0]
        np.testing.assert_allclose(project(u), transposed, atol=1e-13)
        np.testing.assert_allclose(u @ project(t), transposed @ t, atol=1e-10)


def test_the_derivative_of_isotonic_keeps_the_digits_of_float32():
    y = jnp.arange(30_000.0)
    t = jnp.full(y.shape, 0.1)
    np.testing.assert_allclose(jax.jvp(isotonic, (y,), (t,))[1], 0.1, rtol=5e-7)
    np.testing.assert_allclose(jax.vjp(isotonic, y)[1](t)[0], 0.1, rtol=5e-7)


# The penalty -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [WEIGHTS, None, np.ones(6), np.eye(6)[0], np.zeros(6)])
@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_prox_meets_the_optimality_conditions(weights, step, strength, x64):
    """(z - prox) / step is a subgradient: its dual norm is <= 1, and its product with x is R(x)."""
    penalty = SortedL1(strength, weights)
    for seed in range(20):
        z = np.asarray(sample(seed))
        z = np.round(z, 1) if seed % 2 else z  # ties, also in absolute value
        w = np.asarray(penalty.prox(z, step))
        subgradient = (z - w) / step
        full = np.asarray(penalty._weights(jnp.zeros(6)))
        excess = np.cumsum(-np.sort(-np.abs(subgradient))) - strength * np.cumsum(full)
        assert excess.max() <= 1e-12
        np.testing.assert_allclose(w @ subgradient, penalty.value(w), atol=1e-12)


def test_residual_vanishes_at_a_stationary_point(x64):
    penalty, z = SortedL1(0.3, WEIGHTS), sample()
    for step in (0.1, 1.0, 30.0):
        w = penalty.prox(z, step)
        for other in (0.01, 1.0, 50.0):
            np.testing.assert_allclose(penalty.residual(w, (w - z) / step, other), 0, atol=1e-12)


def test_equal_weights_are_the_l1_norm(x64):
    x = sample(0, (4, 3)).at[0, 0].set(0.0).at[1, 1].set(-1.25).at[2, 1].set(1.25)
    slope, lasso = SortedL1(0.5, np.ones(12)), L1(0.5)
    np.testing.assert_allclose(slope.prox(x, 0.7), lasso.prox(x, 0.7), atol=1e-15)
    np.testing.assert_allclose(slope.value(x), lasso.value(x), rtol=1e-15)
    np.testing.assert_allclose(slope.critical_multiplier(x), lasso.critical_multiplier(x))
    total = lambda penalty: jax.grad(lambda x: jnp.sum(penalty.prox(x, 0.7) ** 3))(x)  # noqa: E731
    np.testing.assert_allclose(total(slope), total(lasso), atol=1e-14)


def test_one_weight_is_the_maximum_norm(x64):
    """Its prox clips at the level where the excess over it sums to the threshold."""
    x = jnp.array([3.0, -2.0, 1.0])
    penalty = SortedL1(2.0, [1.0, 0.0, 0.0])
    np.testing.assert_allclose(penalty.prox(x, 1.0), [1.5, -1.5, 1.0], atol=1e-15)
    assert penalty.value(x) == 6
    assert penalty.critical_multiplier(x) == 3  # the dual norm is that of L1


def test_default_weights_are_those_of_benjamini_and_hochberg(x64):
    x, q = sample(0, (2, 50)), 0.2
    weights = ndtri(1 - np.arange(1, 101) * q / 200)
    given, default = SortedL1(0.4, weights / weights[0]), SortedL1(0.4, q=q)
    np.testing.assert_allclose(default.value(x), given.value(x), rtol=1e-13)
    np.testing.assert_allclose(default.prox(x, 2.0), given.prox(x, 2.0), atol=1e-13)


def test_default_weights_are_finite_in_float32_for_any_size():
    for n in (1, 3, 1_000_000):
        weights = np.asarray(SortedL1(1.0)._weights(jnp.zeros(n)))
        assert weights[0] == 1
        assert weights.min() > 0
        assert (np.diff(weights) <= 1e-6).all()


def test_critical_multiplier_is_where_zero_becomes_the_solution(x64):
    for seed in range(10):
        for weights in (WEIGHTS, None):
            grad, penalty = sample(seed), SortedL1(0.5, weights)
            critical = penalty.critical_multiplier(grad)
            assert not (critical * 1.000001 * penalty).prox(-grad).any()
            assert (critical * 0.999999 * penalty).prox(-grad).any()
    assert SortedL1(1.0, np.zeros(6)).critical_multiplier(sample()) == np.inf
    assert SortedL1(0.0).critical_multiplier(jnp.zeros(6)) == 0
    assert SortedL1(1.0, [1.0, 0.0]).critical_multiplier(jnp.array([0.0, 2.0])) == 2


def test_strength_zero_and_step_zero_are_the_identity():
    x = jnp.array([0.1, -0.1, 0.1, 0.3, -0.1, 0.0, 1e-30])
    for penalty, step in ((SortedL1(0.0), 3.0), (SortedL1(0.5), 0.0)):
        np.testing.assert_array_equal(penalty.prox(x, step), x)
        np.testing.assert_array_equal(jax.jacobian(penalty.prox)(x, step), np.eye(7))


def test_gradients_agree_with_finite_differences(x64):
    direction = sample(9, (4, 3))

    def total(x, step, strength, weights):
        penalty = SortedL1(strength, weights)
        return jnp.sum(direction * penalty.prox(x, step)) + penalty.value(x)

    weights = jnp.linspace(2.0, 0.1, 12)
    for seed in range(4):
        at = (sample(seed, (4, 3)), jnp.array(0.7), jnp.array(0.6), weights)
        check_grads(total, at, order=1, atol=1e-6, rtol=1e-6, eps=1e-7)


def test_gradients_are_finite_at_zero_at_ties_and_for_empty_arrays():
    def total(x, step, strength):
        penalty = SortedL1(strength)
        values = penalty.value(x), jnp.sum(penalty.prox(x, step)), penalty.critical_multiplier(x)
        return sum(values)

    for x in (jnp.zeros((4, 3)), jnp.ones((4, 3)), jnp.zeros((2, 0)), jnp.ones(())):
        for strength in (0.0, 0.5):
            gradients = jax.grad(total, (0, 1, 2))(x, 0.7, strength)
            if strength or not x.any():
                assert all(np.isfinite(g).all() for g in gradients)


def test_vmap_over_points_strengths_and_both_equals_a_loop(x64):
    xs, strengths = sample(0, (3, 40)), jnp.array([0.1, 0.5, 2.0])
    prox = jax.jit(lambda x, s: SortedL1(s).prox(x, 0.7))
    for axes in ((0, 0), (0, None), (None, 0)):
        args = [v if axis == 0 else v[1] for v, axis in zip((xs, strengths), axes, strict=True)]
        rows = [
            [v[i] if axis == 0 else v for v, axis in zip(args, axes, strict=True)] for i in range(3)
        ]
        looped = jnp.stack([prox(*row) for row in rows])
        np.testing.assert_allclose(jax.vmap(prox, axes)(*args), looped, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)])
def test_small_dtypes_agree_with_float64(dtype, tolerance, x64):
    for n in (12, 20_000):
        x = jnp.asarray(sample(0, (n,)), dtype)
        for penalty in (SortedL1(0.5), SortedL1(2.0, np.linspace(1, 0, n))):
            narrow, exact = (penalty.prox(v, 0.7).astype(float) for v in (x, x.astype(float)))
            assert jnp.abs(narrow - exact).max() <= tolerance * jnp.abs(exact).max()
            np.testing.assert_allclose(
                penalty.value(x), penalty.value(x.astype(float)), rtol=max(2e-6, tolerance / 10)
            )


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_works_under_strict_promotion_and_keeps_dtype_and_shape(dtype):
    for shape in ((), (0,), (2, 0, 3), (5,), (4, 3)):
        x = jnp.ones(shape, dtype)
        for penalty in (SortedL1(0.5), SortedL1(0.5, np.ones(x.size, np.float32))):
            assert penalty.prox(x, 0.1).shape == shape
            assert penalty.prox(x, 0.1).dtype == dtype
            assert penalty.value(x).dtype == jnp.float32
            assert penalty.critical_multiplier(x).shape == ()
            jax.grad(lambda x: jnp.sum(penalty.prox(x, 0.1)))(x)  # noqa: B023


def test_a_sharded_array_keeps_its_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = sample(0, (16, 4)).astype(jnp.float32)
    for spec in (PartitionSpec("data"), PartitionSpec(("data",), None), PartitionSpec()):
        sharding = NamedSharding(mesh, spec)
        prox = jax.jit(lambda x: SortedL1(0.5).prox(x, 0.3))
        result = prox(jax.device_put(x, sharding))
        assert result.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(result, prox(x), atol=1e-6)


def test_lowers_for_tpu_and_cuda_without_a_callback():
    def call(s, x):
        return jax.value_and_grad(lambda x: jnp.sum(SortedL1(s).prox(x, 0.5) ** 2))(x)

    exported = export.export(jax.jit(call), platforms=("tpu", "cuda"))(0.5, jnp.ones((4, 3)))
    assert set(exported.platforms) == {"tpu", "cuda"}
    assert not re.search(r"custom_call @\w*(callback|python)", exported.mlir_module())


def test_a_new_strength_or_weights_do_not_recompile():
    traces = []

    @jax.jit
    def prox(penalty, x):
        traces.append(penalty)
        return penalty.prox(x)

    for strength in (0.5, 1.0, 1):
        prox(SortedL1(strength, jnp.linspace(1, 0, 6) * strength), jnp.ones(6))
    assert len(traces) == 1


def test_has_no_direct_distance_to_its_subdifferential():
    with pytest.raises(ValueError, match="penalty: got SortedL1, .*residual"):
        SortedL1(0.5).subdiff_distance(jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SortedL1(-1.0), r"strength: got -1.0; accepted: a finite number >= 0"),
        (lambda: SortedL1(float("nan")), "strength: got nan"),
        (lambda: SortedL1(1.0, [1.0, 2.0]), "weights: got an array that goes from 1.0 to 2.0; "),
        (lambda: SortedL1(1.0, [1.0, -2.0]), "weights: got an array that holds -2.0; "),
        (lambda: SortedL1(1.0, [np.inf, 1.0]), "weights: got an array that holds inf; "),
        (lambda: SortedL1(1.0, "bh"), "weights: got 'bh'; "),
        (lambda: SortedL1(1.0, q=0.0), r"q: got 0.0; accepted: a number in \(0, 1\)"),
        (lambda: SortedL1(1.0, q=1), "q: got 1.0; "),
        (lambda: jax.jit(lambda q: SortedL1(1.0, q=q).prox(jnp.ones(2)))(0.1), "q: got .*traced"),
        (lambda: SortedL1(1.0, [1.0]).prox(jnp.ones(2)), r"weights: .*shape \(1,\).*size 2"),
        (
            lambda: jax.jit(lambda w: SortedL1(1.0, w).value(jnp.ones(2)))(jnp.ones(3)),
            r"weights: .*shape \(3,\).*size 2",
        ),
        (lambda: SortedL1(1.0).prox(jnp.ones(2), jnp.ones(2)), "step: .*SortedL1 has no closed"),
    ],
)
def test_bad_arguments_are_named_with_what_is_accepted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
