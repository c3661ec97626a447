"""Laws: what holds for every regularizer. Each runs on every row of cases.py it applies to."""

import re

import chex
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
from scipy.optimize import minimize_scalar

import jaxreg

pytestmark = pytest.mark.core

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_penalty = pytest.mark.parametrize("case", PENALTIES, ids=lambda case: case.name)
every_transform = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.name)

STEPS = (0.0, 0.1, 1.0, 30.0)
few = settings(max_examples=25, deadline=None)


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
    if case.name != "NonNegative":  # the one that has no strength
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(*outputs[:2])


@every
def test_jit_equals_eager(case: Case):
    chex.assert_trees_all_close(
        jax.jit(case.call)(0.5, sample()), case.call(0.5, sample()), rtol=1e-6, atol=1e-7
    )


@every
def test_vmap_over_the_strength_equals_a_loop(case: Case):
    strengths = jnp.array(case.strengths)
    mapped = jax.vmap(case.call, in_axes=(0, None))(strengths, sample())
    looped = [case.call(s, sample()) for s in case.strengths]
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

    for x in (sample(), jnp.zeros((4, 3))):
        chex.assert_tree_all_finite(jax.grad(total, argnums=(0, 1))(0.5, x))


# The others hold one of optax's own directions, which break under strict promotion.
OURS = [c for c in CASES if c.name not in ("prox_adam", "prox_sgd", "proximal", "regularize")]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_works_under_strict_promotion(case: Case, dtype):
    outputs = case.call(jnp.float32(0.5), sample(dtype))
    chex.assert_tree_all_finite(outputs)


# The mask of dropout is drawn in float32 for every dtype (test_noise.py compares the values), and
# optax's bias correction 1 - b2**count has a relative error of 1e-5 in float32.
EXACT = [c for c in CASES if c.name not in ("dropout", "prox_adam", "regularize")]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-7)], ids=["f32", "bf16"]
)
def test_small_dtypes_agree_with_float64(case: Case, dtype, tolerance, x64):
    def result(x):
        out = case.call(0.5, x)
        return np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)

    x = sample(dtype)
    exact = result(x.astype(np.float64))  # the same numbers: what differs is the computation
    assert np.abs(result(x) - exact).max() <= tolerance * max(1.0, np.abs(exact).max())


# Laws of penalties -----------------------------------------------------------------------------


@every_penalty
@given(x=points())
@few
def test_value_agrees_with_the_formula(case: PenaltyCase, x):
    np.testing.assert_allclose(case.make(0.5).value(x), case.value(np.float32(x), 0.5), rtol=1e-5)


@every_penalty
@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_prox_attains_the_smallest_objective(case: PenaltyCase, step, strength, x64):
    penalty = case.make(strength)
    for z in (-3.0, -0.31, -0.1, 0.0, 0.04, 0.6, 2.5):

        def objective(w, z=z):
            return case.value(np.array([w]), strength) + (w - z) ** 2 / (2 * step)

        found = float(penalty.prox(jnp.array([z]), step)[0])
        # A fine grid finds the basin, a bounded search its bottom; the kink at 0 and the bounds
        # of a constraint are points of the grid.
        grid = np.concatenate([np.linspace(-4, 4, 4001), [0.0, strength, -strength]])
        near = grid[np.argmin([objective(w) for w in grid])]
        best = objective(near)
        if not case.constraint:
            bounds = (near - 2e-3, near + 2e-3)
            best = min(best, minimize_scalar(objective, bounds=bounds, method="bounded").fun)
        assert objective(found) <= best + 1e-9


@every_penalty
@given(x=points(), steps=arrays(np.float64, (4, 3), elements=st.sampled_from(STEPS)))
@few
def test_an_elementwise_step_acts_coordinate_by_coordinate(case: PenaltyCase, x, steps):
    penalty = case.make(0.5)
    whole = penalty.prox(x, steps)
    pairs = zip(x.ravel(), steps.ravel(), strict=True)
    single = [penalty.prox(jnp.float32(z), float(t)) for z, t in pairs]
    chex.assert_trees_all_close(whole.ravel(), jnp.stack(single), rtol=1e-6)


@every_penalty
@given(x=points())
@few
def test_step_zero_is_the_identity_inside_the_domain(case: PenaltyCase, x):
    inside = jnp.asarray(case.feasible(x), jnp.float32)
    chex.assert_trees_all_equal(case.make(0.5).prox(inside, 0.0), inside)


@every_penalty
def test_strength_zero_is_the_identity(case: PenaltyCase):
    if case.constraint:
        with pytest.raises(AssertionError):  # a constraint binds at any strength
            chex.assert_trees_all_equal(case.make(0.0).prox(sample(), 3.0), sample())
    else:
        chex.assert_trees_all_equal(case.make(0.0).prox(sample(), 3.0), sample())


@every_penalty
@given(x=points(), y=points(), step=st.sampled_from(STEPS[1:]))
@few
def test_prox_of_a_convex_penalty_is_firmly_nonexpansive(case: PenaltyCase, x, y, step):
    penalty = case.make(0.5)
    assert penalty.convex
    p, q = (np.asarray(penalty.prox(z, step), np.float64) for z in (x, y))
    x, y = np.float32(x).astype(np.float64), np.float32(y).astype(np.float64)
    assert ((p - q) ** 2).sum() <= ((p - q) * (x - y)).sum() + 1e-5


@every_penalty
@given(x=points())
@few
def test_value_is_no_larger_after_the_prox_and_the_three_point_inequality_holds(case, x):
    penalty, step = case.make(0.5), 0.7
    x = np.float32(x).astype(np.float64)
    p = np.asarray(penalty.prox(x, step), np.float64)
    for u in (case.feasible(x), case.feasible(x[::-1]), np.zeros_like(x)):
        left = case.value(p, 0.5 + 1e-6) + ((p - x) ** 2).sum() / (2 * step)
        left += ((u - p) ** 2).sum() / (2 * step)
        assert left <= case.value(u, 0.5) + ((u - x) ** 2).sum() / (2 * step) + 1e-4


@every_penalty
@pytest.mark.parametrize("step", STEPS[1:])
def test_residual_and_subdifferential_distance_vanish_at_a_stationary_point(case, step, x64):
    """w = prox(x, step) makes (x - w) / step a subgradient at w: the loss's is minus that."""
    penalty, x = case.make(0.3), sample(np.float64)
    w = penalty.prox(x, step)
    grad = (w - x) / step
    for residual_step in (0.01, 1.0, 50.0):
        residual = penalty.residual(w, grad, residual_step)
        chex.assert_trees_all_close(residual, jnp.zeros((4, 3)), atol=1e-12)
    chex.assert_trees_all_close(penalty.subdiff_distance(w, grad), jnp.zeros((4, 3)), atol=1e-12)


@every_penalty
def test_residual_and_subdifferential_distance_see_a_point_that_is_not_stationary(case, x64):
    penalty = case.make(0.3)
    x = jnp.asarray(case.feasible(np.asarray(sample(np.float64))))
    wrong = -5.0 * jnp.ones((4, 3))
    assert (jnp.abs(penalty.residual(x, wrong, 1e-3)) > 0.5).all()
    assert (penalty.subdiff_distance(x, wrong) > 0.5).all()


@every_penalty
@given(grad=points())
@few
def test_critical_multiplier_is_where_zero_becomes_the_solution(case: PenaltyCase, grad):
    penalty = case.make(0.5)
    critical = float(penalty.critical_multiplier(grad))
    zero = jnp.zeros((4, 3))
    if np.isinf(critical):
        assert penalty.subdiff_distance(zero, 1e-3 * grad).max() > 0 or not grad.any()
    elif case.constraint:
        assert penalty.subdiff_distance(zero, grad).max() == 0
    else:
        above, below = case.make(0.5 * critical * 1.001), case.make(0.5 * critical * 0.999)
        assert above.subdiff_distance(zero, grad).max() == 0
        assert below.subdiff_distance(zero, grad).max() > 0 or critical == 0


@every_penalty
def test_vmap_over_points_equals_a_loop(case: PenaltyCase):
    penalty = case.make(0.5)
    mapped = jax.vmap(lambda row: penalty.prox(row, 0.3))(sample())
    looped = jnp.stack([penalty.prox(row, 0.3) for row in sample()])
    chex.assert_trees_all_equal(mapped, looped)


@every_penalty
def test_is_a_pytree_of_its_numbers(case: PenaltyCase):
    penalty = case.make(0.5)
    assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(penalty))
    leaves, treedef = jax.tree.flatten(penalty)
    chex.assert_trees_all_equal(
        jax.tree.unflatten(treedef, leaves).prox(sample()), penalty.prox(sample())
    )
    traced = jax.jit(lambda p, x: p.prox(x))(penalty, sample())
    chex.assert_trees_all_close(traced, penalty.prox(sample()), rtol=1e-6)
    assert not callable(penalty)  # optax.inject_hyperparams takes callables for schedules


@every_penalty
def test_one_trace_serves_equal_strengths_of_any_type(case: PenaltyCase):
    chex.clear_trace_counter()
    call = jax.jit(chex.assert_max_traces(lambda p, x: p.prox(x), n=1))
    for strength in (1, 1.0, np.float32(1), np.float64(1), jnp.float32(1), np.int64(1)):
        call(case.make(strength), sample())


@every_penalty
def test_keeps_the_dtype_and_the_shape_also_of_empty_arrays(case: PenaltyCase):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for shape in ((), (0,), (2, 0, 3), (5,)):
            x = jnp.ones(shape, dtype)
            assert case.make(0.5).prox(x, 0.1).dtype == dtype
            assert case.make(0.5).prox(x, 0.1).shape == shape
            assert case.make(0.5).value(x).dtype == jnp.float32


@every_penalty
def test_a_sharded_leaf_needs_no_collective_and_keeps_its_sharding(case: PenaltyCase):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jnp.linspace(-2, 2, 64).reshape(16, 4), sharding)
    penalty = case.make(0.5)
    compiled = jax.jit(lambda x: penalty.prox(x, 0.1)).lower(x).compile()
    assert not re.search(r"all-(reduce|gather|to-all)|collective-permute", compiled.as_text())
    assert compiled(x).sharding.is_equivalent_to(sharding, 2)


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
    with pytest.raises(ValueError, match=r"step: .*shape \(3,\).*shape \(4, 3\)"):
        penalty.prox(sample(), jnp.ones(3))
    with pytest.raises(ValueError, match=r"grad: .*shape \(2,\)"):
        penalty.residual(sample(), jnp.ones(2))


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
    updates, state = tx.update(params, tx.init(params), params)
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
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty_kernel"].shape == (0, 3)


@every_transform
def test_integer_strengths_equal_floating_ones(case: TransformCase):
    chex.assert_trees_all_equal(case.call(1, sample()), case.call(1.0, sample()))
