"""Total variation: the optimum by its definition, speed's worst cases, and derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import message
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg.penalties.variation import FusedLasso, TotalVariation
from jaxreg.penalties.variation2d import TotalVariation2D

LINES = {
    "noise": lambda rng, n: rng.normal(size=n),
    "walk": lambda rng, n: np.cumsum(rng.normal(size=n)),
    "sorted": lambda rng, n: np.sort(rng.normal(size=n)),
    "ramp": lambda rng, n: np.arange(n) / 7,
    "growth": lambda rng, n: np.exp2(np.arange(n) - n + 20.0),
    "signed growth": lambda rng, n: np.exp2(np.arange(n) - n + 20.0) * (-1.0) ** np.arange(n),
    "pieces": lambda rng, n: np.arange(n) // 9 % 3 + 0.1 * rng.normal(size=n),
    "ties": lambda rng, n: rng.integers(0, 3, size=n).astype(float),
    "constant": lambda rng, n: np.full(n, 0.1),
}
lines = pytest.mark.parametrize("kind", LINES)


def line(kind: str, n: int = 100) -> np.ndarray:
    return LINES[kind](np.random.default_rng(0), n)


def by_dynamic_programming(y: np.ndarray, weight: np.ndarray, pull: float) -> np.ndarray:
    """Minimizes sum weight (x - y)^2 / 2 + pull sum |diff x|, from the definition.

    The derivative of the best objective of x_1..x_i as a function of x_i is increasing and
    piecewise linear: kept as its breakpoints and the values there. What x_{i+1} sees of it is its
    clip to [-pull, pull], between the x_i where it reaches them.
    """
    far = 1 + np.abs(y).max() + 2 * pull / weight.min()
    knots = np.array([-far, far])
    values = np.zeros(2)
    bounds = []
    for data, w in zip(y, weight, strict=True):
        values = values + w * (knots - data)
        low, high = (np.interp(v, values, knots) for v in (-pull, pull))
        bounds.append((low, high))
        last = np.interp(0, values, knots)
        inner = (knots > low) & (knots < high)
        knots = np.concatenate([[-far, low], knots[inner], [high, far]])
        values = np.concatenate([[-pull, -pull], values[inner], [pull, pull]])
    x = [last]
    for low, high in bounds[-2::-1]:
        x.append(np.clip(x[-1], low, high))
    return np.array(x[::-1])


def optimality(x: np.ndarray, y: np.ndarray, step: np.ndarray, pull: float) -> float:
    """The largest violation of: u = sum (x - y) / step is pull * sign at jumps, and within."""
    u = np.cumsum((x - y) / step)
    jump = np.sign(np.diff(x))
    at_jumps = np.where(jump != 0, np.abs(u[:-1] - pull * jump), 0)
    inside = np.maximum(np.abs(u[:-1]) - pull, 0)
    return max(abs(u[-1]), at_jumps.max(initial=0), inside.max(initial=0))


# One dimension ----------------------------------------------------------------------------------


@lines
@pytest.mark.parametrize("pull", [0.01, 0.3, 4.0, 1000.0])
def test_the_prox_is_optimal_and_that_of_dynamic_programming(kind, pull, x64):
    y = line(kind)
    x = np.asarray(TotalVariation(pull).prox(y))
    scale = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(x, by_dynamic_programming(y, np.ones(100), pull), atol=1e-7 * scale)
    assert optimality(x, y, np.ones(100), pull) <= 1e-12 * max(scale, pull)


@lines
def test_an_elementwise_step_is_a_diagonal_metric(kind, x64):
    y, step = line(kind), 10.0 ** np.random.default_rng(1).uniform(-3, 1, size=100)
    x = np.asarray(TotalVariation(0.7).prox(y, step))
    scale = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(x, by_dynamic_programming(y, 1 / step, 0.7), atol=1e-6 * scale)
    assert optimality(x, y, step, 0.7) <= 1e-12 * scale / step.min()
    uniform = TotalVariation(0.7).prox(y, np.full(100, 0.3))
    chex.assert_trees_all_close(uniform, TotalVariation(0.7).prox(y, 0.3), atol=1e-13 * scale)


def test_a_coordinate_of_step_zero_stays():
    step = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    x = TotalVariation(0.5).prox(jnp.array([0.0, 1.0, 0.8, 9.0, 1.0]), step)
    chex.assert_trees_all_close(x, jnp.array([0.5, 1.0, 1.0, 8.0, 1.0]), atol=1e-6)
    assert TotalVariation(0.5).prox(x, jnp.zeros(5)).tolist() == x.tolist()


@pytest.mark.parametrize("step", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("strength", [0.3, 2.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_prox_agrees_with_cvxpy(strength, step, axis, x64):
    cp = pytest.importorskip("cvxpy")
    x = np.random.default_rng(2).normal(size=(4, 3))
    w = cp.Variable((4, 3))
    variation = cp.sum(cp.abs(cp.diff(w, axis=axis)))
    penalties = {
        TotalVariation(strength, axis=axis): strength * variation,
        FusedLasso(strength / 2, strength, axis=axis): strength * (cp.norm1(w) / 2 + variation),
    }
    for penalty, value in penalties.items():
        cp.Problem(cp.Minimize(value + cp.sum_squares(w - x) / (2 * step))).solve("CLARABEL")
        np.testing.assert_allclose(penalty.prox(x, step), w.value, atol=1e-5)
        np.testing.assert_allclose(penalty.value(x), _at(value, w, x), rtol=1e-12)


def _at(expression, variable, point):
    variable.value = point
    return expression.value


@lines
def test_float32_agrees_with_float64(kind, x64):
    y = np.float32(line(kind, 3000) if "growth" not in kind else line(kind))
    for pull in (0.01, 1.0, 100.0):
        narrow = np.asarray(TotalVariation(pull).prox(y), np.float64)
        wide = np.asarray(TotalVariation(pull).prox(y.astype(np.float64)))
        assert np.abs(narrow - wide).max() <= 1e-6 * max(1, np.abs(y).max())


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_each_line_along_the_axis_is_a_problem_of_its_own(axis):
    x = np.random.default_rng(3).normal(size=(5, 40, 3)).astype(np.float32)
    for penalty in (TotalVariation(0.4, axis=axis), FusedLasso(0.1, 0.4, axis=axis)):
        alone = jnp.apply_along_axis(
            lambda row, penalty=penalty: type(penalty)(*jax.tree.leaves(penalty)).prox(row), axis, x
        )
        chex.assert_trees_all_close(penalty.prox(x), alone, atol=1e-6)


def test_a_nan_stays_in_its_line():
    x = jnp.array([[1.0, 2.0, 4.0], [1.0, jnp.nan, 2.0], [jnp.inf, 2.0, 1.0], [1.0, 2.0, 4.0]])
    result = TotalVariation(0.5).prox(x)
    assert result[0].tolist() == result[3].tolist() == [1.5, 2.0, 3.5]
    assert not jnp.isfinite(result[1:3]).any()


@lines
def test_strength_zero_and_step_zero_are_the_identity(kind):
    x = jnp.asarray(line(kind), jnp.float32)
    for penalty in (TotalVariation, lambda s: FusedLasso(s, s)):
        assert penalty(0.0).prox(x, 3.0).tolist() == x.tolist()
        assert penalty(3.0).prox(x, 0.0).tolist() == x.tolist()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (0, 3), (3, 1)])
def test_empty_and_single_entries_stay(shape):
    x = jnp.ones(shape)
    for penalty in (TotalVariation(0.5), TotalVariation2D(0.5)):
        if x.ndim < 2 and isinstance(penalty, TotalVariation2D):
            continue
        assert penalty.prox(x).shape == shape
        chex.assert_trees_all_close(penalty.prox(x), x)
        assert penalty.value(x) == 0
        gradient = jax.grad(lambda x, penalty=penalty: jnp.sum(penalty.prox(x)))(x)
        chex.assert_trees_all_close(gradient, x)


def test_int_array_and_traced_strengths_agree():
    x = jnp.array([0.0, 1.0, 5.0, 6.0])
    for strength in (1, np.int32(1), jnp.array(1), jnp.array(1.0, jnp.bfloat16)):
        assert TotalVariation(strength).prox(x).tolist() == [1.0, 1.0, 5.0, 5.0]
    traced = jax.jit(lambda s: TotalVariation(s).prox(x))
    assert traced(1).tolist() == [1.0, 1.0, 5.0, 5.0]
    assert traced(0).tolist() == x.tolist()


@pytest.mark.parametrize("kind", ["noise", "ties", "constant"])
def test_derivatives_are_those_of_the_pieces(kind, x64):
    rng = np.random.default_rng(4)
    x, direction = line(kind, 30), rng.normal(size=30)
    step = rng.uniform(0.5, 2.0, size=30)

    def results(t):
        strength, moved = 0.3 + 0.1 * t, x + t * direction
        plain = TotalVariation(strength).prox(moved, 1 + t)
        metric = TotalVariation(strength).prox(moved, step * (1 + t))
        return jnp.stack([plain, metric, FusedLasso(0.1 + t, strength).prox(moved, 1 + t)])

    at = 1e-3  # off the ties, so that a difference quotient has a limit
    tangent = jax.jvp(results, (at,), (1.0,))[1]
    quotient = (results(at + 1e-7) - results(at - 1e-7)) / 2e-7
    np.testing.assert_allclose(tangent, quotient, atol=1e-6)
    reverse = jax.jacrev(results)(at)
    np.testing.assert_allclose(reverse, tangent, atol=1e-12)
    assert np.isfinite(jax.jacrev(results)(0.0)).all()


@pytest.mark.parametrize(
    "penalty",
    [
        TotalVariation(0.5),
        FusedLasso(0.2, 0.5),
        TotalVariation2D(0.5),
        TotalVariation2D(1, isotropic=False),
    ],
    ids=repr,
)
def test_laws_of_transformations(penalty):
    def prox(penalty, x):
        return penalty.prox(x, 0.5)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    double = jax.tree.map(lambda s: 2 * s, penalty)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        eager = penalty.prox(x, jnp.float32(0.5))
        penalty.value(x), penalty.critical_multiplier(x)
        assert penalty.prox(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    chex.assert_trees_all_close(jax.jit(prox)(penalty, x), eager, atol=1e-6)
    xs = jnp.stack([x, -x, x[::-1]])
    looped = jnp.stack([prox(penalty, row) for row in xs])
    chex.assert_trees_all_close(jax.vmap(lambda x: prox(penalty, x))(xs), looped, atol=1e-6)
    both = jax.tree.map(
        lambda *leaves: jnp.stack([jnp.float32(v) for v in leaves]), penalty, double
    )
    looped = jnp.stack([prox(penalty, x), prox(double, x)])
    chex.assert_trees_all_close(jax.vmap(prox, (0, None))(both, x), looped, atol=1e-6)
    exported = export.export(jax.jit(prox), platforms=("tpu", "cuda"))(penalty, x)
    assert set(exported.platforms) == {"tpu", "cuda"}
    for point in (x, jnp.zeros((4, 3)), jnp.ones((4, 3))):
        for call in (prox, type(penalty).value):
            gradients = jax.grad(lambda p, x, call=call: jnp.sum(call(p, x)), (0, 1))(
                penalty, point
            )
            chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("penalty", [TotalVariation(0.5), TotalVariation2D(0.5)], ids=repr)
@pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec(None, "d")])
def test_sharded_leaves_keep_their_sharding(penalty, spec):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, spec)
    placed = jax.device_put(x, sharding)
    result = jax.jit(penalty.prox)(placed)
    assert result.sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_close(result, penalty.prox(x), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_critical_multiplier_of_total_variation(n, x64):
    grad = np.random.default_rng(5).normal(size=(3, n))
    assert TotalVariation(0.5).critical_multiplier(grad) == np.inf
    grad -= grad.mean(1, keepdims=True)
    critical = TotalVariation(0.5).critical_multiplier(grad)
    assert critical == pytest.approx(np.abs(np.cumsum(grad, 1)).max() / 0.5)
    for factor, held in ((1.001, True), (0.999, n == 1)):
        left = np.abs(TotalVariation(0.5 * critical * factor).prox(-grad)).max()
        assert (left < 1e-14) == held


@pytest.mark.parametrize(("l1", "variation"), [(0.3, 0.5), (0.0, 0.5), (0.3, 0.0), (1e-3, 5.0)])
@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_critical_multiplier_of_the_fused_lasso(l1, variation, n, x64):
    grad = np.random.default_rng(5).normal(size=(3, n))
    if l1 == 0:
        assert FusedLasso(l1, variation).critical_multiplier(grad) == np.inf
        grad -= grad.mean(1, keepdims=True)
    penalty = FusedLasso(l1, variation)
    critical = penalty.critical_multiplier(grad)
    ratios = [
        abs(row[a:b].sum()) / (l1 * (b - a) + variation * ((a > 0) + (b < n)))
        for row in grad
        for a in range(n)
        for b in range(a + 1, n + 1)
        if l1 or b - a < n
    ]
    assert critical == pytest.approx(max(ratios, default=0))
    if critical > 0:
        assert np.abs((1.0001 * critical * penalty).prox(-grad)).max() < 1e-14
        assert np.abs((0.9999 * critical * penalty).prox(-grad)).max() > 1e-7
        quotient = penalty.critical_multiplier(grad * 1.001) / critical
        assert quotient == pytest.approx(1.001)
    gradient = jax.grad(lambda s: FusedLasso(s * l1, s * variation).critical_multiplier(grad))(1.0)
    assert gradient == pytest.approx(-critical)


def test_bad_axes_are_refused():
    for penalty in (TotalVariation(1.0, axis=2), FusedLasso(1.0, 1.0, axis=-3)):
        for call in (penalty.value, penalty.prox, penalty.critical_multiplier):
            with pytest.raises(ValueError, match=r"^axis: got .*shape \(4, 3\)") as error:
                call(jnp.ones((4, 3)))
            message(error)
    for bad in (1.0, None, "0", True):
        with pytest.raises(ValueError, match="^axis: got"):
            TotalVariation(1.0, axis=bad)
    with pytest.raises(ValueError, match="^variation: got -1.0"):
        FusedLasso(1.0, -1.0)


# Two dimensions ---------------------------------------------------------------------------------

isotropies = pytest.mark.parametrize("isotropic", [True, False])


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(6).normal(size=shape or (6, 5))


@isotropies
@pytest.mark.parametrize("pull", [0.05, 0.3, 2.0])
def test_the_prox_of_images_agrees_with_cvxpy(isotropic, pull, x64):
    cp = pytest.importorskip("cvxpy")
    x, w = image(), cp.Variable((6, 5))
    down = cp.vstack([cp.diff(w, axis=0), np.zeros((1, 5))])
    right = cp.hstack([cp.diff(w, axis=1), np.zeros((6, 1))])
    slopes = cp.vstack([cp.vec(down, "C"), cp.vec(right, "C")])
    value = cp.sum(cp.norm(slopes, 2 if isotropic else 1, axis=0))
    cp.Problem(cp.Minimize(pull * value + cp.sum_squares(w - x) / 2)).solve("CLARABEL")
    penalty = TotalVariation2D(pull, isotropic=isotropic, tolerance=1e-10)
    np.testing.assert_allclose(penalty.prox(x), w.value, atol=2e-5)
    np.testing.assert_allclose(penalty.value(x), pull * _at(value, w, x), rtol=1e-12)


@isotropies
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6, 1e-10])
def test_the_tolerance_bounds_the_distance_from_the_exact_prox(isotropic, tolerance, x64):
    x = image(20, 30)
    exact = TotalVariation2D(
        0.3, isotropic=isotropic, tolerance=1e-14, max_iterations=100_000
    ).prox(x)
    found = TotalVariation2D(0.3, isotropic=isotropic, tolerance=tolerance).prox(x)
    spread = np.linalg.norm(x - x.mean())
    assert np.linalg.norm(found - exact) <= tolerance**0.5 * spread + 1e-7 * spread


@isotropies
def test_images_of_one_row_are_lines(isotropic, x64):
    x = line("noise", 40)
    lines = TotalVariation(0.4).prox(x)
    penalty = TotalVariation2D(0.4, isotropic=isotropic, tolerance=1e-14, max_iterations=100_000)
    np.testing.assert_allclose(penalty.prox(x[None])[0], lines, atol=1e-6)
    np.testing.assert_allclose(penalty.prox(x[:, None])[:, 0], lines, atol=1e-6)


@isotropies
def test_each_image_is_a_problem_of_its_own(isotropic):
    x = jnp.asarray(image(2, 3, 6, 5) * np.array([1, 10, 100])[:, None, None], jnp.float32)
    penalty = TotalVariation2D(0.3, isotropic=isotropic)
    alone = jnp.stack([jnp.stack([penalty.prox(y) for y in row]) for row in x])
    chex.assert_trees_all_close(penalty.prox(x), alone, rtol=1e-5, atol=1e-5)


@isotropies
def test_constant_images_stay_and_strength_and_step_zero_are_the_identity(isotropic):
    flat, x = jnp.full((6, 5), 0.1), jnp.asarray(image(), jnp.float32)
    penalty = TotalVariation2D(0.5, isotropic=isotropic)
    assert penalty.prox(flat).tolist() == flat.tolist()
    assert penalty.prox(x, 0.0).tolist() == x.tolist()
    assert (0 * penalty).prox(x).tolist() == x.tolist()
    assert penalty.critical_multiplier(jnp.zeros((6, 5))) == 0


@isotropies
def test_derivatives_of_the_prox_of_images_are_those_of_the_solution(isotropic, x64):
    x, direction = image(), np.random.default_rng(7).normal(size=(6, 5))
    exact = {"isotropic": isotropic, "tolerance": 1e-14, "max_iterations": 200_000}

    def result(t):
        penalty = TotalVariation2D(0.2 + 0.1 * t, **exact)
        return penalty.prox(x + t * direction, 1 + t)

    tangent = jax.jvp(result, (0.0,), (1.0,))[1]
    quotient = (result(1e-4) - result(-1e-4)) / 2e-4
    np.testing.assert_allclose(tangent, quotient, atol=2e-3)
    np.testing.assert_allclose(jax.jacrev(result)(0.0), tangent, atol=1e-8)
    at_zero = jax.jacrev(lambda s: TotalVariation2D(s, isotropic=isotropic).prox(x))(0.0)
    small = TotalVariation2D(1e-6, **exact).prox(x) - x
    np.testing.assert_allclose(at_zero, small / 1e-6, atol=1e-4)


@isotropies
def test_critical_multiplier_of_images(isotropic, x64):
    grad = image(2, 6, 5)
    exact = {"isotropic": isotropic, "tolerance": 1e-12, "max_iterations": 100_000}
    penalty = TotalVariation2D(0.5, **exact)
    assert penalty.critical_multiplier(grad) == np.inf
    grad -= grad.mean((1, 2), keepdims=True)
    critical = penalty.critical_multiplier(grad)
    assert np.abs((1.001 * critical * penalty).prox(-grad)).max() < 1e-5
    assert np.abs((0.999 * critical * penalty).prox(-grad)).max() > 1e-4
    one_row = TotalVariation2D(0.5, **exact).critical_multiplier(grad[:1, :1] - grad[0, 0].mean())
    lines = TotalVariation(0.5).critical_multiplier(grad[0, 0] - grad[0, 0].mean())
    assert one_row == pytest.approx(float(lines), rel=1e-4)


def test_bad_arguments_of_images_are_refused():
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="^tolerance: got .*; accepted: a number > 0"):
            TotalVariation2D(1.0, tolerance=bad)
    with pytest.raises(ValueError, match="^max_iterations: got 0"):
        TotalVariation2D(1.0, max_iterations=0)
    with pytest.raises(ValueError, match="^isotropic: got 1"):
        TotalVariation2D(1.0, isotropic=1)
    with pytest.raises(ValueError, match=r"^x: got an array of shape \(3,\)"):
        TotalVariation2D(1.0).prox(jnp.ones(3))
