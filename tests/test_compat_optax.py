"""optax's names, made of this library: the same signatures and values, and right where optax's are
not. What optax gives there is in the names and comments alone: it may be mended.
"""

import inspect
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message

from jaxreg.compat import optax as compat

pytestmark = pytest.mark.core

HERE = ("unitwise_norm", "unitwise_clip")  # which optax has in optax.transforms alone


def original(name):
    return getattr(optax.transforms if name in HERE else optax, name)


def updated(tx, updates, params=None):
    return tx.update(updates, tx.init(params), params)[0]


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {
        "kernel": (4, 3),
        "bias": (3,),
        "scalar": (),
        "heads": (3, 2, 2),
        "conv": (2, 2, 3, 4),
        "column": (5, 1),
        "row": (1, 5),
    }
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


U, P = tree(0), tree(1, 0.3)
EXAMPLES = {"a": U["conv"], "b": P["kernel"][:2]}
LABELS = jax.nn.one_hot(jnp.array([0, 2]), 3)
KERNELS = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
PREFIX = {k: k != "bias" for k in P}

# One row a name: what it gives for ordinary numbers, called on either module.
ORDINARY = {
    "clip": lambda f: updated(f(0.5), U),
    "clip_by_global_norm": lambda f: [updated(f(limit), U) for limit in (0.7, 100.0)],
    "clip_by_block_rms": lambda f: [updated(f(limit), U) for limit in (0.7, 1.0, 100.0)],
    "adaptive_grad_clip": lambda f: [
        updated(f(0.1), U, P),
        updated(f(10.0, eps=0.5), U, P),
        updated(f(0.1, 1e-2), U, jax.tree.map(jnp.zeros_like, P)),
    ],
    "unitwise_norm": lambda f: jax.tree.map(f, U),
    "unitwise_clip": lambda f: [
        f(jnp.array([2.0, 2.0, 1e-7]), jnp.array([1.0, 3.0, 0.0]), jnp.array([4.0, 5.0, 6.0])),
        f(jnp.array([2.0, 2.0]), jnp.array([1.0, 3.0]), jnp.array([4.0, 4.0]), div_eps=8.0),
    ],
    "per_example_global_norm_clip": lambda f: [f(EXAMPLES, limit) for limit in (1.0, 3.0, 99.0)],
    "per_example_layer_norm_clip": lambda f: [
        f(EXAMPLES, limit, uniform) for limit in (1.0, 6.0) for uniform in (True, False)
    ],
    "add_decayed_weights": lambda f: [
        updated(f(0.1), U, P),
        updated(f(-0.1), U, P),
        updated(f(), U, P),
        updated(f(0.1, KERNELS), U, P),
        updated(f(0.1, mask=PREFIX), U, P),
        updated(f(0.1, mask={"a": True, "b": False}), {"a": U, "b": U}, {"a": P, "b": P}),
    ],
    "global_norm": lambda f: f(U),
    "smooth_labels": lambda f: [f(LABELS, alpha) for alpha in (0.0, 0.3, 1.0)],
    "keep_params_nonnegative": lambda f: updated(f(), U, jax.tree.map(jnp.abs, P)),
}


def test_there_is_a_row_and_an_example_for_each_name():
    assert set(ORDINARY) == set(compat.__all__)
    for name in compat.__all__:
        assert ">>>" in getattr(compat, name).__doc__, name


def test_every_clip_that_optax_exports_is_here():
    names = {n for n in dir(optax) if "clip" in n or n in ("global_norm", "smooth_labels")}
    assert names
    assert names <= set(compat.__all__)


@pytest.mark.parametrize("name", ORDINARY)
def test_signature_is_that_of_optax(name):
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    own, theirs = parameters(getattr(compat, name)), parameters(original(name))
    assert own[: len(theirs)] == theirs
    # An older optax has fewer.
    added = {n for n, _, default in own[len(theirs) :] if default is not inspect.Parameter.empty}
    assert len(added) == len(own) - len(theirs)
    assert not added or tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8)


@pytest.mark.parametrize("name", ORDINARY)
def test_on_ordinary_numbers_the_results_are_those_of_optax(name, strict):
    own = ORDINARY[name](getattr(compat, name))
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # of optax.global_norm
        theirs = ORDINARY[name](original(name))
    assert jax.tree.structure(own) == jax.tree.structure(theirs)
    for ours, expected in zip(jax.tree.leaves(own), jax.tree.leaves(theirs), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_states_are_those_of_optax():
    for tx in (compat.clip(1.0), compat.clip_by_global_norm(1.0), compat.adaptive_grad_clip(0.1)):
        assert tx.init(P) == optax.EmptyState()
        assert tx.update(U, tx.init(P), P)[1] == optax.EmptyState()
    state = compat.add_decayed_weights(lambda count: 0.1).init(P)
    assert jax.tree.map(jnp.shape, state)._asdict() == {"count": ()}


def test_it_is_imported_by_its_own_name_alone():
    script = "import sys, jaxreg; print('jaxreg.compat' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# Norms -------------------------------------------------------------------------------------------


def test_1000_bf16_leaves_have_norm_12_66_and_not_8(strict):
    leaves = [jnp.full(1, 0.4, jnp.bfloat16)] * 1000
    np.testing.assert_allclose(compat.global_norm(leaves), 12.66, rtol=1e-3)


def test_two_million_bf16_entries_have_norm_14_16_and_not_5_66(strict):
    """As for 2,000 leaves, which the tests of `jaxreg.global_norm` have."""
    leaves = [jnp.full(40_000, 0.01, jnp.bfloat16)] * 50
    np.testing.assert_allclose(compat.global_norm(leaves), 14.16, rtol=2e-3)


@pytest.mark.parametrize(
    ("x", "norm"),
    [
        (np.array([300.0, 300.0], np.float16), 300 * 2**0.5),  # optax: infinity
        (np.array([1e20], np.float32), 1e20),  # infinity
        (np.array([1e-30], np.float32), 1e-30),  # 0
        (np.array([3, 4], np.int32), 5.0),
    ],
    ids=["f16", "overflow", "underflow", "integers"],
)
def test_norms_are_right_where_squares_are_out_of_range(x, norm, strict):
    np.testing.assert_allclose(compat.global_norm(jnp.asarray(x)), norm, rtol=1e-6)
    np.testing.assert_allclose(compat.unitwise_norm(jnp.asarray(x)), [norm] * len(x), rtol=1e-6)


def test_the_gradient_of_the_norm_at_0_is_0_and_not_nan(strict):
    for norm in (compat.global_norm, lambda x: compat.unitwise_norm(x).sum()):
        np.testing.assert_array_equal(jax.grad(norm)(jnp.zeros(3)), jnp.zeros(3))


@pytest.mark.parametrize(
    ("shape", "axis", "over"),
    [
        ((1, 2, 2, 2, 3), None, (0, 1, 2, 3)),
        ((2, 1, 1, 2, 1, 3), (0, 5), (0, 5)),
        ((4, 3), 1, 1),
        ((4, 3), -1, 1),
        ((3,), 0, 0),
        ((1, 1, 1, 1, 1, 3), None, None),
    ],
)
def test_units_of_other_shapes_and_axes(shape, axis, over, strict):
    g, w = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in (0, 1))
    norm = lambda x: np.broadcast_to(np.sqrt((x**2).sum(over, keepdims=True)), shape)  # noqa: E731
    np.testing.assert_allclose(compat.unitwise_norm(jnp.asarray(g), axis), norm(g), rtol=1e-6)
    clipped = updated(compat.adaptive_grad_clip(0.5, axis=axis), jnp.asarray(g), jnp.asarray(w))
    expected = g * np.minimum(1, 0.5 * norm(w) / norm(g))
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)


def test_units_of_six_axes_have_to_be_named():
    with pytest.raises(ValueError, match=r"^axis: got None, for shape \(2, 1, 1, 2, 1, 3\)"):
        compat.unitwise_norm(jnp.ones((2, 1, 1, 2, 1, 3)))


# Clips -------------------------------------------------------------------------------------------

W = jnp.array([3.0, 4.0])
# One row a clip: with a limit, what takes [3, 4] c to a tenth of it.
CLIPS = {
    "clip_by_global_norm": lambda c: compat.clip_by_global_norm(0.5 * c),
    "clip_by_block_rms": lambda c: compat.clip_by_block_rms(c * 0.5 / 2**0.5),
    "adaptive_grad_clip": lambda c: compat.adaptive_grad_clip(0.1 * c),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("scale", [1e25, 1.0])
def test_finite_gradients_whose_squares_overflow_are_clipped_and_not_zeroed(name, scale, strict):
    found = updated(CLIPS[name](1.0), W * scale, W)
    np.testing.assert_allclose(found, [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_weights_and_limits_may_be_as_large(name, strict):
    weights = W * 1e25 if name == "adaptive_grad_clip" else W
    limit = 1.0 if name == "adaptive_grad_clip" else 1e25
    found = updated(CLIPS[name](limit), W * 1e26, weights)
    np.testing.assert_allclose(found, W * 1e24, rtol=1e-6)


@pytest.mark.parametrize("name", [*CLIPS, "clip"])
def test_a_limit_of_0_gives_0_for_a_zero_gradient_and_not_nan(name, strict):
    tx = compat.clip(0.0) if name == "clip" else CLIPS[name](0.0)
    for gradient in (jnp.zeros(2), W):
        np.testing.assert_array_equal(updated(tx, gradient, W), jnp.zeros(2))


@pytest.mark.parametrize("name", [*CLIPS, "clip"])
def test_a_float32_limit_goes_with_bf16_updates_and_is_no_type_error(name, strict):
    make = compat.clip if name == "clip" else CLIPS[name]
    u, expected = W.astype(jnp.bfloat16), [0.5, 0.5] if name == "clip" else [0.3, 0.4]
    found = jax.jit(lambda c: updated(make(c), u, W))(jnp.float32(0.5 if name == "clip" else 1.0))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8)


@pytest.mark.parametrize("name", [*CLIPS, "clip"])
def test_integers_count_as_float32_and_are_no_type_error(name, strict):
    tx = compat.clip(2.5) if name == "clip" else CLIPS[name](1.0)
    found = updated(tx, {"w": jnp.array([3, 4])}, {"w": jnp.array([3, 4])})["w"]
    np.testing.assert_allclose(found, [2.5, 2.5] if name == "clip" else [0.3, 0.4], rtol=1e-6)


def test_bf16_leaves_are_clipped_to_the_norm_asked_for(strict):
    leaves = [jnp.full(5000, 0.01, jnp.bfloat16)] * 60
    clipped = updated(compat.clip_by_global_norm(1.0), leaves)
    norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in clipped))
    assert abs(norm - 1) < 2.0**-8


def test_units_of_norm_0_without_an_eps_stay_0_and_are_not_nan(strict):
    zero = jnp.zeros(2)
    np.testing.assert_array_equal(compat.unitwise_clip(zero, zero, zero, div_eps=0.0), zero)


def test_complex_entries_are_cut_in_size_and_not_refused():
    found = updated(compat.clip(1.0), jnp.array([3 + 4j, 0.1j]))
    np.testing.assert_allclose(found, [0.6 + 0.8j, 0.1j], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("max_delta", compat.clip),
        ("max_norm", compat.clip_by_global_norm),
        ("threshold", compat.clip_by_block_rms),
        ("clipping", compat.adaptive_grad_clip),
        ("eps", lambda bad: compat.adaptive_grad_clip(0.1, bad)),
        ("div_eps", lambda bad: compat.unitwise_clip(W, W, W, bad)),
        ("l2_norm_clip", lambda bad: compat.per_example_global_norm_clip(W, bad)),
        ("global_l2_norm_clip", lambda bad: compat.per_example_layer_norm_clip(W, bad)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("bad", [-1.0, float("nan"), "1", jnp.ones(2)])
def test_refuses_a_limit_that_is_none(name, make, bad):
    with pytest.raises(ValueError, match=f"^{name}: got .*; accepted: a number >= 0"):
        make(bad)


@pytest.mark.parametrize(
    "tx",
    [
        compat.adaptive_grad_clip(0.1),
        compat.add_decayed_weights(0.1),
        compat.add_decayed_weights(),
        compat.keep_params_nonnegative(),
    ],
)
def test_says_that_params_are_needed(tx):
    with pytest.raises(ValueError, match=r"^params: got None"):
        updated(tx, U)


@pytest.mark.parametrize(
    "tx",
    [
        compat.adaptive_grad_clip(0.1),
        compat.add_decayed_weights(0.1),
        compat.keep_params_nonnegative(),
        compat.clip_by_global_norm(1.0),
    ],
)
def test_an_update_of_none_stays_none_beside_a_parameter(tx):
    found = updated(tx, {"a": W, "b": None}, {"a": W, "b": W})
    assert found["b"] is None
    assert found["a"].shape == (2,)


# Clips of each example's gradient ----------------------------------------------------------------


def test_an_example_whose_squares_overflow_is_clipped_and_not_dropped(strict):
    grads = {"a": jnp.array([[3e25, 4e25], [0.0, 0.1]])}
    total, clipped = compat.per_example_global_norm_clip(grads, 1.0)
    np.testing.assert_allclose(total["a"], [0.6, 0.9], rtol=1e-6)
    assert clipped == 1
    total, clipped = compat.per_example_layer_norm_clip(grads, 1.0)
    np.testing.assert_allclose(total["a"], [0.6, 0.9], rtol=1e-6)
    assert clipped["a"] == 1


def test_sums_over_many_bf16_examples_are_not_rounded_on_the_way(strict):
    grads = jnp.full((1000, 2), 0.01, jnp.bfloat16)
    total, clipped = compat.per_example_global_norm_clip(grads, jnp.float32(1.0))
    assert (total.dtype, clipped) == (jnp.bfloat16, 0)
    np.testing.assert_allclose(total.astype(jnp.float32), [10, 10], rtol=2**-7)


def test_an_example_of_integers_and_a_limit_of_0(strict):
    grads = [jnp.array([[0, 0], [3, 4]])]
    total, clipped = compat.per_example_global_norm_clip(grads, 0.0)
    np.testing.assert_array_equal(total[0], [0.0, 0.0])
    assert clipped == 1


@pytest.mark.parametrize("bad", [{}, {"a": jnp.ones(())}, [jnp.ones((2, 1)), jnp.ones((3, 1))]])
def test_refuses_gradients_without_a_common_batch_axis(bad):
    for function in (compat.per_example_global_norm_clip, compat.per_example_layer_norm_clip):
        with pytest.raises(ValueError, match=r"^grads: got arrays of shapes .*; accepted: arrays"):
            function(bad, 1.0)


# Decay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["traced", "schedule"])
def test_a_strength_does_not_promote_bf16_updates_to_float32(kind, strict):
    u = p = jnp.array([1.0], jnp.bfloat16)

    def step(strength):
        given = strength if kind == "traced" else lambda count: strength
        return updated(compat.add_decayed_weights(given), u, p)

    found = jax.jit(step)(jnp.float32(0.5))
    assert (found.dtype, found.tolist()) == (jnp.bfloat16, [1.5])


def test_decay_of_bf16_updates_is_rounded_once(strict):
    # 1/256 + 3/512 + ... : the product alone, in bf16, would lose the half that tips the sum.
    u, p = jnp.array([1.0], jnp.bfloat16), jnp.array([1.0078125], jnp.bfloat16)
    found = updated(compat.add_decayed_weights(0.00388), u, p)  # 1.00391: above half of 1/128
    assert found.tolist() == [1.0078125]


def test_a_schedule_sees_the_step_count():
    tx = compat.add_decayed_weights(lambda count: 0.1 * count)
    state, seen = tx.init(W), []
    for _ in range(3):
        updates, state = tx.update(jnp.zeros(2), state, W)
        seen.append(updates[0])
    np.testing.assert_allclose(seen, [0.0, 0.3, 0.6], rtol=1e-6)
    assert state.count == 3


def test_a_mask_function_is_always_called_with_the_parameters(strict):
    params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    large = lambda tree: jax.tree.map(lambda x: bool((x > 0.5).all()), tree)  # noqa: E731
    found = updated(compat.add_decayed_weights(0.5, large), {"a": W * 0, "b": W}, params)
    assert {k: v.tolist() for k, v in found.items()} == {"a": [0.5, 0.5], "b": [3.0, 4.0]}


def test_a_mask_that_inject_hyperparams_takes_for_a_schedule_does_not_disable_decay_silently():
    tx = optax.inject_hyperparams(compat.add_decayed_weights)(0.1, mask=KERNELS)
    with pytest.raises(ValueError, match=r'^mask: got .*static_args="mask"\)\.$'):
        tx.init(P)
    make = optax.inject_hyperparams(compat.add_decayed_weights, static_args="mask")
    found = updated(make(0.1, mask=KERNELS), jax.tree.map(jnp.zeros_like, P), P)
    np.testing.assert_allclose(found["kernel"], 0.1 * P["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], 0)


def test_a_strength_of_0_leaves_infinite_parameters_out():
    found = updated(compat.add_decayed_weights(0.0), W, W * jnp.inf)
    np.testing.assert_array_equal(found, W)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", jnp.ones(2)])
def test_refuses_a_strength_that_is_not_finite(bad):
    with pytest.raises(ValueError, match=r"^weight_decay: got .*; accepted: a finite number"):
        compat.add_decayed_weights(bad)


# Labels ------------------------------------------------------------------------------------------


def test_smoothing_does_not_leak_onto_classes_that_where_excludes(strict):
    where = jnp.array([[True, True, False], [True, True, True]])
    found = compat.smooth_labels(LABELS, 0.3, where=where)
    np.testing.assert_allclose(found, [[0.85, 0.15, 0.0], [0.1, 0.1, 0.8]], rtol=1e-6)
    same = compat.smooth_labels(LABELS, 0.3, where=where[0])
    np.testing.assert_allclose(same, [[0.85, 0.15, 0.0], [0.15, 0.15, 0.7]], rtol=1e-6)


def test_a_row_without_classes_keeps_its_labels(strict):
    found = compat.smooth_labels(LABELS, 0.3, where=jnp.array([[False] * 3, [True] * 3]))
    np.testing.assert_allclose(found, [[1.0, 0.0, 0.0], [0.1, 0.1, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(("axis", "classes"), [(0, 2), ((0, 1), 6), (None, 6), (-1, 3)])
def test_smoothing_along_other_axes(axis, classes, strict):
    found = compat.smooth_labels(LABELS, 0.3, axis=axis)
    np.testing.assert_allclose(found, 0.7 * LABELS + 0.3 / classes, rtol=1e-6)


def test_labels_keep_their_dtype_under_a_float32_alpha(strict):
    found = compat.smooth_labels(LABELS.astype(jnp.bfloat16), jnp.float32(0.5))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0].astype(jnp.float32), [2 / 3, 1 / 6, 1 / 6], rtol=2**-8)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), "0.1"])
def test_alpha_is_checked(bad):
    with pytest.raises(ValueError, match=r"^alpha: got .*; accepted: a number from 0 to 1\.$"):
        compat.smooth_labels(LABELS, bad)


def test_refuses_integer_labels():
    with pytest.raises(ValueError, match=r"^labels: got .*int32; accepted: a real floating array"):
        compat.smooth_labels(jnp.array([0, 2]), 0.1)


@pytest.mark.parametrize("bad", [5, -3, "x", 1.0, (0, 0), (0, -2), (0, "x")], ids=str)
def test_an_axis_that_there_is_not_is_named(bad):
    clip = lambda: compat.adaptive_grad_clip(0.1, axis=bad).update(LABELS, None, LABELS)  # noqa: E731
    for call in (
        lambda: compat.smooth_labels(LABELS, 0.1, axis=bad),
        lambda: compat.unitwise_norm(LABELS, bad),
        clip,
    ):
        with pytest.raises(ValueError, match=f"^axis: got {re.escape(repr(bad))}") as error:
            call()
        message(error)


@pytest.mark.parametrize("bad", ["x", 1.0, (0, "x")], ids=str)
def test_an_axis_that_is_no_integer_is_named_at_construction(bad):
    with pytest.raises(ValueError, match=r"^axis: got .*; accepted: an axis, several, or None"):
        compat.adaptive_grad_clip(0.1, axis=bad)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 3), (3, 2)], ids=str)
def test_classes_that_do_not_broadcast_with_the_labels_are_named(shape):
    with pytest.raises(ValueError, match=r"^where: got .*; accepted: bools that broadcast") as e:
        compat.smooth_labels(LABELS, 0.1, where=jnp.ones(shape, bool))
    message(e)


# Constraints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_parameters_end_at_0_exactly_in_mixed_dtypes(dtypes, strict):
    p, u = jnp.array([0.1, 1.0], dtypes[0]), jnp.array([-3.0, 2.0], dtypes[1])
    found = updated(compat.keep_params_nonnegative(), u, p)
    assert found.dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):
        after = optax.apply_updates(p, found)
    assert after.tolist() == [0.0, 3.0]


def test_the_names_that_are_listed_are_its_own():
    assert dir(compat) == sorted(compat.__all__)
    assert all(hasattr(optax, name) or name.startswith("unitwise") for name in dir(compat))
