"""Label-smoothed cross-entropy against the formula written out in NumPy float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharded import collectives

import jaxreg

pytestmark = pytest.mark.core
few = settings(max_examples=40, deadline=None)
JAX = tuple(int(n) for n in jax.__version__.split(".")[:2])


def oracle(
    logits,
    q,
    smoothing,
    z_loss=0.0,
    soft_cap=None,
    class_weights=None,
    where=None,
    spread="uniform",
):
    x = np.asarray(logits, np.float64)
    x = x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)
    exists = np.broadcast_to(True if where is None else where, x.shape)
    x = np.where(exists, x, -np.inf)
    largest = x.max(-1, keepdims=True)
    lse = largest + np.log(np.exp(x - largest).sum(-1, keepdims=True))
    number, q = exists.sum(-1, keepdims=True), np.asarray(q, np.float64)
    share = 1 / number if spread == "uniform" else (1 - q) / (number - 1)
    w = 1.0 if class_weights is None else np.asarray(class_weights, np.float64)
    v = w * np.where(exists, (1 - smoothing) * q + smoothing * share, 0)
    losses = np.where(exists, v * (lse - np.where(exists, x, 0)), 0).sum(-1)
    return losses + z_loss * lse[..., 0] ** 2


def problem(seed, rows=5, classes=7, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=(rows, classes)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, rows), jnp.int32)


def options(seed, labels, classes=7):
    """Some of the options, by the seed."""
    rng = np.random.default_rng(seed)
    exists = rng.random((len(labels), classes)) < 0.6
    exists[np.arange(len(labels)), labels] = True
    exists[:, 0] = exists[:, 1] = True
    shared = np.isin(np.arange(classes), labels) | exists[0]
    found = {
        "z_loss": 0.01,
        "soft_cap": 4.0,
        "class_weights": rng.uniform(0, 2, classes).astype(np.float32),
        "where": exists if seed % 2 else shared,
        "spread": "others",
    }
    return {name: value for name, value in found.items() if rng.random() < 0.5}


@given(seed=st.integers(0, 999), smoothing=st.floats(0, 0.99), scale=st.sampled_from([0.1, 3, 40]))
@few
def test_integer_labels_agree_with_the_formula(seed, smoothing, scale):
    logits, labels = problem(seed, scale=scale)
    expected = oracle(logits, np.eye(7)[labels], smoothing)
    losses = jaxreg.smoothed_cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 999), smoothing=st.floats(0, 0.99))
@few
def test_probability_labels_agree_with_the_formula(seed, smoothing):
    logits, _ = problem(seed)
    q = np.random.default_rng(seed).dirichlet(np.ones(7), 5).astype(np.float32)
    losses = jaxreg.smoothed_cross_entropy(logits, q, smoothing)
    np.testing.assert_allclose(losses, oracle(logits, q, smoothing), rtol=1e-5, atol=1e-5)


def test_gradient_agrees_with_the_closed_form():
    logits, labels = problem(0)
    grad = jax.grad(lambda x: jaxreg.smoothed_cross_entropy(x, labels, 0.2).sum())(logits)
    expected = jax.nn.softmax(logits) - 0.8 * jax.nn.one_hot(labels, 7) - 0.2 / 7
    chex.assert_trees_all_close(grad, expected, atol=1e-6)


LABELS = problem(0)[1]
ONE_HOT = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), 0.1)
Q = jax.nn.softmax(problem(1)[0])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((LABELS, 0.1), lambda x: optax.softmax_cross_entropy(x, ONE_HOT)),
        ((LABELS, 0.0), lambda x: optax.softmax_cross_entropy_with_integer_labels(x, LABELS)),
        ((Q, 0.0), lambda x: optax.softmax_cross_entropy(x, Q)),
    ],
    ids=["smoothed", "integers", "probabilities"],
)
def test_takes_the_place_of_optaxs(ours, theirs):
    """The README's table."""
    logits = problem(0)[0]
    loss = jaxreg.smoothed_cross_entropy
    chex.assert_trees_all_close(loss(logits, *ours), theirs(logits), rtol=1e-5)
    found = jax.grad(lambda x: loss(x, *ours).sum())(logits)
    expected = jax.grad(lambda x: theirs(x).sum())(logits)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_shift_of_the_logits_changes_nothing():
    logits, labels = problem(0)
    shifted = jnp.float32(1e4) + jnp.round(logits * 64) / 64  # exactly representable
    chex.assert_trees_all_close(
        jaxreg.smoothed_cross_entropy(shifted, labels, 0.1),
        jaxreg.smoothed_cross_entropy(shifted - 1e4, labels, 0.1),
        rtol=1e-6,
    )


def test_bf16_logits_give_a_float32_loss():
    logits, labels = problem(0, classes=1000)
    logits = logits.astype(jnp.bfloat16)
    losses = jaxreg.smoothed_cross_entropy(logits, labels, 0.1)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, oracle(logits, np.eye(1000)[labels], 0.1), rtol=1e-6)


def test_a_confident_bf16_prediction_keeps_its_gradient():
    logits = jnp.array([[9.0, 0.0]], jnp.bfloat16)
    grad = jax.grad(lambda x: jaxreg.smoothed_cross_entropy(x, jnp.array([0]), 0.0)[0])(logits)
    expected = -1 / (1 + np.exp(9.0))
    assert float(grad[0, 0]) == pytest.approx(expected, rel=2.0**-8)


def test_an_impossible_class_costs_nothing_without_smoothing():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    value, grad = jax.value_and_grad(
        lambda x: jaxreg.smoothed_cross_entropy(x, jnp.array([0]), 0.0)[0]
    )(logits)
    assert float(value) == pytest.approx(np.log(2))
    chex.assert_tree_all_finite(grad)
    q = jnp.array([[1.0, 0.0, 0.0]])
    assert float(jaxreg.smoothed_cross_entropy(logits, q, 0.0)[0]) == pytest.approx(np.log(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_that_do_not_sum_to_one_are_weights(smoothing):
    logits = jnp.array([[2.0, 0.0, 0.0]])
    for q in ([0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [1.0, 1.0, 0.5]):
        loss = jaxreg.smoothed_cross_entropy(logits, jnp.array([q]), smoothing)
        np.testing.assert_allclose(loss, oracle(logits, [q], smoothing), rtol=1e-6, atol=1e-7)


def test_the_derivative_by_the_smoothing_is_right_at_zero():
    logits, labels = jnp.array([[2.0, 0.0, 1.0]]), jnp.array([0])
    by_smoothing = jax.grad(lambda e, x: jaxreg.smoothed_cross_entropy(x, labels, e)[0])
    # L is affine in e: from the label's logit to the mean logit.
    assert float(by_smoothing(0.0, logits)) == pytest.approx(2.0 - 1.0)
    assert np.isfinite(by_smoothing(0.0, logits.at[0, 1].set(-jnp.inf)))


@given(seed=st.integers(0, 9999), smoothing=st.sampled_from([0.0, 0.1, 0.7]), soft=st.booleans())
@few
def test_options_agree_with_the_formula(seed, smoothing, soft):
    logits, labels = problem(seed)
    chosen = options(seed, np.asarray(labels))
    q = np.eye(7)[labels]
    given = labels
    if soft:
        q = np.random.default_rng(seed).dirichlet(np.ones(7), 5)
        q = np.where(np.broadcast_to(chosen.get("where", True), q.shape), q, 0)
        given = q.astype(np.float32)
    losses = jaxreg.smoothed_cross_entropy(logits, given, smoothing, **chosen)
    np.testing.assert_allclose(losses, oracle(logits, q, smoothing, **chosen), rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 9999),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    leading=st.sampled_from([(), (3,), (2, 3)]),
    classes=st.sampled_from([2, 7]),
    masked=st.booleans(),
    soft=st.booleans(),
    axis=st.integers(0, 2),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_dtype_and_mask_agrees_with_the_formula(
    seed, dtype, leading, classes, masked, soft, axis
):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(3 * rng.normal(size=(*leading, classes)), dtype)
    labels = rng.integers(0, classes, leading)
    exists = np.eye(classes, dtype=bool)[labels] | (rng.random(x.shape) < 0.5) | (not masked)
    q = np.eye(classes)[labels]
    if soft:
        q = np.where(exists, rng.dirichlet(np.ones(classes), leading or None), 0)
        q = q.astype(np.float32)
    axis = axis % x.ndim
    move = lambda a: jnp.moveaxis(jnp.asarray(a), -1, axis)  # noqa: E731
    losses = jaxreg.smoothed_cross_entropy(
        move(x), move(q) if soft else jnp.asarray(labels), 0.2, where=move(exists), axis=axis
    )
    assert losses.dtype == jnp.float32
    expected = oracle(x, q, 0.2, where=exists)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["integers", "probabilities"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_derivatives_of_all_orders_agree_with_those_of_the_formula(seed, soft, x64):
    """In every argument that is a number: gradients, and a Hessian by reverse over reverse."""
    rng = np.random.default_rng(seed)
    x, labels = jnp.asarray(2 * rng.normal(size=(3, 4))), jnp.asarray(rng.integers(0, 4, 3))
    q = jax.nn.one_hot(labels, 4) if not soft else jnp.asarray(rng.dirichlet(np.ones(4), 3))
    exists = None if seed % 2 else jnp.arange(4) < 4
    if seed % 3 == 0:
        exists = jax.nn.one_hot(labels, 4, dtype=bool) | jnp.asarray(rng.random((3, 4)) < 0.7)
        q = jnp.where(exists, q, 0)
    spread = "others" if seed % 2 else "uniform"

    def plain(x, q, e, z, c, w):
        x = c * jnp.tanh(x / c)
        mask = jnp.ones_like(x, bool) if exists is None else jnp.broadcast_to(exists, x.shape)
        lse = jax.nn.logsumexp(x, -1, where=mask, keepdims=True)
        number = mask.sum(-1, keepdims=True)
        share = 1 / number if spread == "uniform" else (1 - q) / jnp.maximum(number - 1, 1)
        v = w * jnp.where(mask, (1 - e) * q + e * share, 0)
        return jnp.sum(jnp.sin(jnp.sum(v * (lse - x), -1) + z * lse[:, 0] ** 2))

    def ours(x, q, e, z, c, w):
        q = q if exists is None else jnp.where(exists, q, 0)
        losses = jaxreg.smoothed_cross_entropy(
            x,
            q if soft else labels,
            e,
            z_loss=z,
            soft_cap=c,
            class_weights=w,
            where=exists,
            spread=spread,
        )
        return jnp.sum(jnp.sin(losses))

    at = (x, q, 0.2, 0.05, 5.0, jnp.asarray(rng.uniform(0.5, 2, 4)))
    numbers = (0, *([1] if soft else []), 2, 3, 4, 5)

    def first(function):
        return jax.jit(jax.value_and_grad(function, numbers))

    def second(function):
        return jax.jit(jax.jacrev(jax.grad(function, (0, 2, 5)), numbers))

    chex.assert_trees_all_close(first(ours)(*at), first(plain)(*at), rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(second(ours)(*at), second(plain)(*at), rtol=1e-8, atol=1e-10)
    forward, expected = jax.jit(jax.jacfwd(jax.jacfwd(ours))), jax.jit(jax.hessian(plain))
    chex.assert_trees_all_close(forward(*at), expected(*at), rtol=1e-8, atol=1e-10)


def exact_gradient(x, labels, smoothing, z_loss=0.0):
    """In which 1 - p of the label loses no digit: float64 has 16 of them."""
    x, rows = np.asarray(x, np.longdouble), np.arange(len(x))
    at = x[rows, labels][:, None]
    is_label = np.eye(x.shape[1], dtype=bool)[labels]
    rest = np.where(is_label, 0, np.exp(x - at)).sum(-1, keepdims=True)
    p = np.exp(x - at) / (1 + rest)
    lse = at + np.log1p(rest)
    gradient = p * (1 + 2 * z_loss * lse) - smoothing / x.shape[1]
    own = -(1 - smoothing) * rest / (1 + rest) + smoothing / (1 + rest)
    own += 2 * z_loss * lse / (1 + rest) - smoothing / x.shape[1]
    return np.where(is_label, own, gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("confident", [0.0, 14.0], ids=["ordinary", "p > 1 - 1e-6"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8)], ids=["f32", "bf16"]
)
def test_gradients_are_right_to_rounding(dtype, bound, confident, smoothing):
    for seed, classes in enumerate((2, 10, 1000)):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, classes, 64)
        x = rng.normal(size=(64, classes)).clip(-1, 1)
        x[np.arange(64), labels] += confident + np.log(classes) * (confident > 0)
        x = jnp.asarray(x, dtype)
        p = jax.nn.softmax(x.astype(jnp.float32))[np.arange(64), labels]
        assert not confident or p.max() > 1 - 1e-6
        for y in (jnp.asarray(labels), jax.nn.one_hot(labels, classes)):
            loss = functools.partial(
                jaxreg.smoothed_cross_entropy,
                labels=y,
                smoothing=smoothing,
                z_loss=1e-4,
                reduction="sum",
            )
            found = np.asarray(jax.jit(jax.grad(loss))(x), np.float64)
            exact = exact_gradient(x, labels, smoothing, 1e-4).astype(np.float64)
            error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
            assert error.max() <= bound


@pytest.mark.skipif(JAX < (0, 10), reason="XLA before jax 0.10 fuses less on a CPU")
@pytest.mark.parametrize("name", ["plain", "exact", "z_loss, ignored", "weights"])
def test_a_gradient_takes_no_memory_beside_itself(name):
    labels = jnp.arange(512)
    chosen = {"exact": {"smoothing": 0.0}, "z_loss, ignored": {"z_loss": 1e-4, "ignore_index": 0}}

    def loss(x, weights):
        weights = weights if name == "weights" else None
        return jaxreg.smoothed_cross_entropy(
            x, labels, **chosen.get(name, {}), class_weights=weights, reduction="mean"
        )

    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 8000), (8000,)))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 4 * 512 * 8000


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_examples_count_for_nothing_whatever_they_hold(reduction):
    logits, labels = problem(0)
    some = {"z_loss": 0.1, "class_weights": np.linspace(0.5, 2, 7), "reduction": reduction}
    ignored = labels.at[jnp.array([1, 3])].set(-100)
    spoilt = logits.at[1].set(jnp.nan).at[3, 2].set(jnp.inf)

    def loss(x):
        return jaxreg.smoothed_cross_entropy(x, ignored, ignore_index=-100, **some)

    kept = jnp.array([0, 2, 4])
    expected = jaxreg.smoothed_cross_entropy(logits[kept], labels[kept], **some)
    found = loss(spoilt)
    if reduction == "none":
        assert found[1] == found[3] == 0
        found = found[kept]
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    gradient = jax.grad(lambda x: loss(x).sum())(spoilt)
    np.testing.assert_array_equal(gradient[jnp.array([1, 3])], 0)
    chex.assert_trees_all_close(gradient[kept], jax.grad(lambda x: loss(x).sum())(logits)[kept])


def test_the_mean_of_nothing_is_zero():
    logits, labels = problem(0)
    all_ignored = functools.partial(
        jaxreg.smoothed_cross_entropy, labels=labels * 0 - 1, ignore_index=-1, reduction="mean"
    )
    value, gradient = jax.value_and_grad(all_ignored)(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    empty = jnp.zeros((0, 5)), jnp.zeros(0, int)
    assert jaxreg.smoothed_cross_entropy(*empty, reduction="mean") == 0


def test_what_is_masked_may_hold_anything_and_gets_no_mass():
    logits, _ = problem(0)
    exists = jnp.array([True, True, False, True, False, True, True])
    labels = jnp.array([0, 1, 3, 5, 6])
    spoilt = jnp.where(exists, logits, jnp.array([0, 0, jnp.nan, 0, jnp.inf, 0, 0]))

    def loss(x):
        return jaxreg.smoothed_cross_entropy(x, labels, 0.3, z_loss=0.01, where=exists)

    expected = loss(logits)
    places = jnp.cumsum(exists) - 1
    without = jaxreg.smoothed_cross_entropy(logits[:, exists], places[labels], 0.3, z_loss=0.01)
    chex.assert_trees_all_close(expected, without, rtol=1e-6)
    chex.assert_trees_all_close(loss(spoilt), expected)
    gradient = jax.grad(lambda x: loss(x).sum())(spoilt)
    np.testing.assert_array_equal(gradient[:, ~exists], 0)
    chex.assert_trees_all_close(
        gradient[:, exists], jax.grad(lambda x: loss(x).sum())(logits)[:, exists]
    )
    assert jnp.isinf(jaxreg.smoothed_cross_entropy(logits[0], jnp.array(2), where=exists))


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_the_classes_may_lie_along_any_axis(axis):
    logits, _ = problem(0, rows=24)
    logits = logits.reshape(2, 3, 4, 7)
    labels = jnp.arange(24).reshape(2, 3, 4) % 7
    moved = jnp.moveaxis(logits, -1, axis)
    some = {"z_loss": 0.1, "class_weights": np.linspace(0.5, 2, 7)}
    loss = jaxreg.smoothed_cross_entropy
    expected = loss(logits, labels, **some)
    chex.assert_trees_all_close(loss(moved, labels, axis=axis, **some), expected)
    q = jnp.moveaxis(jax.nn.one_hot(labels, 7), -1, axis)
    chex.assert_trees_all_close(loss(moved, q, axis=axis, **some), expected, rtol=1e-5)


def test_in_scan_vmap_and_remat():
    logits, labels = problem(0)
    each = jax.grad(lambda x, y: jaxreg.smoothed_cross_entropy(x, y, z_loss=0.1))
    expected = jnp.stack([each(x, y) for x, y in zip(logits, labels, strict=True)])
    chex.assert_trees_all_close(jax.vmap(each)(logits, labels), expected, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(jax.lax.map(lambda xy: each(*xy), (logits, labels)), expected)

    def whole(x):
        return jaxreg.smoothed_cross_entropy(x, labels, z_loss=0.1, reduction="sum")

    chex.assert_trees_all_close(jax.grad(jax.checkpoint(whole))(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("spec", "count"), [(("x", None), 1), ((None, "x"), 2)], ids=["tokens", "vocabulary"]
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_sharded_logits_are_never_gathered(kind, spec, count, reduction):
    """Tokens: one sum. Vocabulary: the maximum, and the other figures of a row together."""
    logits, labels = problem(0, rows=16, classes=32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))

    def loss(x):
        return jaxreg.smoothed_cross_entropy(x, labels, z_loss=0.1, reduction=reduction).sum()

    with jax.set_mesh(mesh):
        sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(*spec)))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(sharded).compile()
        found = compiled(sharded)
    chex.assert_trees_all_close(found, jax.value_and_grad(loss)(logits), rtol=1e-5, atol=1e-6)
    assert collectives(compiled) == {"all-reduce": count}
    assert found[1].sharding.is_equivalent_to(sharded.sharding, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("soft", [False, True], ids=["integers", "probabilities"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["tokens", "vocabulary"])
def test_options_of_sharded_logits_are_those_of_whole_ones(kind, soft, spec):
    logits, labels = problem(0, rows=16, classes=32)
    exists = jax.nn.one_hot(labels, 32, dtype=bool) | (jnp.arange(32) % 3 > 0)
    weights = jnp.linspace(0.5, 2, 32)
    q = jnp.where(exists, jax.nn.softmax(logits[::-1]), 0) if soft else labels

    def loss(x, q, exists, weights):
        return jaxreg.smoothed_cross_entropy(
            x, q, class_weights=weights, where=exists, soft_cap=5.0, z_loss=0.1, reduction="mean"
        )

    both = jax.value_and_grad(loss)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec(*spec))
        classes, rows = (NamedSharding(mesh, PartitionSpec(name)) for name in (spec[1], spec[0]))
        places = whole, whole if soft else rows, whole, classes
        args = [jax.device_put(*each) for each in zip((logits, q, exists, weights), places)]  # noqa: B905
        compiled = jax.jit(both).lower(*args).compile()
        found = compiled(*args)
    chex.assert_trees_all_close(found, both(logits, q, exists, weights), rtol=1e-5, atol=1e-7)
    assert set(collectives(compiled)) == {"all-reduce"}
    assert found[1].sharding.is_equivalent_to(args[0].sharding, 2)


def test_an_impossible_class_with_a_share_costs_infinity_and_without_nothing():
    logits, weights = jnp.array([[1.0, 0.0, -jnp.inf]]), jnp.array([1.0, 1.0, 0.0])
    loss = functools.partial(jaxreg.smoothed_cross_entropy, logits, jnp.array([0]), 0.3)
    assert loss()[0] == loss(class_weights=jnp.array([1.0, 1.0, 1e-6]))[0] == jnp.inf
    log_p = np.log(np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum())
    assert float(loss(class_weights=weights)[0]) == pytest.approx(-0.8 * log_p[0] - 0.1 * log_p[1])


def test_any_leading_shape():
    logits = jnp.zeros((2, 3, 4, 5))
    losses = jaxreg.smoothed_cross_entropy(logits, jnp.zeros((2, 3, 4), int))
    assert losses.shape == (2, 3, 4)
    assert jaxreg.smoothed_cross_entropy(jnp.zeros(5), jnp.array(2)).shape == ()
    assert jaxreg.smoothed_cross_entropy(jnp.zeros((0, 5)), jnp.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize("label", [-1, -100, 7, 100])
def test_a_label_out_of_range_is_an_error_or_nan_and_never_another_class(label):
    logits, _ = problem(0, rows=2)
    labels = jnp.array([0, label])
    with pytest.raises(ValueError, match=r"labels: got the value .*in \[0, 7\)"):
        jaxreg.smoothed_cross_entropy(logits, labels)
    traced = jax.jit(jaxreg.smoothed_cross_entropy)(logits, labels)
    assert np.isnan(traced).tolist() == [False, True]


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_labels_may_be_constants_of_a_jitted_function(array):
    logits, labels = problem(0)
    labels = array(labels)
    compiled = jax.jit(jax.grad(lambda x: jaxreg.smoothed_cross_entropy(x, labels).sum()))
    chex.assert_tree_all_finite(compiled(logits))
    wrong = array([0, 1, 2, 3, 7])
    with pytest.raises(ValueError, match="labels: got the value 7"):
        jax.jit(lambda x: jaxreg.smoothed_cross_entropy(x, wrong))(logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.zeros((2, 3)), jnp.zeros(2, int), 1.0), r"smoothing: got 1.0; .*\[0, 1\)"),
        ((jnp.zeros((2, 3)), jnp.zeros(2, int), float("nan")), "smoothing: got nan"),
        ((jnp.zeros((2, 3)), jnp.zeros(3, int)), r"labels: .*shape \(3,\).*shape \(2,\)"),
        ((jnp.zeros((2, 3)), jnp.zeros((2, 4))), r"labels: .*shape \(2, 4\)"),
        ((jnp.zeros((2, 3)), jnp.zeros(2, bool)), "labels: .*bool"),
        ((jnp.zeros((2, 3)), jnp.zeros((2, 3), int)), r"labels: .*floating probabilities"),
        ((jnp.zeros((2, 3)), jnp.zeros(3, int)), r"labels: .*classes are along axis=0\."),
        ((jnp.zeros((2, 3)), None), r"labels: got None; accepted: integers of shape \(2,\)"),
        ((jnp.zeros((2, 3)), jnp.array([0, -100])), r"labels: .*; ignore_index=-100 leaves"),
        (("logits", jnp.zeros(2, int)), "logits: got 'logits'; accepted: a real floating"),
        ((jnp.zeros((2, 3)), -jnp.ones((2, 3))), "labels: .*-1.0; accepted: finite numbers >= 0"),
        ((jnp.zeros((2, 3), int), jnp.zeros(2, int)), "logits: .*int32.*real floating"),
        ((jnp.zeros(()), jnp.zeros((), int)), "logits: got"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxreg.smoothed_cross_entropy(*arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"z_loss": -1.0}, r"z_loss: got -1.0; accepted: .*>= 0"),
        ({"soft_cap": 0.0}, "soft_cap: got 0.0"),
        ({"ignore_index": 0.5}, "ignore_index: got 0.5; accepted: an integer"),
        ({"class_weights": np.ones(4)}, r"class_weights: .*shape \(4,\).*3 finite numbers"),
        ({"class_weights": {"cat": 2.0}}, r"class_weights: got {'cat': 2.0}; .*3 finite numbers"),
        ({"class_weights": np.array([1.0, -1.0, 1.0])}, "class_weights: .*-1.0"),
        ({"where": np.ones(4, bool)}, r"where: .*shape \(4,\).*\(2, 3\)"),
        ({"where": np.ones(3)}, "where: .*float64.*bools"),
        ({"axis": 2}, "axis: got 2"),
        ({"spread": "uniformly"}, r"spread: got 'uniformly' \(did you mean 'uniform'"),
        ({"reduction": "avg"}, "reduction: got 'avg'"),
    ],
)
def test_bad_options_are_named(bad, message):
    with pytest.raises(jaxreg.ArgumentError, match=message):
        jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int), **bad)


def test_ignore_index_is_for_integer_labels():
    with pytest.raises(jaxreg.ArgumentError, match="ignore_index: got -1 with labels"):
        jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2, 3)), ignore_index=-1)
    message = r"labels: got the value 3; accepted: integers of shape \(2,\) in \[0, 3\) or -1"
    with pytest.raises(jaxreg.ArgumentError, match=message):
        jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.array([3, -1]), ignore_index=-1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32])
def test_labels_of_few_bits_count_many_classes(dtype):
    logits, _ = problem(0, rows=3, classes=70_000 if dtype == np.uint16 else 300)
    labels, wide = np.array([5, 43, 100], dtype), jnp.array([5, 43, 100])
    both = jax.jit(jax.value_and_grad(lambda x, y: jaxreg.smoothed_cross_entropy(x, y).sum()))
    chex.assert_trees_all_close(both(logits, labels), both(logits, wide))
    fused = jax.jit(lambda y: jaxreg.linear_cross_entropy(jnp.eye(3), logits, y))
    chex.assert_trees_all_close(fused(labels), fused(wide))


def test_second_derivatives_by_reverse_over_reverse_pass_over_ignored_rows():
    logits, labels = problem(0)
    ignored = labels.at[1].set(-1)

    def size(x):
        loss = lambda x: jaxreg.smoothed_cross_entropy(x, ignored, ignore_index=-1).sum()  # noqa: E731
        return jnp.sum(jax.grad(loss)(x) ** 2)

    found = jax.grad(size)(logits.at[1].set(jnp.nan))
    chex.assert_trees_all_close(found, jax.grad(size)(logits).at[1].set(0))


def test_labels_may_be_a_list():
    with pytest.raises(jaxreg.ArgumentError, match="labels: got the value 7"):
        jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), [0, 7])


def test_hints_name_what_there_is():
    """No axis where it is the dtype that does not fit, nothing ignored that may be a class."""
    online = jaxreg.online_label_smoothing(3)
    calls = [
        lambda: jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2)),
        lambda: jaxreg.smoothed_cross_entropy(jnp.zeros((3, 3)), jnp.zeros(3, bool)),
        lambda: jaxreg.smoothed_cross_entropy(jnp.zeros((2, 3)), jnp.array([1, 3])),
        lambda: jaxreg.linear_cross_entropy(
            jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(5, int)
        ),
        lambda: online.loss(online.init(), jnp.zeros((2, 3)), jnp.zeros(3, int)),
        lambda: online.loss(online.init(), jnp.zeros((2, 3)), jnp.array([0, -1])),
    ]
    for call in calls:
        with pytest.raises(jaxreg.ArgumentError) as error:
            call()
        assert error.value.name == "labels"
        assert ";" not in error.value.accepted


@pytest.mark.parametrize("soft", [False, True], ids=["integers", "probabilities"])
def test_a_class_that_is_alone_keeps_all_of_its_share(soft):
    """There are no others to be given a part of it."""
    logits = jnp.array([[0.5, 3.0, -1.0]])
    only = jnp.array([False, True, False])
    labels = jnp.array([[0.0, 1.0, 0.0]]) if soft else jnp.array([1])

    def loss(logits):
        options = {"spread": "others", "where": only, "reduction": "sum"}
        return jaxreg.smoothed_cross_entropy(logits, labels, 0.2, **options)

    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 3)))
