"""The latent overlapping group lasso: against closed forms, a conic solver and its own KKT."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import message
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg._check import ArgumentError
from jaxreg.penalties.overlapping import OverlappingGroupLasso

COVERS = {
    "chain": [range(i, i + 4) for i in range(0, 9, 2)],
    "nested": [range(12), range(6), range(3), [0]],
    "identical": [range(7), range(7), range(4, 12), range(4, 12)],
    "tree": [
        [j for j in range(12) if any((j + 1) >> k == i + 1 for k in range(4))] for i in range(12)
    ],
    "ancestors": [
        [j for j in range(12) if any((i + 1) >> k == j + 1 for k in range(4))] for i in range(12)
    ],
    "pairs": [[i, j] for i in range(12) for j in range(i)],
    "disjoint": [range(5), [11, 5, 7], [6, 8, 9, 10]],
}
STEPS = (0.1, 1.0, 30.0)
each_cover = pytest.mark.parametrize("groups", COVERS.values(), ids=COVERS.keys())


def sample(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=12)
    x[3] = 0.0
    return x


def steps(seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed + 100).normal(size=12))


def certificate(penalty: OverlappingGroupLasso, x, w, step) -> float:
    """How far w is from the prox: u = (x - w) / step is in the dual ball and u'w = R(w)."""
    groups, s = penalty.groups.groups, float(penalty.strength)
    weights = penalty.groups.weights if penalty.weights is None else np.asarray(penalty.weights)
    u = (np.asarray(x) - np.asarray(w)) / step
    outside = max(np.linalg.norm(u[g]) / (s * a) - 1 for g, a in zip(groups, weights, strict=True))
    value = float(penalty.value(w))
    return max(outside, abs(u @ np.asarray(w) - value) / max(value, 1e-12))


def conic(groups, weights, x, strength, step=None):
    """The value at x, or the prox of x and its objective, with the latent parts as variables."""
    cp = pytest.importorskip("cvxpy")
    parts = [cp.Variable(len(list(g))) for g in groups]
    places = [np.eye(12)[:, list(g)] for g in groups]
    total = sum(place @ part for place, part in zip(places, parts, strict=True))
    norms = sum(a * cp.norm(part) for a, part in zip(weights, parts, strict=True))
    if step is None:
        return cp.Problem(cp.Minimize(strength * norms), [total == x]).solve(solver="CLARABEL")
    fit = cp.sum(cp.multiply(1 / (2 * step * np.ones(12)), cp.square(total - x)))
    problem = cp.Problem(cp.Minimize(strength * norms + fit))
    return problem.solve(solver="CLARABEL"), total.value


@each_cover
def test_value_and_prox_agree_with_a_conic_solver(groups, x64):
    weights = np.random.default_rng(1).uniform(0.5, 2, len(groups))
    penalty, x = OverlappingGroupLasso(0.3, groups, weights), sample()
    np.testing.assert_allclose(penalty.value(x), conic(groups, weights, x, 0.3), rtol=1e-6)
    for step in (0.3, 3.0, steps()):
        best, there = conic(groups, weights, x, 0.3, step)
        w = np.asarray(penalty.prox(x, step))
        assert penalty.value(w) + np.sum((w - x) ** 2 / (2 * step)) <= best + 1e-9
        np.testing.assert_allclose(w, there, atol=1e-3)


@each_cover
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_prox_meets_the_optimality_conditions(groups, size, x64):
    for strength in (0.3, 2.0):
        penalty = OverlappingGroupLasso(strength, groups)
        for step in (0.01, *STEPS, steps()):
            for seed in range(3):
                x = jnp.asarray(size * sample(seed))
                w = penalty.prox(x, step)
                # u = (x - w) / step loses digits where w is near x; the dual has them all.
                lost = 1e-15 * size / (np.min(step) * strength)
                assert certificate(penalty, x, w, step) <= 1e-12 + lost


@each_cover
def test_the_residual_is_zero_at_a_stationary_point_and_not_elsewhere(groups, x64):
    penalty = OverlappingGroupLasso(0.3, groups)
    for step in (*STEPS, steps()):
        x = jnp.asarray(sample())
        w = penalty.prox(x, step)
        grad = (w - x) / step
        for other in (0.01, 1.0, 50.0):
            chex.assert_trees_all_close(penalty.residual(w, grad, other), jnp.zeros(12), atol=1e-12)
    assert jnp.abs(penalty.residual(x, -5 * jnp.ones(12), 1e-3)).min() > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_disjoint_groups_have_the_closed_form(seed, x64):
    groups = COVERS["disjoint"]
    x, step = sample(seed), 0.7
    expected, value = np.zeros(12), 0.0
    for group in map(list, groups):
        norm, a = np.linalg.norm(x[group]), 0.5 * len(group) ** 0.5
        expected[group] = x[group] * max(1 - step * a / norm, 0)
        value += a * norm
    penalty = OverlappingGroupLasso(0.5, groups)
    np.testing.assert_allclose(penalty.prox(x, step), expected, rtol=1e-13)
    np.testing.assert_allclose(penalty.value(x), value, rtol=1e-13)


@each_cover
def test_value_is_between_a_dual_and_a_primal_bound_that_meet(groups, x64):
    """R(x) >= u'x for any u in the dual ball, and <= the norms of any parts that add up to x."""
    penalty, x = OverlappingGroupLasso(1.0, groups), sample()
    value, u = jax.value_and_grad(penalty.value)(jnp.asarray(x))
    assert certificate(penalty, x + np.asarray(u), x, 1.0) <= 1e-12
    for seed in range(5):
        parts = np.zeros((len(groups), 12))
        share = np.random.default_rng(seed).uniform(size=(len(groups), 12))
        for part, group in zip(parts, groups, strict=True):
            part[list(group)] = 1
        parts *= share
        parts *= x / parts.sum(0)
        assert value <= np.sum(penalty.groups.weights * np.linalg.norm(parts, axis=1)) + 1e-12


@each_cover
def test_value_is_homogeneous_and_its_gradient_zero_at_zero(groups, x64):
    penalty, x = OverlappingGroupLasso(0.7, groups), jnp.asarray(sample())
    for size in (1e-100, 1e-3, 1e3, 1e100):
        np.testing.assert_allclose(penalty.value(size * x), size * penalty.value(x), rtol=1e-12)
    zero = jnp.zeros(12)
    assert penalty.value(zero) == 0
    assert jax.grad(penalty.value)(zero).tolist() == [0.0] * 12


@each_cover
def test_strength_zero_and_step_zero_are_the_identity(groups):
    x = jnp.asarray(sample(), jnp.float32)
    some = jnp.where(jnp.arange(12) % 2 == 0, 0.0, 3.0)
    chex.assert_trees_all_equal(OverlappingGroupLasso(0, groups).prox(x, 3.0), x)
    chex.assert_trees_all_equal(OverlappingGroupLasso(0.5, groups).prox(x, 0.0), x)
    w = OverlappingGroupLasso(0.5, groups).prox(x, some)
    assert w[::2].tolist() == x[::2].tolist()
    assert OverlappingGroupLasso(0, groups).value(x) == 0


def test_zeros_are_exact_and_the_support_is_a_union_of_groups(x64):
    groups, x = COVERS["chain"], jnp.asarray(np.r_[3.0, 2, 1, -1, 0.3, 0.2, 0.1, -0.3, 2, 2, 2, 2])
    w = OverlappingGroupLasso(1.0, groups).prox(x)
    assert (np.asarray(w) != 0).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert (OverlappingGroupLasso(10.0, groups).prox(x, steps()) == 0).all()


def test_a_group_at_its_threshold_is_zero_to_rounding(x64):
    penalty = OverlappingGroupLasso(1.0, [[0, 1], [1, 2]], jnp.array([5.0, 1e3]))
    assert jnp.abs(penalty.prox(jnp.array([3.0, 4.0, 0.0]))).max() <= 1e-14
    assert jnp.isfinite(jax.jacobian(penalty.prox)(jnp.array([3.0, 4.0, 0.0]))).all()


@each_cover
def test_the_critical_multiplier_is_where_zero_becomes_the_solution(groups, x64):
    penalty, grad = OverlappingGroupLasso(0.5, groups), jnp.asarray(sample())
    critical = penalty.critical_multiplier(grad)
    assert not (1.0001 * critical * penalty).prox(-grad).any()
    assert (0.9999 * critical * penalty).prox(-grad).any()
    assert penalty.critical_multiplier(jnp.zeros(12)) == 0
    assert OverlappingGroupLasso(0, groups).critical_multiplier(grad) == jnp.inf
    slope = jax.grad(penalty.critical_multiplier)
    chex.assert_tree_all_finite((slope(jnp.zeros(12)), slope(grad)))


@pytest.mark.parametrize("name", ["chain", "identical", "pairs"])
@pytest.mark.parametrize("step", [0.5, steps()], ids=["scalar step", "elementwise step"])
def test_derivatives_agree_with_finite_differences(name, step, x64):
    groups, r, h = COVERS[name], np.random.default_rng(5), 1e-6

    @jax.jit
    def outputs(*args):
        x, step, strength, weights = args
        penalty = OverlappingGroupLasso(strength, groups, weights)
        return penalty.prox(x, step), *jax.value_and_grad(penalty.value)(x)

    weights = jnp.asarray(r.uniform(0.7, 1.5, len(groups)))
    args = (jnp.asarray(sample()), jnp.asarray(step), jnp.asarray(0.4), weights)
    forward = jax.jit(lambda moves: jax.jvp(outputs, args, moves)[1])
    reverse = jax.jit(lambda sums: jax.vjp(outputs, *args)[1](sums))
    for k in range(4):
        # Not along a coordinate that is 0, where R has a kink.
        move = [np.where(a == 0, 0, (i == k) * r.normal(size=a.shape)) for i, a in enumerate(args)]
        exact = forward(tuple(move))
        above = outputs(*(a + h * m for a, m in zip(args, move, strict=True)))
        below = outputs(*(a - h * m for a, m in zip(args, move, strict=True)))
        for tangent, up, down in zip(exact, above, below, strict=True):
            np.testing.assert_allclose(tangent, (up - down) / (2 * h), atol=1e-7)
        back = reverse(jax.tree.map(jnp.ones_like, exact))
        found = sum(np.sum(b * m) for b, m in zip(back, move, strict=True))
        np.testing.assert_allclose(found, sum(float(jnp.sum(t)) for t in exact), atol=1e-9)


@pytest.mark.parametrize("name", ["chain", "nested", "identical"])
def test_gradients_are_finite_at_zero_at_step_zero_and_at_strength_zero(name):
    groups = COVERS[name]

    def total(x, step, strength, weights):
        penalty = OverlappingGroupLasso(strength, groups, weights)
        return jnp.sum(penalty.prox(x, step)) + penalty.value(x)

    gradient = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    one = jnp.zeros(12).at[2].set(1.0)
    for x in (jnp.zeros(12), one, jnp.asarray(sample(), jnp.float32), jnp.ones(12)):
        for step in (0.0, 1.0, jnp.where(jnp.arange(12) % 3 == 0, 0.0, 2.0)):
            for strength in (0.0, 0.5):
                args = (x, jnp.asarray(step), strength, jnp.ones(len(groups)))
                chex.assert_tree_all_finite(gradient(*args))


@each_cover
def test_float32_and_bfloat16_agree_with_float64(groups, x64):
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)):
        for seed in range(3):
            x = jnp.asarray(sample(seed), dtype)
            penalty = OverlappingGroupLasso(0.3, groups)
            for step in (0.1, 1.0, 3.0, np.float32(steps())):
                exact = penalty.prox(x.astype(jnp.float64), step)
                assert penalty.prox(x, step).dtype == dtype
                error = jnp.abs(penalty.prox(x, step).astype(jnp.float64) - exact).max()
                assert error <= tolerance * max(1.0, float(jnp.abs(exact).max()))


@pytest.mark.usefixtures("strict")
def test_vmap_and_jit_equal_a_loop_and_keep_shape_and_dtype():
    groups = COVERS["chain"]
    x = jnp.asarray(sample().reshape(4, 3), jnp.float32)
    xs = jnp.stack([x, 2 * x, jnp.zeros((4, 3), jnp.float32)])
    strengths = jnp.asarray([0.25, 0.5, 0.0], jnp.float32)

    def both(strength, x):
        penalty = OverlappingGroupLasso(strength, groups)
        return penalty.prox(x, jnp.float32(0.5)), penalty.value(x)

    looped = [both(s, x) for s, x in zip(strengths, xs, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    chex.assert_trees_all_close(jax.vmap(both)(strengths, xs), stacked, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.jit(both)(strengths[0], x), looped[0], rtol=1e-6)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        out, value = both(strengths[0], x.astype(dtype))
        assert (out.dtype, out.shape, value.dtype) == (dtype, (4, 3), jnp.float32)


def test_an_empty_array_has_no_groups():
    penalty = OverlappingGroupLasso(0.5, [])
    x = jnp.zeros((2, 0, 3))
    assert penalty.prox(x).shape == (2, 0, 3)
    assert penalty.value(x) == penalty.critical_multiplier(x) == 0
    assert jax.grad(penalty.value)(x).shape == x.shape


def test_lowers_for_tpu_and_cuda_and_is_traced_once():
    chex.clear_trace_counter()

    def prox(penalty, x):
        return penalty.prox(x, 0.5) + penalty.value(x)

    once = jax.jit(chex.assert_max_traces(prox, n=1))
    for strength in (0.1, 0.2):  # groups written alike are equal
        once(OverlappingGroupLasso(strength, [[0, 1], [2, 1]]), jnp.ones(3))
    exported = export.export(jax.jit(prox), platforms=("tpu", "cuda"))(
        OverlappingGroupLasso(0.1, [[0, 1], [1, 2]]), jnp.ones(3)
    )
    assert set(exported.platforms) == {"tpu", "cuda"}


@pytest.mark.parametrize("shape", [(), (64,)], ids=["scalar step", "elementwise step"])
def test_a_sharded_array_keeps_its_sharding(shape):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jnp.linspace(-2, 2, 64)
    step = jnp.full(shape, 0.5)
    penalty = OverlappingGroupLasso(0.5, [range(i, i + 16) for i in range(0, 49, 8)])
    compiled = jax.jit(penalty.prox).lower(jax.device_put(x, sharding), step)
    compiled = compiled.compile()
    out = compiled(jax.device_put(x, sharding), step)
    assert out.sharding.is_equivalent_to(sharding, 1)
    chex.assert_trees_all_close(out, penalty.prox(x, step), rtol=1e-6, atol=1e-6)
    found = set(
        re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text())
    )
    assert found <= {"all-reduce", "all-gather"}


def test_two_hundred_groups_in_a_chain_converge(x64):
    groups = [range(5 * i, min(5 * i + 8, 1000)) for i in range(200)]
    r = np.random.default_rng(0)
    penalty = OverlappingGroupLasso(1.0, groups)
    x = jnp.asarray(r.normal(size=1000))
    for step in (0.1, 1.0, 0.5 * np.exp(r.normal(size=1000))):
        assert certificate(penalty, x, penalty.prox(x, step), step) <= 1e-12


@pytest.mark.parametrize(
    ("groups", "given"),
    [
        ([[0, 1], []], "an empty group"),
        ([[0, 1, 1]], "an index twice"),
        ([[0, -1]], "a negative index"),
        ([[0.0, 1.0]], "no indices"),
        ([[True, False]], "no indices"),
        ([[0, [1]]], "no indices"),
        ([0, 1], "no indices"),
        (3, "3"),
        ("ab", "'ab'"),
        ([[0, 1], [3]], "without 2"),
    ],
)
def test_bad_groups_are_refused_by_name(groups, given):
    with pytest.raises(ArgumentError, match="^groups: got ") as error:
        OverlappingGroupLasso(0.5, groups)
    assert given in message(error)


def test_groups_that_do_not_cover_x_are_refused_when_traced():
    penalty = OverlappingGroupLasso(0.5, [[0, 1], [1, 2]])
    for size in (2, 4):
        with pytest.raises(ArgumentError, match=f"^groups: got .*cover the {size} coord") as error:
            jax.eval_shape(penalty.prox, jnp.ones(size))
        message(error)
    with pytest.raises(ArgumentError, match="^groups: got no indices"):
        jax.jit(lambda g: OverlappingGroupLasso(0.5, [g]).value(jnp.ones(2)))(jnp.arange(2))


@pytest.mark.parametrize("bad", [0.0, -1.0, [1.0, 0.0], [1.0, float("nan")], "one"])
def test_weights_that_are_not_positive_are_refused(bad):
    with pytest.raises(ArgumentError, match="^weights: got ") as error:
        OverlappingGroupLasso(0.5, [[0, 1], [1, 2]], bad)
    message(error)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ArgumentError, match=r"^weights: got .*accepted: a scalar, or .*\(2,\)"):
        OverlappingGroupLasso(0.5, [[0, 1], [1, 2]], [1.0, 1.0, 1.0]).prox(jnp.ones(3))


def test_the_repr_shows_small_groups_and_counts_large_ones():
    assert repr(OverlappingGroupLasso(0.5, [[1, 0], [1, 2]])) == (
        "OverlappingGroupLasso(0.5, [[0, 1], [1, 2]])"
    )
    assert "<2 groups of 30 coordinates>" in repr(OverlappingGroupLasso(0.5, [range(30)] * 2))
