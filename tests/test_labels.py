"""Labels that are smoothed, mixed or learned, against their formulas in NumPy float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxreg
import jaxreg.compat.optax as compat

few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 is the same for all
)
INF, NAN = np.inf, np.nan


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# smooth_labels ------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 99),
    layout=st.sampled_from([((4,), 0), ((3, 4), -1), ((4, 3), 0), ((0, 4), 1)]),
    dtype=st.sampled_from([np.float64, np.float32, jnp.bfloat16, np.float16]),
    smoothing=st.sampled_from([0.0, 0.1, 0.75]),
    spread=st.sampled_from(["uniform", "others"]),
    masked=st.booleans(),
)
@few
def test_smoothed_labels_agree_with_the_formula(
    seed, layout, dtype, smoothing, spread, masked, x64
):
    (shape, axis), rng = layout, np.random.default_rng(seed)
    labels = jnp.asarray(rng.dirichlet(np.ones(4), np.delete(shape, axis)), dtype)
    exist = rng.random(labels.shape) < (0.6 if masked else 1)
    q, number = np.asarray(labels).astype(np.float64), exist.sum(-1, keepdims=True)
    if spread == "uniform":
        share = exist / np.maximum(number, 1)
        expected = np.where(number > 0, (1 - smoothing) * q + smoothing * share, q)
    else:
        share = exist * (1 - q) / np.maximum(number - 1, 1)
        expected = np.where(number > 1, (1 - smoothing) * q + smoothing * share, q)
    found = jaxreg.smooth_labels(
        jnp.moveaxis(labels, -1, axis),
        smoothing,
        where=jnp.moveaxis(jnp.asarray(exist), -1, axis) if masked else None,
        axis=axis,
        spread=spread,
    )
    assert found.dtype == dtype
    # A few roundings in float32 at least of numbers up to 1, and the last one.
    tolerance = float(jnp.finfo(dtype).eps) / 2 + 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(found).astype(np.float64), axis, -1),
        expected,
        atol=tolerance if dtype != np.float64 else 1e-15,
    )


def test_smoothed_labels_are_what_the_cross_entropy_smooths_to(x64):
    logits, labels = np.random.default_rng(0).normal(size=(3, 4)), np.array([0, 3, 1])
    exist = np.array([True, True, False, True])
    for spread in ("uniform", "others"):
        options = {"where": exist, "spread": spread}
        soft = jaxreg.smooth_labels(jax.nn.one_hot(labels, 4, dtype=float), 0.3, **options)
        np.testing.assert_allclose(
            jaxreg.smoothed_cross_entropy(logits, soft, 0.0, where=exist),
            jaxreg.smoothed_cross_entropy(logits, labels, 0.3, **options),
            rtol=1e-14,
        )


def test_agrees_with_optax_and_its_compatible_form():
    labels = jax.nn.one_hot(jnp.array([0, 2]), 3)
    ours = jaxreg.smooth_labels(labels, 0.3)
    np.testing.assert_allclose(ours, optax.smooth_labels(labels, 0.3), rtol=1e-6)
    exist = jnp.array([[True, False, True], [False] * 3])
    ours = jaxreg.smooth_labels(labels, 0.3, where=exist)
    np.testing.assert_allclose(ours, compat.smooth_labels(labels, 0.3, where=exist), rtol=1e-6)


@pytest.mark.parametrize("spread", ["uniform", "others"])
def test_the_slope_of_smoothed_labels_is_right_also_where_no_class_exists(spread):
    exist = jnp.array([[True, True, True], [False] * 3])
    labels = jax.nn.one_hot(jnp.array([0, 2]), 3)
    slope = jax.jacobian(lambda e: jaxreg.smooth_labels(labels, e, where=exist, spread=spread))
    expected = [-2 / 3, 1 / 3, 1 / 3] if spread == "uniform" else [-1.0, 0.5, 0.5]
    np.testing.assert_allclose(slope(0.1), [expected, [0.0] * 3], rtol=1e-6)


@pytest.mark.parametrize("spread", ["uniform", "others"])
def test_an_ignored_row_without_classes_costs_nothing_whatever_the_smoothing(spread):
    exist = jnp.array([[True, True], [False, False]])
    logits, labels = jnp.array([[1.0, 2.0], [NAN, NAN]]), jnp.array([1, -1])

    def total(x, e):
        options = {"ignore_index": -1, "where": exist, "spread": spread, "reduction": "sum"}
        return jaxreg.smoothed_cross_entropy(x, labels, e, **options)

    def alone(x, e):
        return jaxreg.smoothed_cross_entropy(x, labels[:1], e, spread=spread)[0]

    value, (by_x, by_e) = jax.value_and_grad(total, (0, 1))(logits, 0.2)
    expected, (by_row, by_own) = jax.value_and_grad(alone, (0, 1))(logits[:1], 0.2)
    np.testing.assert_allclose([value, by_e], [expected, by_own], rtol=1e-6)
    np.testing.assert_allclose(by_x, jnp.concatenate([by_row, jnp.zeros((1, 2))]), atol=1e-7)


# mixup --------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y, OTHER = np.array([0, 1, 2, 0]), np.array([2, 1, 0, 1])


@pytest.mark.parametrize(
    "weight", [0, 1.0, 0.25, [0.0, 1.0, 0.5, 0.125]], ids=["0", "1", "one", "each"]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_is_the_loss_against_mixed_labels(weight, smoothing):
    share = np.broadcast_to(weight, 4)[:, None]
    mixed = share * np.eye(3)[Y] + (1 - share) * np.eye(3)[OTHER]
    q = (1 - smoothing) * mixed + smoothing / 3
    log_p = log_softmax(X.astype(np.float64))
    loss = functools.partial(jaxreg.smoothed_cross_entropy, smoothing=smoothing)

    def total(x, reduction):
        found = jaxreg.mixup_loss(x, Y, OTHER, weight, loss=loss, reduction=reduction)
        return found.sum(), found

    losses = -(q * log_p).sum(-1)
    for reduction, expected in (("none", losses), ("mean", losses.mean()), ("sum", losses.sum())):
        gradient, found = jax.grad(total, has_aux=True)(X, reduction)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        per = 4 if reduction == "mean" else 1
        np.testing.assert_allclose(gradient, (np.exp(log_p) - q) / per, atol=1e-6)


def test_a_weight_of_each_sequence_holds_for_all_of_its_tokens():
    logits, labels, other = np.stack([X, 2 * X]), np.stack([Y, Y]), np.stack([OTHER, OTHER])
    found = jaxreg.mixup_loss(logits, labels, other, jnp.array([0.25, 1.0]))
    each = [jaxreg.mixup_loss(X, Y, OTHER, 0.25), jaxreg.smoothed_cross_entropy(2 * X, Y)]
    np.testing.assert_allclose(found, each, rtol=1e-6)
    with pytest.raises(jaxreg.ArgumentError, match=r"weight: .*shape \(4,\).*\(2, 4\)"):
        jaxreg.mixup_loss(logits, labels, other, jnp.ones(4))


def test_one_example_at_a_time_and_a_loss_that_reduces_may_be_mixed_by_one_weight():
    q, other = np.eye(3)[Y].astype(np.float32), np.eye(3)[OTHER].astype(np.float32)
    each = jax.vmap(lambda x, a, b: jaxreg.mixup_loss(x, a, b, 0.25))(X, q, other)
    expected = jaxreg.mixup_loss(X, Y, OTHER, 0.25)
    np.testing.assert_allclose(each, expected, rtol=1e-6)
    mean = jaxreg.mixup_loss(X, Y, OTHER, 0.25, loss=MEAN)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-6)


def test_the_slope_by_the_weight_is_the_difference_of_the_losses():
    slope = jax.jit(jax.jacobian(lambda w: jaxreg.mixup_loss(X, Y, OTHER, w)))(0.3)
    first, second = (jaxreg.smoothed_cross_entropy(X, y) for y in (Y, OTHER))
    np.testing.assert_allclose(slope, first - second, atol=1e-6)


def test_an_infinite_loss_without_a_weight_costs_nothing():
    logits, hard = jnp.array([[0.0, -INF]]), functools.partial(jaxreg.focal_loss, gamma=0.0)
    for labels, weight in (((0, 1), 1.0), ((1, 0), 0.0)):
        first, second = (jnp.array([y]) for y in labels)
        call = lambda x: jaxreg.mixup_loss(x, first, second, weight, loss=hard)[0]  # noqa: B023, E731
        value, gradient = jax.value_and_grad(call)(logits)
        assert value == 0
        np.testing.assert_array_equal(gradient, [[0.0, 0.0]])


# Online label smoothing ---------------------------------------------------------------------------

BATCHES, ROWS, CLASSES = 4, 8, 3


def batches(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, (BATCHES, ROWS))  # the last class has no example
    logits = 2 * rng.normal(size=(BATCHES, ROWS, CLASSES)) + 2 * np.eye(CLASSES)[labels]
    return logits.astype(np.float32), labels


def online_losses_by_a_loop(epochs, hard, smoothing):
    """Example by example."""
    soft = np.full((CLASSES, CLASSES), smoothing / (CLASSES - 1))
    np.fill_diagonal(soft, 1 - smoothing)
    losses = []
    for logits, labels in epochs:
        total, number = np.zeros((CLASSES, CLASSES)), np.zeros(CLASSES)
        for x, y in zip(logits.reshape(-1, CLASSES), labels.ravel(), strict=True):
            log_p = log_softmax(x.astype(np.float64))
            losses.append(-hard * log_p[y] - (1 - hard) * (soft[y] * log_p).sum())
            if x.argmax() == y:
                total[y] += np.exp(log_p)
                number[y] += 1
        for y in range(CLASSES):
            if number[y]:
                soft[y] = total[y] / number[y]
    return np.array(losses).reshape(len(epochs), BATCHES, ROWS), soft


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_online_labels_agree_with_a_plain_loop_over_epochs(hard):
    online = jaxreg.online_label_smoothing(CLASSES, hard, smoothing=0.2)
    epochs = [batches(seed) for seed in range(3)]
    expected, soft = online_losses_by_a_loop(epochs, hard, 0.2)
    step, next_epoch = jax.jit(online.loss), jax.jit(online.next_epoch)
    state, found = jax.jit(online.init)(), []
    for logits, labels in epochs:
        for batch in zip(logits, labels, strict=True):
            losses, state = step(state, *batch)
            found.append(losses)
        state = next_epoch(state)
    np.testing.assert_allclose(np.reshape(found, expected.shape), expected, rtol=1e-5)
    np.testing.assert_allclose(state.soft, soft, rtol=1e-5)
    assert not np.any(state.total)
    assert not np.any(state.number)


def test_the_state_can_be_scanned_over_and_does_not_depend_on_the_shape_of_batches():
    online, (logits, labels) = jaxreg.online_label_smoothing(CLASSES), batches(0)

    def step(state, batch):
        losses, state = online.loss(state, *batch)
        return state, losses

    scanned, losses = jax.lax.scan(step, online.init(), (logits, labels))
    whole, state = online.loss(online.init(), logits, labels)
    np.testing.assert_allclose(losses, whole, rtol=1e-6)
    chex.assert_trees_all_close(scanned, state, rtol=1e-6)
    for reduction, expected in (("mean", whole.mean()), ("sum", whole.sum())):
        reduced, same = online.loss(online.init(), logits, labels, reduction)
        np.testing.assert_allclose(reduced, expected, rtol=1e-6)
        chex.assert_trees_all_equal(same, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_online_labels_of_other_dtypes(dtype, x64):
    online, (logits, labels) = jaxreg.online_label_smoothing(CLASSES), batches(0)
    logits = jnp.asarray(logits, dtype)
    expected, _ = online_losses_by_a_loop([(np.asarray(logits).astype(float), labels)], 0.5, 0.1)
    losses, state = online.loss(online.init(), logits, labels)
    assert losses.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, online.init())


def test_no_gradient_flows_into_the_labels():
    online, (logits, labels) = jaxreg.online_label_smoothing(CLASSES, 0.25), batches(1)
    _, state = online.loss(online.init(), logits[0], labels[0])
    state = online.next_epoch(state)

    def total(x, state):
        losses, state = online.loss(state, x, labels[0])
        return losses.sum() + jnp.sum(jnp.square(online.next_epoch(state).soft))

    gradient = jax.grad(total)(logits[0], state)
    q = 0.25 * np.eye(CLASSES)[labels[0]] + 0.75 * state.soft[labels[0]]
    expected = np.exp(log_softmax(logits[0].astype(np.float64))) - q
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("logit", [NAN, INF])
def test_an_example_that_is_not_finite_changes_no_labels(logit):
    online, (logits, labels) = jaxreg.online_label_smoothing(CLASSES), batches(0)
    bad = jnp.asarray(logits[0]).at[2].set(logit).at[3, labels[0][3]].set(logit)
    rest = np.delete(np.arange(ROWS), [2, 3])
    losses, state = online.loss(online.init(), bad, labels[0])
    expected, wanted = online.loss(online.init(), logits[0][rest], labels[0][rest])
    assert np.isnan(losses[2:4]).all()
    np.testing.assert_allclose(losses[rest], expected, rtol=1e-6)
    chex.assert_trees_all_close(state, wanted, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, CLASSES])
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_a_traced_label_that_is_no_class_gives_nan_and_changes_no_labels(label, hard):
    online, (logits, labels) = jaxreg.online_label_smoothing(CLASSES, hard), batches(0)
    wrong, step = labels[0].copy(), jax.jit(online.loss)
    wrong[0] = label
    losses, state = step(online.init(), logits[0], wrong)
    _, wanted = step(online.init(), logits[0][1:], labels[0][1:])
    assert np.isnan(losses).tolist() == [True] + [False] * (ROWS - 1)
    chex.assert_trees_all_close(state, wanted, rtol=1e-6)
    with pytest.raises(jaxreg.ArgumentError, match="labels: got the value"):
        online.loss(online.init(), logits[0], wrong)


def test_an_empty_batch_changes_nothing():
    online = jaxreg.online_label_smoothing(CLASSES)
    losses, state = online.loss(online.init(), jnp.zeros((0, CLASSES)), jnp.zeros(0, int))
    assert losses.shape == (0,)
    chex.assert_trees_all_equal(online.next_epoch(state), online.init())


# Bad input ----------------------------------------------------------------------------------------

ONLINE = jaxreg.online_label_smoothing(3)
IGNORING = functools.partial(jaxreg.smoothed_cross_entropy, ignore_index=-1)
MEAN = functools.partial(jaxreg.smoothed_cross_entropy, reduction="mean")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: jaxreg.smooth_labels(Y), "labels"),
        (lambda: jaxreg.smooth_labels(jnp.ones(())), "labels"),
        (lambda: jaxreg.smooth_labels(X, 1.0), "smoothing"),
        (lambda: jaxreg.smooth_labels(X, NAN), "smoothing"),
        (lambda: jaxreg.smooth_labels(X, where=jnp.ones(3)), "where"),
        (lambda: jaxreg.smooth_labels(X, where=jnp.ones(2, bool)), "where"),
        (lambda: jaxreg.smooth_labels(X, axis=2), "axis"),
        (lambda: jaxreg.smooth_labels(X, axis=None), "axis"),
        (lambda: jaxreg.smooth_labels(X, spread="all"), "spread"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, 1.5), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, -0.5), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, [0.5, 0.5, NAN, 0.5]), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, jnp.ones(3)), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, jnp.ones((4, 1))), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, None), "weight"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, 0.5, loss="focal"), "loss"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, 0.5, reduction="average"), "reduction"),
        (lambda: jaxreg.mixup_loss(X, Y + 3, OTHER, 0.5), "labels"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER + 3, 0.5), "other_labels"),
        (lambda: jaxreg.mixup_loss(X, Y, np.eye(3)[Y], 0.5, loss=IGNORING), "ignore_index"),
        (lambda: jaxreg.mixup_loss(X, Y, OTHER, jnp.ones(4), loss=MEAN), "loss"),
        (lambda: jaxreg.online_label_smoothing(1), "classes"),
        (lambda: jaxreg.online_label_smoothing(2.0), "classes"),
        (lambda: jaxreg.online_label_smoothing(3, 1.0), "hard"),
        (lambda: jaxreg.online_label_smoothing(3, smoothing=1.0), "smoothing"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros((2, 4)), jnp.zeros(2, int)), "logits"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros(()), jnp.zeros((), int)), "logits"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros((2, 3), int), jnp.zeros(2, int)), "logits"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros((2, 3)), jnp.zeros(3, int)), "labels"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros((2, 3)), jnp.zeros((2, 3))), "labels"),
        (lambda: ONLINE.loss(ONLINE.init(), jnp.zeros((2, 3)), [0, 3]), "labels"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(jaxreg.ArgumentError) as error:
        call()
    assert message(error).startswith(f"{name}: got ")
