"""Penalties on singular values: against NumPy's float64 SVD, cvxpy and finite differences."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import message
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxreg._check import ArgumentError
from jaxreg.penalties import spectral
from jaxreg.penalties.matrix import Nuclear, Orthogonal, Rank, SpectralBall

SHAPES = [(4, 3), (1, 1), (1, 5), (6, 6), (2, 1, 3, 5)]
BY_PRODUCTS = [
    Nuclear(0.3, method="newton_schulz"),
    SpectralBall(0.3, method="newton_schulz"),
    Orthogonal(method="newton_schulz"),
    Rank(1, method="subspace"),
]
EXACT = [Nuclear(0.3), SpectralBall(0.3), Orthogonal(), Rank(1)]
every = pytest.mark.parametrize("penalty", EXACT + BY_PRODUCTS, ids=repr)
every_exact = pytest.mark.parametrize("penalty", EXACT, ids=repr)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(shape, dtype=np.float64, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def with_values(rows, columns, values, seed=0) -> np.ndarray:
    u, _, vh = np.linalg.svd(normal((rows, columns), seed=seed), full_matrices=False)
    return (u * values) @ vh


def oracle(penalty, x, step=1.0) -> np.ndarray:
    """The prox by NumPy's SVD in float64."""
    u, s, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    if isinstance(penalty, Nuclear):
        s = np.maximum(s - step * penalty.strength, 0)
    elif isinstance(penalty, SpectralBall):
        s = np.minimum(s, penalty.radius)
    elif isinstance(penalty, Orthogonal):
        s = np.ones_like(s)
    else:
        s = np.where(np.arange(s.shape[-1]) < penalty.rank, s, 0)
    return (u * s[..., None, :]) @ vh


def largest(x) -> float:
    return np.linalg.norm(np.asarray(x, np.float64), 2, axis=(-2, -1)).max()


# The result ------------------------------------------------------------------------------------


@every
@every_shape
@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
def test_prox_is_the_one_of_the_singular_values(penalty, shape, step, x64):
    x = normal(shape)
    small = min(shape[-2:]) <= spectral.OVERSAMPLING
    tolerance = 1e-12 if penalty.method != "subspace" or small else 1e-2
    np.testing.assert_allclose(penalty.prox(x, step), oracle(penalty, x, step), atol=tolerance)


@every
@every_shape
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)], ids=["f32", "bf16"]
)
def test_small_dtypes_agree_with_float64(penalty, shape, dtype, tolerance):
    x = jnp.asarray(normal(shape), dtype)
    exact = oracle(penalty, np.asarray(x, np.float64))
    found = penalty.prox(x)
    assert found.dtype == dtype
    # The polar factor's error is proportional to the condition number.
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    factor = (s[..., 0] / s[..., -1]).max() if isinstance(penalty, Orthogonal) else 1
    factor *= 3 if penalty.method == "newton_schulz" else 1
    scale = max(1, np.abs(np.asarray(x, np.float64)).max())
    assert np.abs(np.asarray(found, np.float64) - exact).max() <= factor * tolerance * scale


@every
@every_shape
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_prox_is_feasible_and_its_value_there_is_zero(penalty, shape, dtype, x64):
    if isinstance(penalty, Nuclear):
        return
    for x in (normal(shape, dtype), 5 * normal(shape, dtype, 1)):
        projected = penalty.prox(jnp.asarray(x))
        if isinstance(penalty, SpectralBall) and penalty.method == "newton_schulz":
            # Its rounding is that of x: far outside of the ball it is to be done twice.
            projected = penalty.prox(projected)
        assert penalty.value(projected) == 0
        apart = x + 1e-3 * np.abs(x).max() if min(shape[-2:]) > 1 else 2 * x + np.sign(x)
        if isinstance(penalty, SpectralBall):
            apart = np.asarray(penalty.prox(x)) * 1.01
            assert penalty.value(penalty.prox(x) * 0.99) == 0
        if not (isinstance(penalty, Rank) and min(shape[-2:]) == 1):
            assert penalty.value(apart) == (0 if largest(apart) <= 0.3 else np.inf)


def test_the_value_of_nuclear_is_the_sum_of_all_singular_values(x64):
    for shape in SHAPES:
        x = normal(shape)
        expected = 0.3 * np.linalg.svd(x, compute_uv=False).sum()
        for method in ("svd", "newton_schulz"):
            np.testing.assert_allclose(Nuclear(0.3, method=method).value(x), expected, rtol=1e-12)


@every_exact
def test_points_of_the_set_and_step_zero_stay_as_they_are(penalty):
    for shape in SHAPES:
        x = normal(shape)
        inside = np.float32(x if isinstance(penalty, Nuclear) else oracle(penalty, x))
        chex.assert_trees_all_equal(penalty.prox(inside, 0.0), jnp.asarray(inside))
        once = penalty.prox(np.float32(x), 0.0)
        chex.assert_trees_all_equal(penalty.prox(once, 0.0), once)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_nuclear_of_strength_or_step_zero_is_the_identity(method):
    x = jnp.asarray(normal((4, 3), np.float32))
    chex.assert_trees_all_equal(Nuclear(0.0, method=method).prox(x, 3.0), x)
    chex.assert_trees_all_equal(Nuclear(2.0, method=method).prox(x, 0.0), x)


def test_nuclear_gives_exact_rank_and_an_exact_zero(x64):
    x = with_values(8, 5, [4.0, 3.0, 1.0, 0.5, 0.1])
    assert np.linalg.matrix_rank(Nuclear(1.5).prox(x)) == 2
    # What remains of a large matrix has no rounding error of the large one's size.
    assert np.linalg.matrix_rank(Nuclear(3.9).prox(x)) == 1
    assert not np.asarray(Nuclear(4.0 + 1e-9).prox(x)).any()


def test_a_tiny_step_of_nuclear_is_not_lost_in_rounding():
    x = with_values(6, 6, np.linspace(1, 2, 6))
    moved = (np.asarray(Nuclear(1.0).prox(np.float32(x), 1e-5), np.float64) - np.float32(x)) / 1e-5
    u, _, vh = np.linalg.svd(x)
    np.testing.assert_allclose(moved, -u @ vh, atol=0.02)  # half a unit in the last place of x


def test_critical_multiplier_is_where_zero_becomes_the_solution(x64):
    for shape in SHAPES:
        grad = normal(shape)
        critical = Nuclear(0.5).critical_multiplier(grad)
        np.testing.assert_allclose(critical, largest(grad) / 0.5, rtol=1e-12)
        zero = np.zeros(shape)
        assert not np.asarray((1.0001 * critical * Nuclear(0.5)).prox(zero - grad)).any()
        assert np.asarray((0.9999 * critical * Nuclear(0.5)).prox(zero - grad)).any()
    assert Nuclear(0.0).critical_multiplier(np.zeros((4, 3))) == 0
    assert Nuclear(0.0).critical_multiplier(np.ones((4, 3))) == np.inf
    assert Nuclear(1.0).critical_multiplier(np.zeros((0, 3))) == 0
    assert SpectralBall(1.0).critical_multiplier(np.ones((4, 3))) == np.inf
    assert SpectralBall(0.0).critical_multiplier(np.ones((4, 3))) == 0
    for penalty in (Rank(1), Orthogonal()):
        with pytest.raises(ArgumentError, match="not convex"):
            penalty.critical_multiplier(np.ones((4, 3)))


@pytest.mark.parametrize("penalty", [Nuclear(0.3), SpectralBall(0.3)], ids=repr)
@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
def test_the_residual_vanishes_at_a_stationary_point(penalty, step, x64):
    for shape in SHAPES:
        x = jnp.asarray(normal(shape))
        w = penalty.prox(x, step)
        for residual_step in (0.01, 1.0, 50.0):
            residual = penalty.residual(w, (w - x) / step, residual_step)
            np.testing.assert_allclose(residual, 0, atol=1e-12)


@pytest.mark.parametrize("penalty", [Nuclear(0.3), SpectralBall(0.3)], ids=repr)
def test_convex_ones_agree_with_cvxpy(penalty, x64):
    cvxpy = pytest.importorskip("cvxpy")
    x, w = normal((4, 3)), cvxpy.Variable((4, 3))
    distance = cvxpy.sum_squares(w - x) / 2
    if isinstance(penalty, Nuclear):
        problem = cvxpy.Problem(cvxpy.Minimize(0.3 * cvxpy.normNuc(w) + distance))
    else:
        problem = cvxpy.Problem(cvxpy.Minimize(distance), [cvxpy.sigma_max(w) <= 0.3])
    problem.solve(solver=cvxpy.CLARABEL)
    np.testing.assert_allclose(penalty.prox(x), w.value, atol=1e-5)


@pytest.mark.parametrize("penalty", [Rank(1), Rank(2), Orthogonal()], ids=repr)
def test_no_feasible_point_is_nearer_than_the_projection(penalty, x64):
    generator = np.random.default_rng(1)
    for shape in ((4, 3), (3, 4), (6, 6)):
        x = normal(shape)
        projection = np.asarray(penalty.prox(x))
        best = np.sum((projection - x) ** 2)
        for size in (1e-3, 0.1, 1.0, 10.0):
            for _ in range(50):
                start = projection + size * generator.normal(size=shape)
                if isinstance(penalty, Orthogonal):
                    q = np.linalg.qr(start if shape[0] >= shape[1] else start.T)[0]
                    q *= np.sign(np.sum(q * (start if shape[0] >= shape[1] else start.T), axis=0))
                    other = q if shape[0] >= shape[1] else q.T
                else:
                    basis = np.linalg.qr(start[:, : penalty.rank])[0]
                    other = basis @ (basis.T @ x)
                assert best <= np.sum((other - x) ** 2) + 1e-12


def test_rank_zero_gives_zero_and_full_rank_the_whole_space():
    x = jnp.asarray(normal((4, 3), np.float32))
    assert not np.asarray(Rank(0).prox(x)).any()
    assert Rank(0).value(jnp.zeros((4, 3))) == 0
    for rank in (3, 9):
        chex.assert_trees_all_equal(Rank(rank).prox(x), x)
        assert Rank(rank).value(x) == 0


# Errors of the methods by matrix products, as their docstrings state them ----------------------

SPECTRA = {
    "decaying": np.logspace(0, -4, 40),
    "low rank": np.where(np.arange(40) < 20, 1.0, 0.0),
    "repeated": np.repeat([3.0, 1.0, 0.3, 0.1], 10),
    "flat": np.linspace(1, 2, 40),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(40, 40), (100, 40), (40, 100)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-5), (np.float64, 1e-13)])
def test_newton_schulz_is_within_its_bound(name, shape, dtype, bound, x64):
    s = SPECTRA[name]
    x = with_values(*shape, s[: min(shape)]).astype(dtype)
    for size in (1e-3, 0.3, 0.999):
        for penalty in (
            Nuclear(size * s.max(), method="newton_schulz"),
            SpectralBall(size * s.max(), method="newton_schulz"),
        ):
            error = np.asarray(penalty.prox(jnp.asarray(x)), np.float64) - oracle(penalty, x)
            assert largest(error) <= bound * s.max()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("shape", [(4, 3), (40, 40), (100, 40), (40, 100)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_newton_schulz_is_orthogonal_to_rounding(condition, shape, dtype, x64):
    s = np.logspace(0, -np.log10(condition), min(shape))
    x = (7 * with_values(*shape, s)).astype(dtype)
    found = Orthogonal(method="newton_schulz").prox(jnp.asarray(x))
    eps = np.finfo(dtype).eps
    assert spectral.gram_error(found) <= 16 * eps
    error = np.asarray(found, np.float64) - oracle(Orthogonal(), x)
    assert largest(error) <= (100 + 4 * condition) * eps


def test_newton_schulz_leaves_zero_directions_at_zero():
    polar = Orthogonal(method="newton_schulz")
    assert not np.asarray(polar.prox(jnp.zeros((4, 3)))).any()
    assert polar.value(polar.prox(jnp.zeros((4, 3)))) == np.inf
    found = polar.prox(jnp.diag(jnp.array([2.0, 0.0])))
    np.testing.assert_allclose(found, np.diag([1.0, 0.0]), atol=1e-6)


def test_the_svd_gives_an_orthonormal_matrix_also_where_singular_values_are_zero():
    for x in (np.zeros((4, 3)), np.zeros((3, 4)), np.ones((4, 3)), np.eye(4, 3)):
        found = Orthogonal().prox(jnp.asarray(x, jnp.float32))
        assert spectral.gram_error(found) <= 1e-6
        chex.assert_trees_all_equal(found, Orthogonal().prox(jnp.asarray(x, jnp.float32)))


def test_subspace_iteration_is_within_its_bound(x64):
    flat = normal((100, 60))  # no gap between singular values: the hardest kind
    for x in (flat, with_values(100, 60, np.logspace(0, -3, 60)), flat[:, :5] @ flat[:5]):
        for rank in (1, 3, 10):
            nearest = np.linalg.norm(x - oracle(Rank(rank), x))
            found = np.asarray(Rank(rank, method="subspace").prox(x))
            assert np.linalg.matrix_rank(found) <= rank
            assert np.linalg.norm(x - found) <= 1.01 * nearest + 1e-12
    decaying = with_values(100, 60, 0.5 ** np.arange(60.0))
    found = Rank(3, method="subspace").prox(decaying)
    np.testing.assert_allclose(found, oracle(Rank(3), decaying), atol=1e-12)


# Derivatives -----------------------------------------------------------------------------------


def scaled(penalty, s):
    return penalty if isinstance(penalty, (Orthogonal, Rank)) else type(penalty)(s)


@every_exact
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (4, 4), (2, 3, 2)], ids=str)
def test_derivatives_of_the_prox_agree_with_finite_differences(penalty, shape, x64):
    def prox(x, s):
        return scaled(penalty, s).prox(x, 1.3)

    x = jnp.asarray(normal(shape, seed=3))
    check_grads(prox, (x, 0.7), order=1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_derivatives_of_the_value_of_nuclear_agree_with_finite_differences(method, x64):
    for shape in ((4, 3), (3, 4), (2, 3, 3)):
        x = jnp.asarray(normal(shape))
        check_grads(
            lambda x, s: Nuclear(s, method=method).value(x), (x, 0.7), order=2, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)], ids=str)
def test_derivatives_at_repeated_singular_values_agree_with_finite_differences(shape, x64):
    """Where f is smooth at the repeated value, so is f(X)."""
    x = jnp.asarray(2 * oracle(Orthogonal(), normal(shape)))
    pair = jnp.asarray(with_values(*shape, [2.0, 2.0, 0.1]))  # 0.1 is on the other side
    for penalty in (Nuclear(0.5), SpectralBall(0.5), SpectralBall(5.0), Orthogonal()):
        for point in (x, pair):
            check_grads(penalty.prox, (point,), order=1, atol=1e-5, rtol=1e-5)
    check_grads(Rank(2).prox, (pair,), order=1, atol=1e-5, rtol=1e-5)
    check_grads(Nuclear(0.5).value, (x,), order=2, atol=1e-5, rtol=1e-5)


def test_derivatives_at_zero_singular_values_agree_with_finite_differences(x64):
    for values in ([2.0, 0.0, 0.0], [0.0, 0.0, 0.0]):
        for shape in ((4, 3), (3, 5)):
            x = jnp.asarray(with_values(*shape, values))
            for penalty in (Nuclear(0.5), SpectralBall(0.5)):
                check_grads(penalty.prox, (x,), order=1, atol=1e-5, rtol=1e-5)
    check_grads(Rank(1).prox, (jnp.asarray(with_values(4, 3, [2, 0, 0])),), order=1, atol=1e-6)


def test_the_derivative_of_the_polar_factor_of_an_orthogonal_matrix_is_its_tangent_part(x64):
    q, d = jnp.asarray(oracle(Orthogonal(), normal((5, 3)))), jnp.asarray(normal((5, 3), seed=1))
    _, tangent = jax.jvp(Orthogonal().prox, (q,), (d,))
    expected = d - q @ (q.T @ d + d.T @ q) / 2
    np.testing.assert_allclose(tangent, expected, atol=1e-12)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_the_gradient_of_nuclear_is_the_subgradient_over_the_nonzero_singular_values(method, x64):
    value = Nuclear(2.0, method=method).value
    for values in ([3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        kept = np.sign(values)
        gradient = jax.grad(value)(jnp.eye(4, 3) @ jnp.diag(jnp.array(values)))
        np.testing.assert_allclose(gradient, 2 * np.eye(4, 3) * kept, atol=1e-10)


POINTS = {
    "identity": np.eye(4, 3),
    "wide identity": 0.3 * np.eye(3, 4),
    "orthogonal": np.linalg.qr(normal((4, 3)))[0],
    "zero": np.zeros((4, 3)),
    "ones": np.ones((4, 3)),
    "batch with a zero": np.stack([np.zeros((4, 3)), normal((4, 3))]),
    "empty": np.zeros((0, 3)),
}


@every
@pytest.mark.parametrize("name", POINTS)
def test_gradients_are_finite(penalty, name):
    def total(f):
        def summed(x, s):
            build = {field: s for field in ("strength", "radius") if hasattr(penalty, field)}
            build = build or ({"rank": 1} if isinstance(penalty, Rank) else {})
            result = f(type(penalty)(**build, method=penalty.method), x)
            return jnp.sum(
                jnp.asarray(result) * jnp.arange(1, result.size + 1).reshape(result.shape)
            )

        return jax.jit(jax.grad(summed, argnums=(0, 1)))

    x = jnp.asarray(POINTS[name], jnp.float32)
    for f in (total(lambda p, x: p.prox(x, 1.0)), total(lambda p, x: p.value(x))):
        for strength in (0.0, 0.3, 1.0):
            chex.assert_tree_all_finite(f(x, strength))


# Transformations, shapes, platforms ------------------------------------------------------------


@every
def test_lowers_for_tpu_and_cuda(penalty):
    for f in (penalty.prox, penalty.value, jax.grad(lambda x: jnp.sum(penalty.prox(x)))):
        for shape in ((4, 3), (2, 30, 20)):
            exported = export.export(jax.jit(f), platforms=("tpu", "cuda"))(jnp.ones(shape))
            assert set(exported.platforms) == {"tpu", "cuda"}


@every
@pytest.mark.usefixtures("strict")
def test_works_under_strict_promotion_with_and_without_jit(penalty):
    for dtype in (jnp.float32, jnp.bfloat16):
        for shape in ((4, 3), (2, 30, 20)):
            x = jnp.asarray(normal(shape), dtype)
            eager, jitted = penalty.prox(x, 0.5), jax.jit(penalty.prox)(x, 0.5)
            chex.assert_trees_all_close(eager, jitted, rtol=1e-5, atol=1e-5)
            jax.grad(lambda x: jnp.sum(penalty.prox(x)))(x)
            penalty.value(x)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("kind", [Nuclear, SpectralBall])
def test_vmap_over_points_and_strengths_equals_a_loop(kind, method):
    def prox(s, x):
        return kind(s, method=method).prox(x, 0.5)

    x, s = jnp.asarray(normal((3, 4, 3), np.float32)), jnp.array([0.0, 0.5, 2.0])
    looped = jnp.stack([prox(s, x) for s, x in zip(s, x, strict=True)])
    chex.assert_trees_all_close(jax.vmap(prox)(s, x), looped, atol=2e-6)
    chex.assert_trees_all_close(jax.vmap(prox, (0, None))(s, x[0])[0], prox(s[0], x[0]), atol=2e-6)
    chex.assert_trees_all_close(kind(0.5).prox(x), jax.vmap(kind(0.5).prox)(x), atol=2e-6)
    jax.vmap(jax.grad(lambda s, x: jnp.sum(prox(s, x))))(s, x)


def test_a_new_strength_does_not_recompile():
    chex.clear_trace_counter()
    call = jax.jit(chex.assert_max_traces(lambda p, x: p.prox(x), n=1))
    for strength in (0.0, 0.5, jnp.float32(2)):
        call(Nuclear(strength), jnp.ones((4, 3)))


@every
def test_keeps_the_dtype_and_the_shape_also_of_empty_arrays(penalty):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 3), (1, 1)):
            x = jnp.ones(shape, dtype)
            assert penalty.prox(x, 0.1).dtype == dtype
            assert penalty.prox(x, 0.1).shape == shape
            assert penalty.value(x).dtype == jnp.float32
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 3)):
        assert penalty.value(jnp.ones(shape)) == 0


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_give_nan_in_their_matrix_alone(penalty, bad):
    x = normal((2, 12, 11), np.float32)
    x[0, 1, 2] = bad
    found = np.asarray(penalty.prox(x))
    assert np.isnan(found[0]).any()
    assert np.isfinite(found[1]).all()
    if isinstance(penalty, Nuclear):
        assert np.isnan(penalty.value(x))
    else:
        assert penalty.value(x) == np.inf


@every
def test_extreme_magnitudes_neither_overflow_nor_vanish(penalty):
    for size in (1e-30, 1e30):
        x = jnp.asarray(size * normal((4, 3)), jnp.float32)
        assert np.isfinite(np.asarray(penalty.prox(x, size))).all()


@every
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((16, 5, 4), ("data",)),
        ((16, 4), ("data",)),
        ((4, 16), (None, "data")),
        ((2, 16, 24), (None, "data")),
    ],
    ids=["batch", "rows", "columns", "rows of a batch"],
)
def test_a_sharded_array_gives_the_same_result_and_keeps_its_sharding(penalty, shape, axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    x = normal(shape, np.float32)
    sharded = jax.device_put(x, sharding)
    compiled = jax.jit(lambda x: penalty.prox(x, 0.5)).lower(sharded).compile()
    found = compiled(sharded)
    assert found.sharding.is_equivalent_to(sharding, len(shape))
    np.testing.assert_allclose(found, penalty.prox(x, 0.5), atol=1e-5)
    if axes[0] == "data" and len(shape) == 3:
        text = compiled.as_text()
        assert not re.search(r"all-(reduce|gather|to-all)|collective-permute", text)


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Nuclear(-1), "strength: got -1.0; accepted: a finite number >= 0"),
        (lambda: Nuclear(float("nan")), "strength: got nan"),
        (lambda: Nuclear([1.0, 2.0]), "strength: got"),
        (lambda: SpectralBall(-1), "radius: got -1.0; accepted: a finite number >= 0"),
        (lambda: SpectralBall(float("inf")), "radius: got inf"),
        (lambda: Rank(-1), "rank: got -1; accepted: a whole number >= 0"),
        (lambda: Rank(True), "rank: got True"),
        (lambda: Rank(2.0), "rank: got 2.0"),
        (lambda: Rank(2, method="newton_schulz"), "method: got 'newton_schulz'"),
        (lambda: Nuclear(1, method="newton_shulz"), "did you mean 'newton_schulz'"),
        (lambda: SpectralBall(1, method="SVD"), "accepted: svd, newton_schulz"),
        (lambda: Orthogonal(method=3), "method: got '3'"),
        (lambda: Nuclear(1).prox(np.ones(3), np.ones(3)), "step: got"),
    ],
)
def test_refuses_bad_arguments(make, expected):
    with pytest.raises(ArgumentError) as error:
        make()
    assert expected in message(error)


@every
def test_refuses_arrays_without_rows_and_columns(penalty):
    for x in (np.float32(1), np.ones(3, np.float32), np.ones(0, np.float32)):
        for call in (penalty.prox, penalty.value):
            with pytest.raises(ArgumentError) as error:
                call(x)
            assert message(error).startswith("x: got an array of shape")
