"""Penalties: construction, selectors, and what peers get wrong."""

import dataclasses
import itertools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg
from jaxreg import groups, where


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), True, "0.1", None, [0.1, -0.2]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (jaxreg.L1, "strength"),
        (jaxreg.NonNegativeL1, "strength"),
        (jaxreg.L2, "strength"),
        (lambda s: jaxreg.ElasticNet(s, 1.0), "l1"),
        (lambda s: jaxreg.ElasticNet(1.0, s), "l2"),
        (jaxreg.MCP, "strength"),
        (jaxreg.GroupLasso, "strength"),
        (lambda s: jaxreg.SparseGroupLasso(1.0, s), "group"),
        (jaxreg.L1Ball, "radius"),
        (jaxreg.Simplex, "total"),
    ],
)
def test_a_bad_strength_names_the_argument_and_what_is_accepted(make, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: got .*; accepted: .*finite numbers? >= 0"):
        make(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxreg.MCP(1.0, gamma=0.0), "gamma: got 0.0; accepted: a finite number > 0"),
        (lambda: jaxreg.SCAD(1.0, a=1.0), "a: got 1.0; accepted: a finite number > 1"),
        (lambda: jaxreg.LogSum(1.0, epsilon=-1), "epsilon: got -1.0; accepted"),
        (lambda: jaxreg.TopK(-1), "k: got -1; accepted: a whole number >= 0"),
        (lambda: jaxreg.TopK(2.5), "k: got 2.5; accepted: a whole number >= 0"),
        (lambda: jaxreg.NM(5, 4), "n: got 5; accepted: a whole number <= m = 4"),
        (lambda: jaxreg.NM(2, 0), "m: got 0; accepted: a whole number >= 1"),
        (lambda: jaxreg.HalfSpace(np.zeros(3), 1.0), "normal: got an array of zeros"),
        (lambda: jaxreg.HalfSpace([1.0, np.nan], 1.0), "normal: got an array that holds nan"),
        (lambda: jaxreg.Affine([[1.0]], [np.inf]), "offset: got an array that holds inf"),
        (lambda: jaxreg.L1(0.1) * -2, "multiplier: got -2.0; accepted: a finite number >= 0"),
    ],
)
def test_a_bad_number_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (jaxreg.NM(2, 4), r"m: got 4; accepted: a divisor of 6, the length of axis -2"),
        (jaxreg.NM(2, 4, axis=2), r"axis: got 2; accepted: an axis of an array of the shape"),
        (jaxreg.HalfSpace([1.0, 1.0], 1.0), r"normal: .* accepted: an array of x's shape \(6, 2\)"),
        (jaxreg.Affine(np.ones((1, 3)), [1.0]), r"matrix: .*accepted: .*\(equations, 12\)"),
        (
            jaxreg.Affine(np.ones((1, 12)), np.ones(2)),
            r"offset: .*accepted: an array of shape \(1,\)",
        ),
        (
            jaxreg.L1(np.ones(3)),
            r"strength: .*accepted: a scalar or an array of x's shape \(6, 2\)",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(penalty, message):
    with pytest.raises(ValueError, match=message):
        penalty.prox(jnp.ones((6, 2)))


def test_a_strength_of_wrong_shape_is_refused_when_traced_too():
    with pytest.raises(ValueError, match=r"strength: got an array of shape \(2,\)"):
        jax.jit(lambda s: jaxreg.L1(s).prox(jnp.ones(3)))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"strength: got an array of shape \(2,\)"):
        jax.jit(lambda s: jaxreg.L2(s).prox(jnp.ones(2)))(jnp.ones(2))


def test_box_refuses_bounds_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"upper: got 0.0; accepted: a number >= lower = 1.0"):
        jaxreg.Box(1, 0)
    with pytest.raises(ValueError, match="lower: got nan"):
        jaxreg.Box(float("nan"), 0)


def test_box_takes_infinite_bounds():
    box = jaxreg.Box(-np.inf, 1.0)
    assert box.prox(jnp.array([-5.0, 5.0])).tolist() == [-5.0, 1.0]
    assert box.subdiff_distance(jnp.array([1.0]), jnp.array([-3.0])).tolist() == [0.0]


def test_an_infeasible_point_has_infinite_value_and_distance():
    for constraint in (jaxreg.Box(-1, 1), jaxreg.NonNegative()):
        x = jnp.array([-2.0, 0.5])
        assert constraint.value(x) == jnp.inf
        assert constraint.subdiff_distance(x, jnp.zeros(2)).tolist() == [jnp.inf, 0.0]


def test_on_gives_the_same_penalty_for_other_leaves():
    penalty = jaxreg.ElasticNet(0.1, 0.2).on("head/**")
    assert penalty.where == where.path("head/**")
    assert (penalty.l1, penalty.l2) == (0.1, 0.2)
    assert repr(penalty) == "ElasticNet(0.1, 0.2).on(where.path('head/**'))"
    assert repr(jaxreg.L1(0.1)) == "L1(0.1)"


def test_a_path_pattern_may_stand_for_the_selector_at_construction_too():
    assert jaxreg.L1(0.1, where="head/**").where == where.path("head/**")
    assert jaxreg.NonNegative(where="head/**").where == where.path("head/**")
    with pytest.raises(ValueError, match="where: got 3"):
        jaxreg.L1(0.1, where=3)


def test_a_tree_in_place_of_an_array_is_refused():
    for tree in ({"w": jnp.ones(2)}, [jnp.ones(2), jnp.ones(3)], "w"):
        with pytest.raises(ValueError, match="x: got a .*; accepted: (one array|a real floating)"):
            jaxreg.L1(0.1).value(tree)


def test_a_schedule_in_place_of_a_strength_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"strength: got a function.*inject_hyperparams"):
        jaxreg.L1(lambda count: 0.1)


def test_a_penalty_is_immutable():
    with pytest.raises(AttributeError):
        jaxreg.L1(0.1).strength = 0.2  # pyright: ignore


def test_strength_zero_at_zero_has_no_nan_in_value_prox_or_gradient():
    zero = jnp.zeros(3)
    for penalty in (jaxreg.L1(0), jaxreg.L2(0), jaxreg.ElasticNet(0, 0)):
        assert penalty.value(zero) == 0
        assert not jnp.isnan(jax.jacobian(penalty.prox)(zero)).any()
        assert penalty.critical_multiplier(zero) == 0
    assert jaxreg.L1(0).critical_multiplier(jnp.ones(3)) == jnp.inf
    gradient = jax.grad(lambda s: jaxreg.L1(s).critical_multiplier(jnp.ones(3)))(2.0)
    assert gradient == -0.25


def test_int_array_and_traced_strengths_agree():
    x = jnp.array([-3.0, 0.5, 2.0])
    expected = [-2.0, 0.0, 1.0]
    for strength in (1, np.int32(1), np.float64(1), jnp.array(1), jnp.array(1.0, jnp.bfloat16)):
        assert jaxreg.L1(strength).prox(x).tolist() == expected
    assert jax.jit(lambda s: jaxreg.L1(s).prox(x))(1).tolist() == expected


def test_keras_l2_is_twice_the_strength():
    x = jnp.array([1.0, -2.0])
    keras = 0.1 * jnp.sum(x**2)
    assert jaxreg.L2(0.2).value(x) == pytest.approx(float(keras))


def test_the_derivative_with_respect_to_the_strength_is_that_of_the_formula():
    x = jnp.array([-3.0, 0.25, 2.0])
    derivative = jax.jacobian(lambda s: jaxreg.L1(s).prox(x, 0.5))(1.0)
    assert derivative.tolist() == [0.5, 0.0, -0.5]


def test_one_strength_a_coordinate():
    strength, x = np.array([0.0, 1.0, 2.0]), jnp.array([1.0, -3.0, 1.5])
    for penalty in (jaxreg.L1(strength), jaxreg.L1([0, 1, 2]), jaxreg.L1(jnp.asarray(strength))):
        assert penalty.prox(x).tolist() == [1.0, -2.0, 0.0]
        assert penalty.value(x) == 6.0
        assert penalty.subdiff_distance(jnp.zeros(3), jnp.array([1.0, -1.0, 3.0])).tolist() == [
            1,
            0,
            1,
        ]
        assert penalty.critical_multiplier(jnp.array([0.0, 3.0, 2.0])) == 3.0
        assert penalty.critical_multiplier(jnp.ones(3)) == jnp.inf
    assert jaxreg.NonNegativeL1(strength).prox(x).tolist() == [1.0, 0.0, 0.0]
    mapped = jax.vmap(lambda s: jaxreg.L1(s).prox(x))(jnp.stack([strength, 0 * strength]))
    assert mapped.tolist() == [[1.0, -2.0, 0.0], x.tolist()]


# What peers get wrong --------------------------------------------------------------------------


def objective(penalty, w, z, step):
    return float(penalty.value(w)) + float(((w - z) ** 2).sum()) / (2 * step)


def test_the_ridge_prox_minimizes_the_documented_value(x64):
    penalty, z = jaxreg.L2(3.0), jnp.array([2.0])
    w = penalty.prox(z, 1.0)
    assert w[0] == 0.5
    assert jax.grad(lambda w: penalty.value(w) + ((w - z) ** 2).sum() / 2)(w)[0] == 0


@pytest.mark.parametrize("z", np.linspace(-6, 6, 25))
@pytest.mark.parametrize(
    ("penalty", "step"),
    [
        (jaxreg.SCAD(1.0, a=2.1), 2.0),
        (jaxreg.SCAD(0.5, a=2.1), 30.0),
        (jaxreg.MCP(1.0, gamma=1.2), 4.0),
        (jaxreg.MCP(1.0, gamma=1.2), 1.2),
        (jaxreg.LogSum(2.0, epsilon=0.1), 1.0),
        (jaxreg.LogSum(0.5, epsilon=3.0), 10.0),
    ],
)
def test_far_past_the_concavity_parameter_the_prox_is_the_global_minimizer(penalty, step, z, x64):
    found = objective(penalty, penalty.prox(jnp.array([z]), step), z, step)
    grid = jnp.linspace(-7, 7, 14001)[:, None]
    best = float((jax.vmap(penalty.value)(grid) + (grid[:, 0] - z) ** 2 / (2 * step)).min())
    assert found <= best + 1e-12


def test_block_soft_thresholding_has_no_nan_at_zero_with_strength_zero():
    zero = jnp.zeros((3, 2))
    for penalty in (jaxreg.GroupLasso(0.0), jaxreg.L2Norm(0.0), jaxreg.SparseGroupLasso(0.0, 0.0)):
        for step in (1.0, jnp.ones((3, 2)), jnp.zeros((3, 2))):
            assert (penalty.prox(zero, step) == 0).all()
            assert jnp.isfinite(jax.jacobian(penalty.prox)(zero, step)).all()
        assert jnp.isfinite(jax.grad(penalty.value)(zero)).all()


def test_a_traced_or_integer_strength_broadcasts_over_groups():
    x = jnp.array([[3.0, 0.1], [4.0, 0.1]])
    expected = [[1.5, 0.0], [2.0, 0.0]]
    prox = jax.jit(lambda s: jaxreg.GroupLasso(s, weights=jnp.array([2.5, 1.0])).prox(x))
    for strength in (1, 1.0, np.int32(1), jnp.float32(1)):
        np.testing.assert_allclose(prox(strength), expected, rtol=1e-6)
        eager = jaxreg.GroupLasso(strength, weights=[2.5, 1.0]).prox(x)
        np.testing.assert_allclose(eager, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "ball"),
    [
        (jaxreg.L1(0.7), jaxreg.LInfBall(0.7)),
        (jaxreg.LInf(0.7), jaxreg.L1Ball(0.7)),
        (jaxreg.L2Norm(0.7), jaxreg.L2Ball(0.7)),
    ],
)
def test_a_norm_and_the_ball_of_its_dual_add_up(norm, ball, x64):
    """Moreau: prox_R(x) + projection on the dual ball = x; the two are written independently."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=50))
    chex.assert_trees_all_close(norm.prox(x) + ball.prox(x), x, atol=1e-14)


# Algebra ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "shown"),
    [
        (jaxreg.L1(0.1) + jaxreg.L1(0.2), "L1(0.30000000000000004)"),
        (jaxreg.L1(0.1) + jaxreg.L2(0.2), "ElasticNet(0.1, 0.2)"),
        (jaxreg.L2(0.2) + jaxreg.L1(0.1), "ElasticNet(0.1, 0.2)"),
        (jaxreg.ElasticNet(0.1, 0.2) + jaxreg.L2(0.5), "ElasticNet(0.1, 0.7)"),
        (jaxreg.NonNegative() + jaxreg.L1(0.1), "NonNegativeL1(0.1)"),
        (jaxreg.Box(-1, 3) + jaxreg.LInfBall(2), "Box(-1.0, 2.0)"),
        (jaxreg.Box(-1, 3) + jaxreg.NonNegative(), "Box(0.0, 3.0)"),
        (jaxreg.L1(0.1) + jaxreg.GroupLasso(0.2), "SparseGroupLasso(0.1, 0.2)"),
        (jaxreg.L1(0.1) + jaxreg.TotalVariation(0.2, axis=0), "FusedLasso(0.1, 0.2, axis=0)"),
        (jaxreg.Huber(0.1) + jaxreg.Box(0, 1), "Huber(0.1) + Box(0.0, 1.0)"),
        (jaxreg.MCP(0.1) + jaxreg.L2(0.5), "MCP(0.1) + L2(0.5)"),
        (2 * jaxreg.L1(0.1), "L1(0.2)"),
        (np.float64(2) * jaxreg.ElasticNet(0.1, 0.2), "ElasticNet(0.2, 0.4)"),
        (jaxreg.MCP(0.1) * 2, "2.0 * MCP(0.1)"),
        (3 * jaxreg.Box(0, 1), "Box(0.0, 1.0)"),
        (2 * jaxreg.L1(0.1).on("a/**"), "L1(0.2).on(where.path('a/**'))"),
    ],
)
def test_sums_and_multiples_are_of_the_simplest_class(total, shown):
    assert repr(total) == shown


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (jaxreg.Huber(0.5), jaxreg.Box(-0.2, 1.0)),
        (jaxreg.ElasticNet(0.3, 0.4), jaxreg.NonNegative()),
        (jaxreg.L1(0.4), jaxreg.Box(0.5, 1.5)),
        (jaxreg.GroupLasso(0.3), jaxreg.NonNegative()),
        (jaxreg.SparseGroupLasso(0.2, 0.3), jaxreg.NonNegative()),
        (jaxreg.L2Norm(0.6), jaxreg.NonNegative()),
        (jaxreg.L1(0.2), jaxreg.GroupLasso(0.3)),
        (jaxreg.L1(np.linspace(0, 1, 12).reshape(4, 3)), jaxreg.L2(0.5)),
        (jaxreg.TotalVariation(0.4, axis=0), jaxreg.Box(-0.5, 0.5)),
        (jaxreg.FusedLasso(0.1, 0.4, axis=0), jaxreg.NonNegative()),
    ],
)
def test_the_prox_of_a_sum_is_that_of_both(a, b, x64):
    """Douglas-Rachford splitting, which knows the two proxes alone, is the oracle."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    total = a + b
    for step in [0.5, 5.0] + ([jnp.exp(x[::-1])] if total.elementwise_step else []):
        own = 1 / (1 / step + 1.0)  # a, with the distance to x as a part of it, at step 1

        def with_distance(z, step=step, own=own):
            return a.prox(own * (x / step + z), own)

        def iterate(_, z):
            w = b.prox(z, jnp.ones_like(x) if b.elementwise_step else 1.0)
            return z + with_distance(2 * w - z) - w

        z = jax.lax.fori_loop(0, 3000, iterate, jnp.zeros_like(x))
        w = b.prox(z)
        chex.assert_trees_all_close(total.prox(x, step), w, atol=1e-9)
        np.testing.assert_allclose(total.value(w), a.value(w) + b.value(w), rtol=1e-9)


@pytest.mark.parametrize(
    "parts",
    [
        (jaxreg.L1(0.1), jaxreg.GroupLasso(0.2), jaxreg.L2(0.3)),
        (jaxreg.L1(0.1), jaxreg.TotalVariation(0.2), jaxreg.L2(0.3)),
        (jaxreg.L1(0.1), jaxreg.Box(-1, 1), jaxreg.L2(0.3)),
        (jaxreg.L1(0.1), jaxreg.GroupLasso(0.2), jaxreg.NonNegative()),
        (jaxreg.L1(0.1), jaxreg.L1(0.2), jaxreg.Huber(0.1)),
    ],
)
def test_the_order_of_a_sum_does_not_matter(parts):
    totals = set()
    for a, b, c in itertools.permutations(parts):
        for make in (lambda a, b, c: (a + b) + c, lambda a, b, c: a + (b + c)):
            try:
                totals.add(re.sub(r"0\.30000\d+", "0.3", repr(make(a, b, c))))
            except ValueError as error:
                totals.add(type(error).__name__)
    assert len(totals) == 1


def test_bounds_that_are_nonnegativity_are_that():
    total = jaxreg.GroupLasso(0.1) + jaxreg.Box(0.0, jnp.inf)
    x = jnp.array([[-1.0, 2.0], [3.0, -1.0]])
    chex.assert_trees_all_equal(
        total.prox(x), (jaxreg.GroupLasso(0.1) + jaxreg.NonNegative()).prox(x)
    )


def test_the_radius_of_a_ball_has_a_derivative_in_any_metric(x64):
    x = jnp.arange(12.0).reshape(4, 3) / 5 - 1
    for make in (jaxreg.L2Ball, jaxreg.MaxNorm, jaxreg.L1Ball):

        def total(radius, make=make):
            return jnp.sum(jnp.sin(make(radius).prox(x, jnp.abs(x) + 0.1)))

        expected = (total(0.5 + 1e-6) - total(0.5 - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(total)(0.5), expected, rtol=1e-6)


def test_a_bounded_penalty_has_its_own_subdifferential_and_critical_multiplier(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    for total in (jaxreg.Huber(0.5) + jaxreg.Box(-0.2, 1.0), jaxreg.L1(0.3) + jaxreg.Box(-1, 0)):
        w = total.prox(x, 0.7)
        chex.assert_trees_all_close(
            total.subdiff_distance(w, (w - x) / 0.7), jnp.zeros((4, 3)), atol=1e-12
        )
        assert (total.subdiff_distance(w, (w - x) / 0.7 + 9.0) > 0).any()
        assert jnp.isinf(total.subdiff_distance(w + 5, x)).all()
    held = jaxreg.L1(0.5) + jaxreg.Box(-1, 0)  # only a positive gradient can move 0
    assert held.critical_multiplier(jnp.array([-9.0, 1.0])) == 2.0
    assert (jaxreg.L1(0.5) + jaxreg.Box(1, 2)).critical_multiplier(jnp.ones(2)) == jnp.inf


def test_a_multiple_has_its_own_subdifferential(x64):
    for multiple, c in ((2.5 * jaxreg.MCP(0.4), 2.5), (0 * jaxreg.SCAD(0.4), 0.0)):
        x = jnp.array([0.0, 0.3, 2.0])
        w = multiple.prox(x, 0.7)
        assert jnp.abs(multiple.subdiff_distance(w, (w - x) / 0.7)).max() < 1e-12
        np.testing.assert_allclose(multiple.value(x), c * multiple.penalty.value(x))


def test_a_sum_without_a_closed_form_is_refused():
    for a, b in (
        (jaxreg.GroupLasso(0.1), jaxreg.L2Norm(0.1)),
        (jaxreg.MCP(0.1), jaxreg.L1(0.1)),
        (jaxreg.L1Ball(1.0), jaxreg.L1(0.1)),
        (jaxreg.GroupLasso(0.1), jaxreg.GroupLasso(0.1, groups=1)),
    ):
        with pytest.raises(
            ValueError, match="penalty: got .* no closed form; accepted: any penalty"
        ):
            _ = a + b
    with pytest.raises(ValueError, match=r"accepted: penalties for the same leaves: call \.on"):
        _ = jaxreg.L1(0.1).on("a/**") + jaxreg.L2(0.1)
    with pytest.raises(TypeError):
        _ = jaxreg.L1(0.1) + 1


def test_multiples_and_sums_take_traced_numbers():
    x = jnp.array([-2.0, 0.5, 3.0])

    def prox(c):
        return ((c * jaxreg.MCP(0.5)) + jaxreg.L2(c)).prox(x)

    chex.assert_trees_all_close(jax.jit(prox)(2.0), prox(2.0))
    assert jnp.isfinite(jax.jacobian(prox)(2.0)).all()


# The range of the dtypes -----------------------------------------------------------------------


def test_norms_whose_squares_overflow_or_underflow():
    huge, tiny = jnp.array([3e20, 4e20]), jnp.array([3e-25, 4e-25])
    np.testing.assert_allclose(jaxreg.L2Norm(1.0).prox(huge), huge)
    np.testing.assert_allclose(jaxreg.L2Norm(1.0).prox(huge, jnp.ones(2)), huge)
    np.testing.assert_allclose(jaxreg.L2Ball(1.0).prox(huge), [0.6, 0.8], rtol=1e-6)
    for same in (jaxreg.L2Norm(1.0).prox(tiny, 0.0), jaxreg.L2Norm(0.0).prox(tiny)):
        assert same.tolist() == tiny.tolist()
    small = jaxreg.GroupLasso(1.0, groups=groups.whole, weights=1.0)
    distance = small.subdiff_distance(jnp.full(4, 1e-23), jnp.zeros(4))
    np.testing.assert_allclose(distance, np.full(4, 0.5), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-14, 1e-5, 1e5, 1e13, 1e20, 1e36])
def test_group_norms_in_a_diagonal_metric_in_the_whole_range(scale):
    x, step = jnp.array([1.0, 2.0, -3.0]), jnp.array([1.0, 2.0, 3.0])
    lasso = jaxreg.GroupLasso(0.3, groups=groups.whole, weights=1.0)
    scaled = jax.jit(lasso.prox)(scale * x, scale * step) / scale
    np.testing.assert_allclose(scaled, lasso.prox(x, step), rtol=1e-5)
    for ball in (jaxreg.L2Ball(scale / 4), jaxreg.MaxNorm(scale / 4, groups=groups.whole)):
        unit = dataclasses.replace(ball, radius=0.25)
        np.testing.assert_allclose(
            jax.jit(ball.prox)(scale * x, step) / scale, unit.prox(x, step), rtol=1e-5
        )


@pytest.mark.parametrize("scale", [1e5, 1e13, 1e20, 1e36])
def test_a_ball_far_from_the_point_in_a_diagonal_metric(scale):
    """Far out the projection is in proportion to x / step."""
    step = jnp.array([1.0, 2.0, 4.0])
    found = jax.jit(jaxreg.L2Ball(1.0).prox)(scale * step, step)
    np.testing.assert_allclose(found, np.full(3, 3**-0.5), rtol=2e-5)


def test_a_zero_coordinate_of_a_group_has_the_derivative_of_the_others():
    lasso = jaxreg.GroupLasso(0.3, groups=groups.whole, weights=1.0)
    x = jnp.array([0.0, 1.0, 2.0])
    chex.assert_trees_all_close(
        jax.jacobian(lasso.prox)(x, jnp.ones(3)), jax.jacobian(lasso.prox)(x, 1.0), rtol=1e-5
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("step", [1.0, np.array([1.0, 2.0, 3.0])], ids=["scalar", "elementwise"])
def test_what_is_not_finite_does_not_become_zero_in_a_group(bad, step):
    lasso = jaxreg.GroupLasso(0.3, groups=groups.whole, weights=1.0)
    assert np.isnan(lasso.prox(jnp.array([bad, 1.0, 2.0]), step)).any()


def test_separable_proxes_in_the_whole_range():
    huge, tiny = jnp.array([1e19, 1e28, 1e37]), jnp.array([3e-32, 3e-25])
    for penalty in (jaxreg.LogSum(1.0), jaxreg.LTwoThirds(1.0), jaxreg.LHalf(1.0), jaxreg.MCP(1.0)):
        np.testing.assert_allclose(penalty.prox(huge), huge, rtol=1e-6)
    for make in (
        jaxreg.L0,
        jaxreg.LHalf,
        jaxreg.LTwoThirds,
        jaxreg.MCP,
        jaxreg.SCAD,
        jaxreg.LogSum,
    ):
        assert make(0.0).prox(tiny, 30.0).tolist() == tiny.tolist()
        assert make(1.0).prox(tiny, 0.0).tolist() == tiny.tolist()


def test_one_huge_step_leaves_other_groups_alone(x64):
    """Adam's gain is 1e8 and more where a gradient is nearly 0."""
    x, step = np.array([[3.0, 1.0], [2.0, 1.0]]), np.array([[0.01, 0.02], [0.02, 1e10]])
    for make in (
        lambda: jaxreg.LInf(0.5, groups=0),
        lambda: jaxreg.L1Ball(0.5, groups=0),
        lambda: jaxreg.MaxNorm(0.5),
    ):
        both = make().prox(np.float32(x), np.float32(step))
        alone = make().prox(x[:, :1], step[:, :1])
        np.testing.assert_allclose(both[:, :1], alone, rtol=1e-5)


def test_a_coordinate_of_step_zero_stays():
    assert jaxreg.TopK(1).prox(jnp.array([1e-4, 1.0]), jnp.array([0.0, 1.0])).tolist()[1] == 0
    assert jaxreg.LInf(0.5).prox(jnp.array([10.0, 1.0]), jnp.array([0.0, 1e8]))[0] == 10.0


def test_zero_is_critical_for_linear_constraints_up_to_rounding():
    plane = jaxreg.Affine(np.ones((1, 3)), [0.0])
    assert plane.critical_multiplier(jnp.full(3, 0.3)) == 0
    assert plane.critical_multiplier(jnp.array([0.3, 0.3, 0.2])) == jnp.inf
    normal = jnp.array([0.1, 0.3, 0.7])
    assert jaxreg.HalfSpace(normal, 0.0).critical_multiplier(-0.37 * normal) == 0
    assert jaxreg.HalfSpace(normal, 0.0).critical_multiplier(0.37 * normal) == jnp.inf


def test_critical_multipliers_have_derivatives_in_reverse_mode(x64):
    grad = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))

    def critical(s):
        return jaxreg.SparseGroupLasso(s, 1.0).critical_multiplier(grad)

    expected = (critical(0.5 + 1e-6) - critical(0.5 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(critical)(0.5), expected, rtol=1e-6)


def test_groups_survive_pickling():
    penalty = jaxreg.GroupLasso(0.1, groups=groups.ids([0, 1, 0]))
    again = pickle.loads(pickle.dumps(penalty))
    assert again.groups == penalty.groups
    assert jax.tree.structure(again) == jax.tree.structure(penalty)


def test_zero_times_a_bounded_penalty_keeps_its_bounds():
    bounded = jaxreg.Huber(1.0) + jaxreg.Box(0, 1)
    assert repr(0 * bounded) == "Huber(0.0) + Box(0.0, 1.0)"
    assert repr(2 * (jaxreg.MCP(0.1) + jaxreg.L2(0.5))) == "2.0 * MCP(0.1) + L2(1.0)"
    assert repr(bounded.on("a/**")) == "(Huber(1.0) + Box(0.0, 1.0)).on(where.path('a/**'))"


def test_sums_check_their_parts():
    with pytest.raises(ValueError, match="strength: got arrays of shape .*accepted: scalars, or"):
        _ = jaxreg.L1(np.ones((4, 3))) + jaxreg.L1(np.ones(3))
    with pytest.raises(ValueError, match="penalty: got .*no direct form; accepted: the penalty"):
        (jaxreg.TotalVariation(1.0) + jaxreg.NonNegative()).critical_multiplier(jnp.ones(3))
    with pytest.raises(ValueError, match="step: got 0.0; accepted: numbers > 0"):
        jaxreg.L1(0.1).residual(jnp.ones(2), jnp.ones(2), 0.0)


def test_a_maximum_that_is_tied_up_to_rounding_is_stationary():
    """Optimizers leave tied coordinates an ulp apart."""
    w = jnp.array([np.nextafter(np.float32(0.3), np.float32(1)), 0.3])
    distance = jaxreg.LInf(1.0).subdiff_distance(w, jnp.array([-0.5, -0.5]))
    chex.assert_trees_all_close(distance, jnp.zeros(2), atol=1e-6)


@pytest.mark.parametrize("ball", [jaxreg.Simplex(1.0), jaxreg.L1Ball(1.0)], ids=repr)
def test_a_metric_projection_from_far_away_is_in_the_set(ball):
    """Where the point is much larger than the set, the level times the step is rounded."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, step = 1000 * rng.normal(size=6), rng.uniform(0.1, 3, 6)
        assert ball.value(ball.prox(np.float32(x), np.float32(step))) == 0


@pytest.mark.parametrize("step", [[-1.0, 1.0, 1.0], [float("nan"), 1.0, 1.0]])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_an_elementwise_step_that_is_not_positive_is_refused(step, array):
    with pytest.raises(ValueError, match=f"step: got an array that holds {step[0]}"):
        jaxreg.L1(0.1).prox(jnp.ones(3), array(step))


def test_a_joint_penalty_and_a_square_add_up():
    layer = {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.1]]), "bias": jnp.array([0.0, 0.2])}
    members = {"kernel": 0, "bias": ()}
    both = jaxreg.Joint(jaxreg.GroupLasso(0.5), members) + jaxreg.L2(0.1)
    inside = jaxreg.Joint(jaxreg.GroupLasso(0.5) + jaxreg.L2(0.1), members)
    chex.assert_trees_all_equal(both.prox(layer, 0.3), inside.prox(layer, 0.3))


def test_ids_are_no_overlapping_groups():
    with pytest.raises(ValueError, match="groups: got no indices: .*each a sequence"):
        jaxreg.OverlappingGroupLasso(0.1, np.array([0, 1, 1]))


def test_a_penalty_is_shown_as_it_can_be_written():
    for penalty in (
        jaxreg.GroupLasso(0.1, groups=0, weights=2.0),
        jaxreg.SortedL1(0.5, q=0.2),
        jaxreg.NM(2, 4, axis=0),
        jaxreg.Box(0, 1),
    ):
        again = eval(repr(penalty), vars(jaxreg))
        assert repr(again) == repr(penalty)
