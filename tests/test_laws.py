"""Laws: what holds for every regularizer. Each runs on every row of cases.py it applies to."""

import re

import chex
import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OTHER_NAMES, PENALTIES, TRANSFORMS, Case, PenaltyCase, TransformCase
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import minimize, minimize_scalar

import jaxreg

EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def every(law):
    """For each regularizer, on all versions."""
    return pytest.mark.core(EVERY(law))


every_penalty = pytest.mark.parametrize("case", PENALTIES, ids=lambda case: case.name)
every_transform = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.name)

STEPS = (0.0, 0.1, 1.0, 30.0)
few = settings(max_examples=25, deadline=None)


# Compiled whole where it is computed alone: each operation by itself is a program to compile, too.
@jax.jit
def prox(penalty, x, step=1.0):
    return penalty.prox(x, step)


def points() -> st.SearchStrategy[np.ndarray]:
    """Multiples of 1/128 up to 4: no subnormal numbers, which XLA flushes to zero on a CPU."""
    return arrays(np.float64, (4, 3), elements=st.integers(-512, 512).map(lambda i: i / 128))


def sample(dtype=np.float32) -> jax.Array:
    x = np.random.default_rng(0).normal(size=(4, 3))
    x[0, 0] = 0.0
    return jnp.asarray(x, dtype)


def test_every_exported_regularizer_has_a_row():
    assert {case.name for case in CASES} == set(jaxreg.__all__) - OTHER_NAMES


# Laws of every regularizer ---------------------------------------------------------------------


@every
def test_lowers_for_tpu_and_cuda(case: Case):
    exported = export.export(jax.jit(case.call), platforms=("tpu", "cuda"))(0.5, sample())
    assert set(exported.platforms) == {"tpu", "cuda"}


@every
def test_a_new_strength_does_not_recompile(case: Case):
    chex.clear_trace_counter()
    call = jax.jit(chex.assert_max_traces(case.call, n=1))
    outputs = [call(jnp.float32(s), sample()) for s in case.strengths]
    if case.has_strength:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(*outputs[:2])


@every
def test_jit_equals_eager(case: Case):
    chex.assert_trees_all_close(
        jax.jit(case.call)(0.5, sample()), case.call(0.5, sample()), rtol=1e-6, atol=1e-7
    )


@every
def test_vmap_over_the_strength_equals_a_loop(case: Case):
    call = jax.jit(case.call)
    mapped = jax.jit(jax.vmap(case.call, (0, None)))(jnp.array(case.strengths), sample())
    looped = [call(s, sample()) for s in case.strengths]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *looped)
    chex.assert_trees_all_close(mapped, stacked, rtol=1e-6, atol=1e-7)


@every
def test_gradients_are_finite_at_zero_and_elsewhere(case: Case):
    def total(strength, x):
        return sum(
            jnp.sum(leaf)
            for leaf in jax.tree.leaves(case.call(strength, x))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    for x in (sample(), jnp.zeros((4, 3))):
        chex.assert_tree_all_finite(gradient(0.5, x))


OURS = [case for case in CASES if not case.holds_optax]


@pytest.mark.core
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_works_under_strict_promotion(case: Case, dtype):
    outputs = case.call(jnp.float32(0.5), sample(dtype))
    chex.assert_tree_all_finite(outputs)


# The mask of dropout is drawn in float32 for every dtype (test_noise.py compares the values), and
# optax's bias correction 1 - b2**count has a relative error of 1e-5 in float32. What rounds at
# random may be off by a whole spacing (test_rounding.py).
ROUNDED = ("dropout", "prox_adam", "prox_adamw", "regularize", "stochastic_rounding")
EXACT = [case for case in CASES if case.name not in ROUNDED]


@pytest.mark.core
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_small_dtypes_agree_with_float64(case: Case, dtype, x64):
    def result(x):
        out = case.call(0.5, x)
        return np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)

    tolerance = case.float32_accuracy if dtype == jnp.float32 else 2.0**-7
    x = sample(dtype)
    exact = result(x.astype(np.float64))  # the same numbers: what differs is the computation
    assert np.abs(result(x) - exact).max() <= tolerance * max(1.0, np.abs(exact).max())


# Laws of penalties -----------------------------------------------------------------------------


@every_penalty
@given(x=points())
@few
def test_value_agrees_with_the_formula(case: PenaltyCase, x):
    for point in (np.float32(x), np.float32(case.feasible(x, 0.5))):
        expected = case.value(point.astype(np.float64), 0.5)
        np.testing.assert_allclose(case.make(0.5).value(point), expected, rtol=1e-5)


@every_penalty
@given(x=points())
@few
def test_value_is_finite_at_the_prox(case: PenaltyCase, x):
    for step in STEPS:
        assert jnp.isfinite(case.make(0.5).value(prox(case.make(0.5), np.float32(x), step)))


@every_penalty
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_value_is_finite_at_what_an_optimizer_leaves(case: PenaltyCase, dtype):
    """In 16 bits too, and after p + (prox(p + u) - p) was rounded."""
    penalty = case.make(0.5)
    tx = jaxreg.prox_sgd(0.1, penalty)
    params = sample(dtype)
    if penalty.has_subdiff_distance:
        assert jnp.isfinite(penalty.value(penalty.prox(params)))
    updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    tiny = case.name in ("Simplex", "NonNegativeL1")  # a sum of roundings; 0 is exact
    assert jnp.isfinite(penalty.value(after)) or tiny


def metric_steps(case: PenaltyCase) -> list:
    """Scalar steps, and elementwise ones where the prox takes them."""
    rng = np.random.default_rng(1)
    elementwise = [10 ** rng.uniform(-1, 1, (4, 3)), 10 ** rng.uniform(-2, 2, (4, 3))]
    return [*STEPS[1:], *(elementwise if case.make(0.5).elementwise_step else [])]


@every_penalty
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_prox_attains_the_smallest_objective(case: PenaltyCase, strength, x64):
    """Objectives are compared, not points: where R is not convex, the prox jumps."""
    penalty = case.make(strength)
    oracle = (
        coordinates_best if penalty.separable else program_best if case.program else search_best
    )
    for i, step in enumerate(metric_steps(case)):
        z = 1.5 * np.random.default_rng(i).normal(size=(4, 3))
        found = np.asarray(prox(penalty, z, step))

        def objective(w, z=z, step=step):
            return case.value(w, strength) + ((w - z) ** 2 / (2 * step)).sum()

        best, accuracy = oracle(case, strength, z, step, objective, found)
        assert objective(found) <= best + accuracy


def coordinates_best(case, strength, z, step, objective, found):
    """One coordinate after the other: a fine grid finds the basin, a bounded search its bottom."""
    # The kink at 0 and the bounds of a constraint are points of the grid.
    grid = np.concatenate([np.linspace(-8, 8, 801), [0.0, strength, -strength]])
    total = 0.0
    for zi, ti in zip(z.ravel(), np.broadcast_to(step, z.shape).ravel(), strict=True):

        def at(w, zi=zi, ti=ti):
            return case.value(np.array([w]), strength) + (w - zi) ** 2 / (2 * ti)

        near = grid[np.argmin([at(w) for w in grid])]
        best = at(near)
        if not case.constraint:
            bounds = (near - 0.02, near + 0.02)
            best = min(best, minimize_scalar(at, bounds=bounds, method="bounded").fun)
        total += best
    return total, 1e-9


def program_best(case, strength, z, step, objective, found):
    """A convex solver, at its own accuracy; the residual below is exact."""
    w = cvxpy.Variable(z.shape)
    value, constraints = case.program(cvxpy, w, strength)
    distance = cvxpy.sum(cvxpy.multiply(1 / (2 * np.broadcast_to(step, z.shape)), (w - z) ** 2))
    problem = cvxpy.Problem(cvxpy.Minimize(value + distance), constraints)
    best = problem.solve(solver=cvxpy.CLARABEL)
    return best, 1e-6 * (1 + abs(best))


def search_best(case, strength, z, step, objective, found):
    """The best of many searches from points of the domain near z, near what was found, and far."""
    rng = np.random.default_rng(0)
    best = np.inf
    for scale in (1e-4, 1e-2, 0.3, 1.0, 3.0):
        for centre in (z, found, np.zeros_like(z)):
            for _ in range(40):
                start = case.feasible(centre + scale * rng.normal(size=z.shape), strength)
                best = min(best, objective(start))
                if not case.constraint and _ % 20 == 0:
                    local = minimize(lambda w: objective(w.reshape(z.shape)), start.ravel())
                    best = min(best, local.fun)
    return best, 1e-9


@every_penalty
@given(x=points(), steps=arrays(np.float64, (4, 3), elements=st.sampled_from(STEPS)))
@few
def test_an_elementwise_step_acts_coordinate_by_coordinate(case: PenaltyCase, x, steps):
    penalty = case.make(0.5)
    if not penalty.separable:
        return  # the next two laws are for them
    whole = prox(penalty, x, steps)
    pairs = zip(x.ravel(), steps.ravel(), strict=True)
    single = [prox(penalty, jnp.float32(z), float(t)) for z, t in pairs]
    chex.assert_trees_all_close(whole.ravel(), jnp.stack(single), rtol=1e-6)


@every_penalty
@given(x=points())
@few
def test_a_constant_elementwise_step_equals_the_scalar_step(case: PenaltyCase, x):
    penalty = case.make(0.5)
    for step in STEPS:
        if penalty.elementwise_step:
            elementwise = prox(penalty, x, np.full((4, 3), step))
            scalar = prox(penalty, x, step)
            chex.assert_trees_all_close(elementwise, scalar, rtol=2e-5, atol=2e-6)


@every_penalty
def test_an_elementwise_step_may_span_all_of_adams_range(case: PenaltyCase, x64):
    """Where the second moment is nearly 0 the gain is 1e8: float32 agrees with float64."""
    penalty, rng = case.make(0.5), np.random.default_rng(2)
    if not penalty.elementwise_step or not penalty.convex:
        return
    for low, high in ((-8, 8), (-3, 8), (-8, 0)):
        x = rng.normal(size=(4, 3)).astype(np.float32)
        step = (10 ** rng.uniform(low, high, (4, 3))).astype(np.float32)
        step[0, 0] = 0.0
        exact = prox(penalty, x.astype(np.float64), step.astype(np.float64))
        np.testing.assert_allclose(prox(penalty, x, step), exact, rtol=2e-4, atol=2e-5)


@every_penalty
def test_an_elementwise_step_is_refused_where_there_is_no_form_for_it(case: PenaltyCase):
    penalty = case.make(0.5)
    if penalty.elementwise_step:
        assert penalty.prox(sample(), jnp.ones((4, 3))).shape == (4, 3)
    else:
        with pytest.raises(ValueError, match="step: got an array.*accepted: a scalar.*momentum"):
            penalty.prox(sample(), jnp.ones((4, 3)))


@every_penalty
@given(x=points())
@few
def test_step_zero_is_the_identity_inside_the_domain(case: PenaltyCase, x):
    inside = jnp.asarray(case.feasible(x, 0.5), jnp.float32)
    steps = [0.0, np.zeros((4, 3))] if case.make(0.5).elementwise_step else [0.0]
    for step in steps:
        same = prox(case.make(0.5), inside, step)
        if case.constraint and not case.make(0.5).separable:  # the domain has room for rounding
            chex.assert_trees_all_close(same, inside, rtol=1e-5, atol=2e-5)
        else:
            chex.assert_trees_all_equal(same, inside)


@every_penalty
def test_strength_zero_is_the_identity(case: PenaltyCase):
    x, step = sample(), 3.0
    if case.name == "NonNegativeL1":
        x = jnp.abs(x)
    if case.constraint:  # one binds at any strength
        both = jnp.stack([x, -x])
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(jax.vmap(case.make(0.0).prox)(both), both)
    else:
        chex.assert_trees_all_equal(case.make(0.0).prox(x, step), x)


@every_penalty
@given(x=points(), y=points(), step=st.sampled_from(STEPS[1:]))
@few
def test_prox_of_a_convex_penalty_is_firmly_nonexpansive(case: PenaltyCase, x, y, step):
    penalty = case.make(0.5)
    p, q = (np.asarray(prox(penalty, z, step), np.float64) for z in (x, y))
    x, y = np.float32(x).astype(np.float64), np.float32(y).astype(np.float64)
    nonexpansive = ((p - q) ** 2).sum() <= ((p - q) * (x - y)).sum() + 1e-4
    assert nonexpansive or not penalty.convex


@every_penalty
@given(x=points())
@few
def test_value_is_no_larger_after_the_prox_and_the_three_point_inequality_holds(case, x):
    penalty, step = case.make(0.5), 0.7
    x = np.float32(x).astype(np.float64)
    p = np.asarray(prox(penalty, x, step), np.float64)
    left = case.value(p, 0.5) + ((p - x) ** 2).sum() / (2 * step)
    for u in (case.feasible(x, 0.5), case.feasible(x[::-1], 0.5), np.zeros_like(x)):
        right = case.value(u, 0.5) + ((u - x) ** 2).sum() / (2 * step)
        # p is a minimizer, and for a convex R the objective grows from there like a parabola.
        growth = ((u - p) ** 2).sum() / (2 * step) if penalty.convex else 0.0
        assert left + growth <= right + 2e-4


@every_penalty
@pytest.mark.parametrize("step", STEPS[1:])
def test_residual_and_subdifferential_distance_vanish_at_a_stationary_point(case, step, x64):
    """w = prox(x, step) makes (x - w) / step a subgradient at w: the loss's is minus that."""
    penalty, x = case.make(0.3), sample(np.float64)
    w = penalty.prox(x, step)
    grad = (w - x) / step
    # Without convexity w is the minimizer for every smaller step, not for larger ones.
    for residual_step in (0.01, 1.0, 50.0) if penalty.convex else (step / 100, step / 2):
        residual = penalty.residual(w, grad, residual_step)
        accuracy = case.accuracy * (1 + 1 / residual_step)  # that of a point, over the step
        chex.assert_trees_all_close(residual, jnp.zeros((4, 3)), atol=accuracy)
    if penalty.has_subdiff_distance:
        distance = penalty.subdiff_distance(w, grad)
        chex.assert_trees_all_close(distance, jnp.zeros((4, 3)), atol=1e-12)
    else:
        with pytest.raises(ValueError, match="penalty: got .* no direct form; .*residual"):
            penalty.subdiff_distance(w, grad)


@every_penalty
def test_residual_and_subdifferential_distance_see_a_point_that_is_not_stationary(case, x64):
    penalty = case.make(0.3)
    x = jnp.asarray(case.feasible(np.asarray(sample(np.float64)), 0.3))
    wrong = -(np.linspace(5, 9, 12).reshape(4, 3) ** 2)
    assert jnp.abs(penalty.residual(x, wrong, 1e-3)).max() > 0.5
    if penalty.has_subdiff_distance:
        assert penalty.subdiff_distance(x, wrong).max() > 0.5


@every_penalty
@given(grad=points())
@few
def test_critical_multiplier_is_where_zero_becomes_the_solution(case: PenaltyCase, grad):
    penalty, zero = case.make(0.5), jnp.zeros((4, 3))
    if not penalty.convex:
        with pytest.raises(ValueError, match="penalty: got .*not convex; accepted: a convex"):
            penalty.critical_multiplier(grad)
        return
    critical = float(penalty.critical_multiplier(grad))

    def moves(c: float) -> bool:
        """Whether a proximal step from 0 leaves it under c times the penalty."""
        return bool((prox(case.make(0.5 * c), -np.float32(grad)) != zero).any())

    if case.constraint:
        stays = (penalty.prox(-np.float32(grad)) == zero).all()
        assert critical == (0 if stays else np.inf)
    elif np.isinf(critical):
        assert moves(100.0)
    else:
        assert not moves(critical * 1.001)
        assert moves(critical * 0.999) or critical == 0


@every_penalty
def test_vmap_over_points_and_strengths_equals_a_loop(case: PenaltyCase):
    stack = jnp.stack([sample(), sample()[::-1] * 2, -sample()])
    strengths = jnp.array(case.strengths)

    def call(strength, x):
        return case.make(strength).prox(x, 0.3)

    one = jax.jit(call)
    over_points = jax.jit(jax.vmap(call, in_axes=(None, 0)))(0.5, stack)
    over_both = jax.jit(jax.vmap(call))(strengths, stack)
    looped = jnp.stack([one(0.5, x) for x in stack])
    chex.assert_trees_all_close(over_points, looped, rtol=1e-6, atol=1e-6)
    looped = jnp.stack([one(s, x) for s, x in zip(case.strengths, stack, strict=True)])
    chex.assert_trees_all_close(over_both, looped, rtol=1e-6, atol=1e-6)


@every_penalty
def test_the_derivative_of_the_prox_is_right(case: PenaltyCase, x64):
    """Central differences, at a point where the prox is smooth."""
    rng = np.random.default_rng(3)
    x, direction = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    steps = [0.3] if not case.make(0.5).elementwise_step else [0.3, rng.uniform(0.2, 0.5, (4, 3))]
    for step in steps:

        @jax.jit
        def along(e, step=step):
            return case.make(0.4 + e).prox(x + e * direction, step * (1 + e))

        expected = (along(1e-6) - along(-1e-6)) / 2e-6
        found = jax.jvp(along, (0.0,), (1.0,))[1]
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.thorough
@every_penalty
def test_the_second_derivative_of_the_prox_is_right(case: PenaltyCase, x64):
    # The latent norm's solver carries first derivatives only, as its docstring says.
    if not case.make(0.5).elementwise_step or case.name == "OverlappingGroupLasso":
        return
    rng = np.random.default_rng(3)
    x, direction = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    for step in (0.3, rng.uniform(0.2, 0.5, (4, 3))):

        @jax.jit
        def slope(e, step=step):
            def along(e):
                return jnp.sum(jnp.sin(case.make(0.4).prox(x + e * direction, step)))

            return jax.grad(along)(e)

        expected = (slope(1e-5) - slope(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(slope)(0.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@every_penalty
def test_gradients_are_finite_at_kinks_ties_and_empty_arrays(case: PenaltyCase):
    def total(strength, x):
        value = 0.0 if case.constraint else case.make(strength).value(x)
        return jnp.sum(case.make(strength).prox(x, 0.7)) + value

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    kinks = [jnp.zeros((4, 3)), jnp.ones((4, 3)), jnp.eye(4, 3), jnp.tile(jnp.arange(3.0), (4, 1))]
    for x in [*kinks, *(jnp.ones(shape) for shape in case.shapes)]:
        for strength in (0.0, 0.5):
            chex.assert_tree_all_finite(gradients(strength, x))


@every_penalty
def test_is_a_pytree_of_its_numbers(case: PenaltyCase):
    penalty = case.make(0.5)
    assert all(
        isinstance(leaf, (float, np.ndarray, jax.Array)) for leaf in jax.tree.leaves(penalty)
    )
    leaves, treedef = jax.tree.flatten(penalty)
    assert treedef == jax.tree.structure(case.make(0.25))
    chex.assert_trees_all_equal(
        jax.tree.unflatten(treedef, leaves).prox(sample()), penalty.prox(sample())
    )
    traced = jax.jit(lambda p, x: p.prox(x))(penalty, sample())
    chex.assert_trees_all_close(traced, penalty.prox(sample()), rtol=1e-6, atol=1e-6)
    assert not callable(penalty)  # optax.inject_hyperparams takes callables for schedules


@every_penalty
def test_one_trace_serves_equal_strengths_of_any_type(case: PenaltyCase):
    chex.clear_trace_counter()
    call = jax.jit(chex.assert_max_traces(lambda p, x: p.prox(x), n=1))
    for strength in (1, 1.0, np.float32(1), np.float64(1), jnp.float32(1), np.int64(1)):
        call(case.make(strength), sample())


@every_penalty
def test_keeps_the_dtype_and_the_shape_also_of_empty_arrays(case: PenaltyCase):
    penalty = case.make(0.5)
    given = [jnp.ones(shape) for shape in case.shapes]
    given += [jnp.ones((4, 3), dtype) for dtype in (jnp.bfloat16, jnp.float16)]
    for x in given:
        after = prox(penalty, x, 0.1)
        assert (after.dtype, after.shape) == (x.dtype, x.shape)
        assert penalty.value(x).dtype == jnp.float32


@every_penalty
@pytest.mark.parametrize("spec", [("data",), (None, "data")], ids=["rows", "columns"])
def test_a_sharded_leaf_keeps_its_sharding_with_the_collectives_stated(case: PenaltyCase, spec):
    count = 4 if spec[0] else 3
    mesh = jax.make_mesh(
        (count,),
        ("data",),
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.device_put(sample(), sharding)
    penalty = case.make(0.5)
    compiled = jax.jit(lambda x: penalty.prox(x, 0.1)).lower(x).compile()
    used = set(
        re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute)\(", compiled.as_text())
    )
    assert used <= case.collectives
    assert compiled(x).sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_close(compiled(x), prox(penalty, sample(), 0.1), rtol=1e-5, atol=1e-5)


@every_penalty
def test_a_multiple_is_a_step_as_many_times_as_long(case: PenaltyCase):
    penalty, x = case.make(0.5), sample()
    double = 2 * penalty
    twice = prox(double, x, 0.3)
    chex.assert_trees_all_close(twice, prox(penalty, x, 0.6), rtol=1e-5, atol=1e-6)
    inside = jnp.asarray(case.feasible(np.asarray(x, np.float64), 0.5), jnp.float32)
    np.testing.assert_allclose(double.value(inside), 2 * penalty.value(inside), rtol=1e-5)
    assert double.where == penalty.where


@every_penalty
def test_with_a_squared_norm_it_adds_up(case: PenaltyCase, x64):
    penalty, x, step = case.make(0.5), np.asarray(sample(np.float64)), 0.7
    both = penalty + jaxreg.L2(0.8)
    w = prox(both, x, step)
    # Stationary for R plus the square is stationary for R, with the square in the loss.
    residual = penalty.residual(w, (w - x) / step + 0.8 * w, 0.1)
    chex.assert_trees_all_close(residual, jnp.zeros((4, 3)), atol=1e-11)
    inside = case.feasible(x, 0.5)
    total = penalty.value(inside) + 0.4 * (inside**2).sum()
    np.testing.assert_allclose(both.value(inside), total, rtol=1e-9)


@every_penalty
def test_refuses_what_is_not_a_real_floating_array(case: PenaltyCase):
    for x in (jnp.arange(3), jnp.array([True]), jnp.array([1j])):
        with pytest.raises(ValueError, match="x: got an array.*real floating"):
            case.make(0.5).prox(x)


@every_penalty
def test_refuses_steps_that_are_negative_or_do_not_fit(case: PenaltyCase):
    penalty = case.make(0.5)
    with pytest.raises(ValueError, match="step: got -1.0; accepted: numbers >= 0"):
        penalty.prox(sample(), -1.0)
    with pytest.raises(ValueError, match="step: got nan"):
        penalty.prox(sample(), float("nan"))
    with pytest.raises(ValueError, match=r"step: .*shape \(3,\).*(shape \(4, 3\)|a scalar)"):
        penalty.prox(sample(), jnp.ones(3))
    with pytest.raises(ValueError, match=r"grad: .*shape \(2,\)"):
        penalty.residual(sample(), jnp.ones(2))


@every_penalty
def test_shows_how_it_was_made(case: PenaltyCase):
    assert repr(case.make(0.5)).startswith(case.name + "(")


# Laws of transformations -----------------------------------------------------------------------

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@every_transform
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_updates_and_state_keep_their_dtypes(case: TransformCase, dtype):
    tx, params = case.make(0.5), {"kernel": sample(dtype), "bias": jnp.ones(3, dtype)}
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@every_transform
def test_float64_is_kept(case: TransformCase, x64):
    tx, params = case.make(0.5), {"kernel": sample(np.float64)}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


@every_transform
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_can_be_carried_by_scan(case: TransformCase, dtype):
    tx, params = case.make(0.5), {"kernel": sample(dtype)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=3)
    looped = (params, tx.init(params))
    for _ in range(3):
        looped, _ = step(looped, None)
    # Inside one program optax's moments in 16 bits are rounded at other places.
    tolerance = 1e-6 if dtype == jnp.float32 else 0.03
    chex.assert_trees_all_close(scanned, looped[0], rtol=tolerance, atol=tolerance)


@every_transform
def test_passes_over_none_masked_nodes_and_empty_leaves(case: TransformCase):
    tx = case.make(0.5)
    params = {
        "kernel": sample(),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty_kernel": jnp.zeros((0, 3)),
    }
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty_kernel"].shape == (0, 3)


@every_transform
def test_integer_strengths_equal_floating_ones(case: TransformCase):
    whole = case.whole_strength
    chex.assert_trees_all_equal(case.call(whole, sample()), case.call(float(whole), sample()))
