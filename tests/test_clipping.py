"""Clips by norms and by value, where peers are silently wrong; the arguments of all clips."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clips import CLIPS, STEPS, f32, run
from errors import message

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
    grads = [jnp.full((5000,), 0.01, jnp.bfloat16) for _ in range(60)]
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


def test_a_clip_of_bf16_is_differentiated_like_one_of_float32():
    """To JAX the bits that a CPU widens bfloat16 by have no derivative."""
    first = lambda g: clip(1.0, g)[0].astype(jnp.float32)[0]  # noqa: E731
    exact = jax.grad(first)(jnp.array([3.0, 4.0]))
    found = jax.grad(first)(jnp.array([3.0, 4.0], jnp.bfloat16))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.02)


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


# Semantics of others -----------------------------------------------------------------------------

SEMANTICS = {
    # case: gradient, limit, and what torch, optax and Keras make of it
    "at the limit": ([3.0, 4.0], 5.0, [2.9999993, 3.9999993], [3.0, 4.0], [3.0, 4.0]),
    "inside": ([0.3, 0.4], 5.0, [0.3, 0.4], [0.3, 0.4], [0.3, 0.4]),
    "outside": ([3.0, 4.0], 1.0, [0.5999999, 0.7999998], [0.6, 0.8], [0.6, 0.8]),
    "one infinity": ([np.inf, 1.0], 1.0, [np.nan, 0], [np.nan, 0], [np.nan, np.nan]),
    "squares overflow": ([1e20, 1e20], 1.0, [0, 0], [0, 0], [np.nan, np.nan]),
}


@pytest.mark.parametrize("case", SEMANTICS)
def test_semantics_of_torch_optax_and_keras(case):
    grads, limit, *expected = SEMANTICS[case]
    for semantics, clipped in zip(("torch", "optax", "keras"), expected, strict=True):
        tx = jaxreg.clip_by_global_norm(limit, semantics=semantics)
        found, _ = tx.update(jnp.array(grads), tx.init(jnp.zeros(2)))
        np.testing.assert_allclose(found, clipped, rtol=1e-7)


def test_the_semantics_of_optax_are_optax_bit_for_bit_up_to_its_order_of_rounding():
    grads = {"a": jnp.linspace(-2, 3, 12).reshape(4, 3), "b": jnp.array([0.1, 9.0])}
    for limit in (0.01, 1.0, 9.0, 1000.0):
        tx, theirs = (
            jaxreg.clip_by_global_norm(limit, semantics="optax"),
            optax.clip_by_global_norm(limit),
        )
        found, expected = (t.update(grads, t.init(grads))[0] for t in (tx, theirs))
        chex.assert_trees_all_close(found, expected, rtol=3e-7)


# What optax does wrong ---------------------------------------------------------------------------


def test_a_norm_that_overflows_does_not_zero_the_update():
    """optax: zeros, silently."""
    clipped, state = clip(1.0, jnp.array([3e20, 4e20]))
    chex.assert_trees_all_close(clipped, jnp.array([0.6, 0.8]), rtol=1e-6)
    assert float(state.norm) == pytest.approx(5e20)


@pytest.mark.parametrize("limit", [5e-39, 1e-30, 1e-3])
def test_a_tiny_limit_and_a_zero_gradient_are_no_nan(limit):
    """optax: 0 / 0 for a limit of 0, which is refused here."""
    clipped, _ = clip(limit, {"a": jnp.zeros(3), "b": jnp.zeros(())})
    chex.assert_trees_all_equal(clipped, {"a": jnp.zeros(3), "b": jnp.zeros(())})


def test_a_traced_limit_or_a_schedule_leaves_bf16_updates_in_bf16():
    """optax: float32 updates, or an error about the dtype."""
    grads = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
    update = jax.jit(lambda limit: clip(limit, grads)[0])
    for limit in (1.0, jnp.float32(1.0), jnp.bfloat16(1.0), jnp.float16(1.0), jnp.int32(1)):
        clipped = update(limit)
        assert clipped["w"].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(clipped["w"]), [0.6, 0.8], rtol=2.0**-8)
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    tx = optax.inject_hyperparams(jaxreg.clip_by_global_norm)(max_norm=schedule)
    state = tx.init(grads)
    clipped, after = tx.update(grads, state)
    assert clipped["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_inject_hyperparams_takes_no_selector_for_a_schedule():
    """optax's own: a mask that is a function is called with the step count."""
    params = {"head": jnp.full((2, 2), 2.0), "body": jnp.full((2, 2), 2.0)}
    for selector in ("body", jaxreg.where.path("body")):
        injected = optax.inject_hyperparams(jaxreg.adaptive_clip)(ratio=0.1, where=selector)
        plain = jaxreg.adaptive_clip(0.1, where=selector)
        found, expected = (
            tx.update(params, tx.init(params), params)[0] for tx in (injected, plain)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
        chex.assert_trees_all_equal(found["head"], params["head"])
        assert (found["body"] != params["body"]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda where: jaxreg.clip_by_group_norm({where: 0.1}),
        lambda where: jaxreg.adaptive_clip(0.01, where=where),
    ],
    ids=["clip_by_group_norm", "adaptive_clip"],
)
def test_the_mask_of_a_masked_clip_is_of_the_parameters_at_update_too(make):
    """`optax.masked` calls a mask on the updates, whose dtypes may be others."""
    where = jaxreg.where.predicate(lambda path, leaf: leaf.dtype == jnp.float32)
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    tx = make(where)
    clipped, _ = tx.update(grads, tx.init(params), params)
    assert (clipped["a"] < 0.1).all()
    chex.assert_trees_all_equal(clipped["b"], grads["b"])


# Leaves, groups, entries -------------------------------------------------------------------------


def limited(g, norm, limit):
    return g * min(1.0, limit / norm) if norm > 0 else g


def test_clip_by_leaf_norm():
    expected = [
        jax.tree.map(lambda g: limited(g, np.linalg.norm(g), 1.5), grads) for grads in STEPS
    ]
    found, state = run(jaxreg.clip_by_leaf_norm(1.5), [*map(f32, STEPS)])
    chex.assert_trees_all_close(found, f32(expected), rtol=1e-6)
    each = [min(1, 1.5 / np.linalg.norm(g)) for g in jax.tree.leaves(STEPS[3])]
    np.testing.assert_allclose(state.coefficients, each, rtol=1e-6)
    assert float(state.coefficient) == pytest.approx(min(each))
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(STEPS[3])])
    after = np.concatenate([np.ravel(g) for g in jax.tree.leaves(expected[3])])
    assert float(state.norm) == pytest.approx(np.linalg.norm(flat))
    assert float(state.clipped_norm) == pytest.approx(np.linalg.norm(after))
    assert (int(state.count), int(state.clipped), int(state.nonfinite)) == (4, 3, 0)


def test_clip_by_leaf_norm_is_kerass_clipnorm_with_no_zero_division():
    tx = jaxreg.clip_by_leaf_norm(1.0)
    clipped, state = tx.update(
        [jnp.zeros(2), jnp.zeros(())], tx.init([jnp.zeros(2), jnp.zeros(())])
    )
    chex.assert_trees_all_equal(clipped, [jnp.zeros(2), jnp.zeros(())])
    assert [float(c) for c in state.coefficients] == [1, 1]


def test_clip_by_group_norm():
    limits = {jaxreg.where.path("a/**"): 1.0}
    expected = []
    for grads in STEPS:
        norm = np.sqrt((grads["a"]["kernel"] ** 2).sum() + (grads["a"]["bias"] ** 2).sum())
        expected.append(
            {"a": jax.tree.map(lambda g, n=norm: limited(g, n, 1.0), grads["a"]), "b": grads["b"]}
        )
    found, state = run(jaxreg.clip_by_group_norm(limits), [*map(f32, STEPS)])
    chex.assert_trees_all_close(found, f32(expected), rtol=1e-6)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(STEPS[3])))
    assert float(state.norm) == pytest.approx(norm)
    assert state.coefficients[2] == 1


def test_clip_by_group_norm_of_several_groups_by_rank_and_path():
    limits = {jaxreg.where.rank(at_least=2): 1.0, "b": jnp.float32(0.5), "a/bias": np.inf}
    found, _ = run(jaxreg.clip_by_group_norm(limits), [*map(f32, STEPS)])
    for clipped, grads in zip(found, STEPS, strict=True):
        kernel, b = grads["a"]["kernel"], grads["b"]
        expected = {
            "a": {
                "kernel": limited(kernel, np.linalg.norm(kernel), 1.0),
                "bias": grads["a"]["bias"],
            },
            "b": limited(b, np.linalg.norm(b), 0.5),
        }
        chex.assert_trees_all_close(clipped, f32(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"a/*": 1.0, "**/kernel": 1.0}, r"max_norms: got .* both match a/kernel; .*common leaves"),
        ({"c": 1.0}, r"max_norms: got where.path\('c'\), which matches no leaf; .*a/kernel"),
    ],
)
def test_groups_that_overlap_or_are_empty_are_refused_at_init(limits, message):
    with pytest.raises(ValueError, match=message):
        jaxreg.clip_by_group_norm(limits).init(f32(STEPS[0]))


def test_clip_by_value():
    found, _ = run(jaxreg.clip_by_value(0.7), [*map(f32, STEPS)])
    expected = jax.tree.map(lambda g: np.clip(g, -0.7, 0.7), STEPS)
    chex.assert_trees_all_close(found, f32(expected), rtol=1e-6)


def test_clip_by_value_cuts_complex_entries_by_modulus():
    z = np.array([3 + 4j, 0.1j, 0, -5], np.complex64)
    (found,), _ = run(jaxreg.clip_by_value(1.0), [jnp.asarray(z)])
    np.testing.assert_allclose(found, [0.6 + 0.8j, 0.1j, 0, -1], rtol=1e-6)


def test_complex_gradients_keep_their_direction():
    z = jnp.array([3 + 4j, 12j])
    for tx in (jaxreg.clip_by_global_norm(1.3), jaxreg.clip_by_leaf_norm(1.3)):
        (clipped,), _ = run(tx, [z])
        assert clipped.dtype == z.dtype
        np.testing.assert_allclose(clipped, np.asarray(z) / 10, rtol=1e-6)


def test_a_group_that_is_small_beside_the_rest_counts_as_clipped():
    clip = jaxreg.clip_by_group_norm({"a": 1e6, "b": 1.0})
    grads = {"a": jnp.array([1e4]), "b": jnp.array([1.5])}
    _, state = clip.update(grads, clip.init(grads))
    assert int(state.clipped) == 1


def test_a_clip_that_is_masked_from_everything_passes_it_on():
    params = {"a": jnp.ones(2)}
    tx = optax.masked(jaxreg.adaptive_clip(), {"a": False})
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)


# Bad input ---------------------------------------------------------------------------------------

NOT_POSITIVE = [0, 0.0, -1.0, float("nan"), -np.inf, "1", None, jnp.ones(2), lambda count: 1.0]
LIMITS = {
    "max_norm": [
        jaxreg.clip_by_global_norm,
        jaxreg.clip_by_leaf_norm,
        lambda x: jaxreg.adagc(max_norm=x),
        lambda x: jaxreg.per_example_clip(lambda w: w, x),
    ],
    "max_norms": [lambda x: jaxreg.clip_by_group_norm({"**": x})],
    "max_value": [jaxreg.clip_by_value],
    "max_rms": [jaxreg.clip_update_rms],
    "threshold": [lambda x: jaxreg.spike_aware_clip(optax.scale_by_adam(), x)],
    "ratio": [jaxreg.adaptive_clip, jaxreg.adagc],
    "eps": [lambda x: jaxreg.adaptive_clip(eps=x), lambda x: jaxreg.zclip(eps=x)],
    "z": [jaxreg.zclip],
    "sigmas": [lambda x: jaxreg.skip_step(optax.sgd(0.1), x)],
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("bad", NOT_POSITIVE, ids=lambda bad: type(bad).__name__ + str(bad)[:4])
def test_a_limit_that_is_no_positive_number_is_named(name, bad):
    for make in LIMITS[name]:
        with pytest.raises(ValueError, match=f"^{name}: got ") as error:
            make(bad)
        message(error)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: jaxreg.autoclip(101), "percentile: got 101.0; accepted: a number from 0 to 100"),
        (lambda: jaxreg.autoclip(-1), "percentile: got -1.0"),
        (lambda: jaxreg.autoclip(float("nan")), "percentile: got nan"),
        (lambda: jaxreg.autoclip("10"), "percentile: got '10'"),
        (lambda: jaxreg.autoclip(window=0), "window: got 0; accepted: a whole number >= 1"),
        (lambda: jaxreg.autoclip(window=2.5), "window: got 2.5"),
        (lambda: jaxreg.autoclip(window=True), "window: got True"),
        (lambda: jaxreg.zclip(warm_up=0), "warm_up: got 0"),
        (lambda: jaxreg.zclip(decay=1.0), "decay: got 1.0"),
        (lambda: jaxreg.zclip(float("inf")), "z: got inf"),
        (lambda: jaxreg.adagc(1.0), "ratio: got 1.0; accepted: a finite number > 1"),
        (lambda: jaxreg.adagc(decay=-0.1), "decay: got -0.1"),
        (lambda: jaxreg.adagc(warm_up=0), "warm_up: got 0"),
        (lambda: jaxreg.adaptive_clip(units="rows"), "units: got 'rows'"),
        (lambda: jaxreg.adaptive_clip(where=3), "where: got 3"),
        (lambda: jaxreg.clip_by_group_norm({}), "max_norms: got {}"),
        (lambda: jaxreg.clip_by_group_norm(1.0), "max_norms: got 1.0; accepted: a mapping"),
        (lambda: jaxreg.clip_by_group_norm({3: 1.0}), "got 3"),
        (
            lambda: jaxreg.clip_by_global_norm(1.0, semantics="tf"),
            "semantics: got 'tf'; accepted: jaxreg, torch, optax, keras",
        ),
        (
            lambda: jaxreg.skip_step(optax.sgd(0.1), window=0),
            "window: got 0; accepted: a whole number >= 2",
        ),
        (lambda: jaxreg.skip_step(optax.sgd(0.1), window=1), "window: got 1"),
        (lambda: jaxreg.skip_step("sgd"), "inner: got 'sgd'; accepted: an optax"),
        (lambda: jaxreg.per_example_clip(sum, 1.0, micro_batch=0), "micro_batch: got 0"),
        (lambda: jaxreg.per_example_clip(sum, 1.0, micro_batch=1.5), "micro_batch: got 1.5"),
        (
            lambda: jaxreg.per_example_clip(sum, 1.0, noise_multiplier=-1),
            "noise_multiplier: got -1.0",
        ),
        (lambda: jaxreg.clip_update_rms(direction="adam"), "direction: got 'adam'"),
        (lambda: jaxreg.spike_aware_clip("adam"), "direction: got 'adam'"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        call()
    message(error)


OF_GRADIENTS = CLIPS | {
    "clip_by_value": lambda **kw: jaxreg.clip_by_value(1.0, **kw),
    "skip_step": lambda **kw: jaxreg.skip_step(optax.sgd(0.1), **kw),
    "spike_aware_clip": lambda **kw: jaxreg.spike_aware_clip(optax.scale_by_adam(), **kw),
}
POLICED = OF_GRADIENTS | {
    "per_example_clip": lambda **kw: jaxreg.per_example_clip(lambda w: w, 1.0, **kw)
}


@pytest.mark.parametrize("name", POLICED)
def test_a_policy_that_there_is_not_is_named(name):
    for bad in ("ignore", "Skip", None):
        with pytest.raises(ValueError, match="^on_nonfinite: got .*propagate, skip, zero") as error:
            POLICED[name](on_nonfinite=bad)
        message(error)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_gradients_that_are_not_floating_are_named_at_update(name):
    tx, w = OF_GRADIENTS[name](), {"a": {"w": jnp.ones(2)}}
    for bad, given in ((jnp.ones(2, int), "int32 values"), (1.5, "1.5")):
        with pytest.raises(ValueError, match=f"^updates: got {given} on the leaf a/w") as error:
            tx.update({"a": {"w": bad}}, tx.init(w), w)
        message(error)


def test_what_needs_params_says_so():
    tx = jaxreg.adaptive_clip()
    with pytest.raises(ValueError, match=r"params: got None; .*update\(grads, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
    "wrapper",
    [
        jaxreg.skip_step(optax.scale_by_adam()),
        jaxreg.spike_aware_clip(optax.scale_by_adam()),
        jaxreg.clip_update_rms(direction=optax.scale_by_adam()),
    ],
    ids=["skip_step", "spike_aware_clip", "clip_update_rms"],
)
def test_what_wraps_a_direction_is_no_clip_of_gradients(wrapper):
    with pytest.raises(ValueError, match="clip: got jaxreg"):
        jaxreg.regularize(optax.scale_by_adam(), 0.1, clip=wrapper)
