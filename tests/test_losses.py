"""Losses of predicted classes against their formulas, written out in NumPy float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

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

few = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 is the same for all
)
INF, NAN = np.inf, np.nan
DTYPES = (np.float64, np.float32, jnp.bfloat16, np.float16)
REDUCTIONS = ("none", "mean", "sum")


# Oracles: logits (..., K), where the classes that do not exist are -inf, and labels (...) ---------


def log_softmax(x):
    largest = x.max(-1, keepdims=True)
    x = x - np.where(largest == -INF, 0, largest)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x == -INF, -INF, x - np.log(np.exp(x).sum(-1, keepdims=True)))


def times(q, log):
    """What has no share costs nothing, also where its logarithm is infinite."""
    return np.where(q == 0, 0, q * np.where(q == 0, 0, log))


def focal(x, exist, y, gamma):
    nll = -np.take_along_axis(log_softmax(x), y[..., None], -1)[..., 0]
    return (1 - np.exp(-nll)) ** gamma * nll


def poly(x, exist, y, epsilon, smoothing):
    log_p = log_softmax(x)
    uniform = exist / np.maximum(exist.sum(-1, keepdims=True), 1)
    q = (1 - smoothing) * (np.arange(x.shape[-1]) == y[..., None]) + smoothing * uniform
    return (-times(q, log_p) + epsilon * q * (1 - np.exp(log_p))).sum(-1)


def entropy(x, exist, y):
    log_p = log_softmax(x)
    return -times(np.exp(log_p), log_p).sum(-1)


def symmetric_kl(x, exist, y):
    log_p, log_q = log_softmax(x), log_softmax(opposite(x, np))
    with np.errstate(invalid="ignore"):
        forward = times(np.exp(log_p), log_p - log_q)
        return (forward + times(np.exp(log_q), log_q - log_p)).sum(-1) / 2


def opposite(x, numpy=jnp):
    """Other logits, exact in every dtype."""
    return numpy.where(x == -INF, x, -x / 2)


class Loss(NamedTuple):
    """``call(logits, labels, *numbers, **options)``, and the same as an oracle."""

    call: Callable[..., jax.Array]
    oracle: Callable[..., np.ndarray]
    numbers: tuple[float, ...] = ()
    labelled: bool = False
    """Whether it takes labels, and ignores some."""


LOSSES = {
    "focal": Loss(jaxreg.focal_loss, focal, (2.0,), labelled=True),
    "focal, gamma below 1": Loss(jaxreg.focal_loss, focal, (0.6,), labelled=True),
    "poly": Loss(jaxreg.poly_loss, poly, (1.5, 0.2), labelled=True),
    "poly, hard": Loss(jaxreg.poly_loss, poly, (-1.0, 0.0), labelled=True),
    "entropy": Loss(lambda x, y, **o: jaxreg.entropy(x, **o), entropy),
    "confidence": Loss(
        lambda x, y, b, **o: jaxreg.confidence_penalty(x, b, **o),
        lambda x, exist, y, b: -b * entropy(x, exist, y),
        (0.3,),
    ),
    "symmetric_kl": Loss(lambda x, y, **o: jaxreg.symmetric_kl(x, opposite(x), **o), symmetric_kl),
}
every = pytest.mark.parametrize("name", LOSSES)
SHAPES = [((5,), 0), ((3, 5), -1), ((5, 3), 0), ((2, 5, 2), 1), ((0, 5), -1)]


class Problem(NamedTuple):
    """What a loss takes, and what its oracle takes: classes last, float64."""

    logits: jax.Array
    labels: np.ndarray
    options: dict[str, Any]
    x: np.ndarray
    exist: np.ndarray

    def expected(self, loss: Loss, *numbers: float, x: Any = None) -> np.ndarray:
        x = np.where(self.exist, self.x if x is None else x, -INF)
        losses = loss.oracle(x, self.exist, self.labels, *(numbers or loss.numbers))
        return np.where(self.counts(loss), losses, 0)

    def counts(self, loss: Loss) -> np.ndarray:
        return self.labels >= 0 if loss.labelled else np.full(self.labels.shape, True)

    def call(self, loss: Loss, *numbers: Any, logits: Any = None, **options: Any) -> jax.Array:
        logits = self.logits if logits is None else logits
        options = {"ignore_index": -1, **options} if loss.labelled else options
        numbers = numbers or loss.numbers
        return loss.call(logits, self.labels, *numbers, **self.options, **options)


def problem(seed, shape=(4, 5), axis=-1, dtype=np.float64, scale=3.0, shift=0.0, **kinds):
    """Logits that are NaN where classes do not exist, and examples that are ignored (label -1).

    A row without any class is ignored.
    """
    rng = np.random.default_rng(seed)
    x = np.moveaxis(scale * rng.normal(size=shape), axis, -1) + shift
    if kinds.get("impossible"):
        x = np.where(rng.random(x.shape) < 0.3, -INF, x)
    x = np.asarray(jnp.asarray(x, dtype)).astype(np.float64)
    exist = rng.random(x.shape) < (0.7 if kinds.get("masked") else 1)
    labels = rng.integers(-1, 5, x.shape[:-1])
    labels = np.where((exist & (x > -INF)).any(-1), labels, -1)
    given = jnp.moveaxis(jnp.asarray(np.where(exist, x, NAN), dtype), -1, axis)
    options = {"axis": axis}
    if kinds.get("masked"):
        options["where"] = jnp.moveaxis(jnp.asarray(exist), -1, axis)
    return Problem(given, labels, options, x, exist)


@st.composite
def problems(draw):
    shape, axis = draw(st.sampled_from(SHAPES))
    return problem(
        draw(st.integers(0, 999)),
        shape,
        axis,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([0.1, 3.0, 30.0])),
        draw(st.sampled_from([0.0, 1e4])),
        masked=draw(st.booleans()),
        impossible=draw(st.booleans()),
    )


def accuracy(case, loss):
    """Of float32 at least: that of the log-probabilities, which are sums of K exponentials whose
    arguments are up to the logits' range, times the loss's derivative in them."""
    x = np.where(case.exist & (case.x > -INF), case.x, NAN)
    extent = np.nan_to_num(np.nanmax(x, -1) - np.nanmin(x, -1)).max(initial=0) if x.size else 0.0
    eps = np.finfo(np.float64 if case.logits.dtype == np.float64 else np.float32).eps
    factor = 1 + 1.5 * extent if loss.oracle is symmetric_kl else 2.5
    return 2 * eps * (x.shape[-1] + extent) * factor


@every
@given(case=problems())
@few
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_agrees_with_the_formula(name, case, x64):
    loss = LOSSES[name]
    expected, counts = case.expected(loss), case.counts(loss)
    mean = expected.sum() / max(counts.sum(), 1)
    tolerance = accuracy(case, loss)
    for reduction, wanted in zip(REDUCTIONS, (expected, mean, expected.sum()), strict=True):
        found = case.call(loss, reduction=reduction)
        assert found.dtype == (np.float64 if case.logits.dtype == np.float64 else np.float32)
        atol = tolerance * (expected.size if reduction == "sum" else 1)
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=atol)


def central(function, x, step):
    """The derivatives of a function of an array by central differences, (x's shape, outputs)."""
    directions = np.eye(x.size).reshape(x.size, *x.shape) * step
    return np.stack([(function(x + d) - function(x - d)) / (2 * step) for d in directions])


# Of values of about 10 in float64: truncation is step^2 / 6 times a third derivative of about 10,
# rounding 10 * 1e-16 / step.
STEP, CLOSE = 1e-5, 2e-9


@every
@pytest.mark.parametrize("kinds", [{}, {"masked": True, "impossible": True}], ids=["all", "some"])
def test_gradient_and_hessian_are_right(name, kinds, x64):
    loss = LOSSES[name]
    # With smoothing an impossible class costs infinity.
    case = problem(3, **(kinds if name != "poly" else {"masked": bool(kinds)}))
    counts = case.counts(loss)[:, None] & case.exist & (case.x > -INF)
    counts &= np.isfinite(case.expected(loss))[:, None]  # a label among the impossible ones
    assert counts.any()
    rows = counts.any(-1)

    def total(x):
        return jnp.sum(jnp.where(rows, case.call(loss, logits=x), 0))

    def oracle(x):
        return np.where(rows, case.expected(loss, x=x), 0).sum()

    gradient = jax.jit(jax.grad(total))
    expected = np.where(counts, central(oracle, case.x, STEP).reshape(4, 5), 0)
    np.testing.assert_allclose(gradient(case.logits), expected, atol=CLOSE)
    hessian = jax.jit(jax.hessian(total))(case.logits).reshape(20, 4, 5)
    slopes = central(lambda x: np.asarray(gradient(jnp.where(case.exist, x, NAN))), case.x, STEP)
    np.testing.assert_allclose(hessian, slopes, atol=CLOSE)


@every
def test_derivatives_by_the_numbers_are_right(name, x64):
    loss, case = LOSSES[name], problem(4, masked=True)
    finite = np.isfinite(case.expected(loss))
    numbers = np.array([0.4 if n == 0 else n for n in loss.numbers])
    if not numbers.size:
        return

    def oracle(numbers):
        return np.where(finite, case.expected(loss, *numbers), 0).sum()

    def total(numbers):
        return jnp.sum(jnp.where(finite, case.call(loss, *numbers), 0))

    found = jax.jit(jax.grad(total))(jnp.asarray(numbers))
    np.testing.assert_allclose(found, central(oracle, numbers, STEP), atol=CLOSE)


@every
def test_a_shift_of_the_logits_changes_nothing(name):
    loss, case = LOSSES[name], problem(0, dtype=np.float32)
    if name == "symmetric_kl":
        loss = Loss(lambda x, y, **o: jaxreg.symmetric_kl(x, x[::-1], **o), symmetric_kl)
    logits = jnp.round(case.logits * 64) / 64
    shifted = logits + 1e4  # exactly representable
    chex.assert_trees_all_close(
        case.call(loss, logits=shifted), case.call(loss, logits=shifted - 1e4), rtol=1e-6
    )


@every
def test_nothing_at_all_costs_nothing_and_has_no_gradient(name):
    """Rows without classes; labels that are all ignored; no rows."""
    loss = LOSSES[name]
    rows = problem(0, dtype=np.float32)
    nothing = rows._replace(labels=np.full(4, -1), logits=jnp.full((4, 5), NAN))
    masked = nothing._replace(options={"where": jnp.zeros((4, 5), bool)})
    empty = problem(0, shape=(0, 5), dtype=np.float32)
    cases = [masked, empty] + ([nothing] if loss.labelled else [])
    for case in cases:
        for reduction in REDUCTIONS:

            def total(x, numbers, case=case, reduction=reduction):
                return jnp.sum(case.call(loss, *numbers, logits=x, reduction=reduction))

            numbers = tuple(map(jnp.float32, loss.numbers))
            value, gradients = jax.value_and_grad(total, (0, 1))(case.logits, numbers)
            assert value == 0
            chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


@every
def test_nan_is_not_hidden(name):
    loss, case = LOSSES[name], problem(0, dtype=np.float32)
    case = case._replace(labels=np.array([0, 1, 2, 3]))
    found = case.call(loss, logits=case.logits.at[1, 2].set(NAN))
    assert np.isnan(found).tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].labelled])
@pytest.mark.parametrize("label", [-2, 5, 100])
def test_a_label_that_is_no_class_is_an_error_or_nan(name, label):
    call, logits = LOSSES[name].call, problem(0, dtype=np.float32).logits
    labels = jnp.array([0, label, -1, 1])
    with pytest.raises(jaxreg.ArgumentError, match=f"labels: got the value {label};"):
        call(logits, labels, ignore_index=-1)
    found = jax.jit(lambda labels: call(logits, labels, ignore_index=-1))(labels)
    assert np.isnan(found).tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].labelled])
def test_an_impossible_label_costs_infinity_and_has_the_slope_of_its_cross_entropy(name):
    """The other factor of the focal loss is 1 there, and so flat that its slope is 0."""
    logits, labels = jnp.array([[0.0, 1.0, -INF]]), jnp.array([2])
    numbers = LOSSES[name].numbers[:1]

    def total(x):
        return LOSSES[name].call(x, labels, *numbers)[0]

    value, gradient = jax.value_and_grad(total)(logits)
    assert value == INF
    expected = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 3)
    chex.assert_trees_all_close(gradient, expected, atol=2.0**-22)


def test_gamma_0_and_epsilon_0_give_the_cross_entropy():
    case = problem(0, dtype=np.float32)
    options = {"ignore_index": -1, "reduction": "mean"}
    for smoothing in (0.0, 0.2):
        cross_entropy = jax.value_and_grad(
            lambda x, e=smoothing: jaxreg.smoothed_cross_entropy(x, case.labels, e, **options)
        )(case.logits)
        poly = jax.value_and_grad(
            lambda x, e=smoothing: jaxreg.poly_loss(x, case.labels, 0.0, e, **options)
        )(case.logits)
        chex.assert_trees_all_close(poly, cross_entropy, rtol=1e-6)
    focal = jax.value_and_grad(lambda x: jaxreg.focal_loss(x, case.labels, 0.0, **options))
    plain = jax.value_and_grad(
        lambda x: jaxreg.smoothed_cross_entropy(x, case.labels, 0.0, **options)
    )
    chex.assert_trees_all_close(focal(case.logits), plain(case.logits), rtol=1e-5, atol=1e-7)


def test_class_weights_of_the_focal_loss(x64):
    case, weights = problem(1), np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    found = case.call(LOSSES["focal"], class_weights=weights)
    np.testing.assert_allclose(found, weights[case.labels] * case.expected(LOSSES["focal"]))


@pytest.mark.parametrize("margin", [60.0, 200.0])
def test_a_certain_prediction_has_finite_derivatives(margin):
    """By gamma, too, and the second ones."""
    logits = jnp.array([margin, 0.0])

    def total(x, gamma):
        return jaxreg.focal_loss(x, jnp.array(0), gamma)

    derivatives = jax.jit(lambda *at: (jax.grad(total, (0, 1))(*at), jax.hessian(total)(*at)))
    for gamma in (0.0, 0.5, 1.0, 2.0):
        assert total(logits, gamma) == 0
        chex.assert_tree_all_finite(derivatives(logits, gamma))


def test_a_confident_prediction_keeps_the_digits_of_its_losses():
    """Beside a gradient; alone the cross-entropy is right to the rounding of 1."""
    logits, labels, nll = jnp.array([18.0, 0.0]), jnp.array(0), np.log1p(np.exp(-18.0))
    focal = jax.value_and_grad(lambda x: jaxreg.focal_loss(x, labels, 2.0))(logits)
    poly = jax.value_and_grad(lambda x: jaxreg.poly_loss(x, labels, 1.0))(logits)
    # p = 1 to the eighth digit: the losses are powers of 1 - p.
    p, falls = np.exp(-nll), -np.expm1(-nll)
    slope = 2 * falls * p * nll + falls**2
    np.testing.assert_allclose(focal[0], falls**2 * nll, rtol=1e-6)
    np.testing.assert_allclose(focal[1], [-falls * slope, falls * slope], rtol=1e-6)
    np.testing.assert_allclose(poly[0], nll + falls, rtol=1e-6)
    np.testing.assert_allclose(poly[1], [-falls * (1 + p), falls * (1 + p)], rtol=1e-6)


def test_the_entropy_of_a_confident_prediction_keeps_its_digits():
    logits = jnp.array([20.0, 0.0, -INF])
    value, gradient = jax.value_and_grad(jaxreg.entropy)(logits)
    q = np.exp(-20.0) / (1 + np.exp(-20.0))  # of the other class
    expected = -q * np.log(q) - (1 - q) * np.log1p(-q)
    slope = q * (1 - q) * 20.0
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-slope, slope, 0.0], rtol=1e-5)


def test_symmetric_kl_of_a_prediction_with_itself_is_0_and_stationary():
    logits = problem(0, dtype=np.float32).logits.at[0, 0].set(-INF)
    value, gradients = jax.value_and_grad(
        lambda x, y: jaxreg.symmetric_kl(x, y, reduction="sum"), (0, 1)
    )(logits, logits)
    assert value == 0
    chex.assert_trees_all_equal(gradients, (jnp.zeros((4, 5)),) * 2)


def test_symmetric_kl_is_infinite_where_one_alone_holds_a_class_impossible():
    logits = jnp.array([[0.0, -INF], [0.0, 1.0], [0.0, -INF]])
    other = jnp.array([[0.0, 1.0], [0.0, 1.0], [3.0, -INF]])
    for pair in ((logits, other), (other, logits)):
        np.testing.assert_array_equal(jaxreg.symmetric_kl(*pair), [INF, 0.0, 0.0])


# Two classes --------------------------------------------------------------------------------------


@st.composite
def binary_problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shape, dtype = draw(st.sampled_from([(), (3, 4), (0,)])), draw(st.sampled_from(DTYPES))
    x = jnp.asarray(draw(st.sampled_from([0.1, 5.0, 1e4])) * rng.normal(size=shape), dtype)
    kind = draw(st.sampled_from([bool, np.int32, np.float32]))
    labels = rng.random(shape) if kind is np.float32 else rng.integers(0, 2, shape)
    weights = [None, 2.5, *([rng.random(4)] if shape == (3, 4) else [])]
    counts = rng.random(shape) < 0.7 if draw(st.booleans()) else None
    return (
        x,
        np.asarray(labels, kind),
        draw(st.sampled_from([0.0, 0.3])),
        weights[draw(st.integers(0, len(weights) - 1))],
        counts,
    )


def sigmoid_factors(y, smoothing, weight):
    q = (1 - smoothing) * y.astype(np.float64) + smoothing / 2
    return q * (1.0 if weight is None else np.asarray(weight)), 1 - q


@given(case=binary_problems())
@few
def test_two_classes_agree_with_the_formula(case, x64):
    x, y, smoothing, weight, counts = case
    on, off = sigmoid_factors(y, smoothing, weight)
    wide = np.asarray(x).astype(np.float64)
    expected = on * np.logaddexp(0, -wide) + off * np.logaddexp(0, wide)
    number, given, labels = max(x.size, 1), x, y
    if counts is not None:
        expected, number = np.where(counts, expected, 0), max(counts.sum(), 1)
        given = jnp.where(counts, x, jnp.asarray(NAN, x.dtype))
        # What does not count may hold any label.
        labels = np.where(counts, y, np.asarray(7, y.dtype) if y.dtype != bool else True)
    eps = np.finfo(np.float64 if x.dtype == np.float64 else np.float32).eps
    for reduction in REDUCTIONS:
        found = jaxreg.sigmoid_smoothed_cross_entropy(
            given, labels, smoothing, positive_weight=weight, where=counts, reduction=reduction
        )
        total = expected.sum()
        wanted = {"none": expected, "sum": total, "mean": total / number}[reduction]
        assert found.dtype == (np.float64 if x.dtype == np.float64 else np.float32)
        # Positive terms, so that relative errors stay: a handful of roundings and of those of q.
        np.testing.assert_allclose(found, wanted, rtol=16 * eps)


def test_derivatives_of_two_classes_are_right(x64):
    rng = np.random.default_rng(0)
    x, y = 3 * rng.normal(size=6), rng.random(6)
    counts = np.array([True] * 5 + [False])
    given, labels = jnp.where(counts, x, NAN), jnp.where(counts, y, NAN)

    def total(x, y, e, w):
        return jaxreg.sigmoid_smoothed_cross_entropy(
            x, y, e, positive_weight=w, where=counts, reduction="sum"
        )

    def oracle(values):
        on, off = sigmoid_factors(y, *values)
        return ((on * np.logaddexp(0, -x) + off * np.logaddexp(0, x)) * counts).sum()

    by_x, *by_numbers = jax.jit(jax.grad(total, (0, 2, 3)))(given, labels, 0.2, 2.5)
    (on, off), p = sigmoid_factors(y, 0.2, 2.5), 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(by_x, np.where(counts, off * p - on * (1 - p), 0), atol=1e-14)
    numbers = np.array([0.2, 2.5])
    np.testing.assert_allclose(by_numbers, central(oracle, numbers, STEP), atol=CLOSE)
    hessian = jax.jit(jax.hessian(total))(given, labels, 0.2, 2.5)
    expected = np.diag(np.where(counts, (off + on) * p * (1 - p), 0))
    np.testing.assert_allclose(hessian, expected, atol=1e-14)


def test_an_impossible_binary_class_costs_nothing_unless_it_has_a_share():
    logits = jnp.array([-INF, INF, -INF, INF])

    def losses(x, smoothing=0.0):
        return jaxreg.sigmoid_smoothed_cross_entropy(x, np.array([0, 1, 1, 0]), smoothing)

    np.testing.assert_array_equal(losses(logits), [0.0, 0.0, INF, INF])
    np.testing.assert_array_equal(losses(logits, 0.1), [INF] * 4)
    gradient = jax.grad(lambda x: losses(x).sum())(logits)
    np.testing.assert_array_equal(gradient, [0.0, 0.0, -1.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_agrees_with_optax_where_it_has_the_same(dtype):
    x = jnp.asarray(4 * np.random.default_rng(0).normal(size=20), dtype)
    y = np.arange(20) % 2
    wide, eps = x.astype(jnp.float32), float(jnp.finfo(jnp.float32).eps)
    for smoothing in (0.0, 0.2):
        theirs = optax.sigmoid_binary_cross_entropy(wide, (1 - smoothing) * y + smoothing / 2)
        found = jaxreg.sigmoid_smoothed_cross_entropy(x, y, smoothing)
        np.testing.assert_allclose(found, theirs, rtol=16 * eps)
    pair = jnp.stack([jnp.zeros_like(x), x], -1)  # softmax of (0, x) is sigmoid(x)
    theirs = optax.sigmoid_focal_loss(wide, y.astype(np.float32), gamma=2.0)
    # Theirs takes 1 - p from p, with an absolute error.
    np.testing.assert_allclose(jaxreg.focal_loss(pair, y, 2.0), theirs, rtol=1e-5, atol=8 * eps)


# Bad input ----------------------------------------------------------------------------------------

X, Y = jnp.zeros((2, 3)), jnp.zeros(2, int)
SIGMOID, FOCAL = jaxreg.sigmoid_smoothed_cross_entropy, jaxreg.focal_loss


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SIGMOID(jnp.zeros(2, int), Y), "logits"),
        (lambda: SIGMOID(jnp.zeros(2), jnp.zeros(3)), "labels"),
        (lambda: SIGMOID(jnp.zeros(2), jnp.array([0, 2])), "labels"),
        (lambda: SIGMOID(jnp.zeros(2), jnp.array([0, NAN])), "labels"),
        (lambda: jax.jit(lambda x: SIGMOID(x, np.array([0, 2])))(jnp.zeros(2)), "labels"),
        (lambda: SIGMOID(jnp.zeros(2), Y, 1.0), "smoothing"),
        (lambda: SIGMOID(jnp.zeros(2), Y, positive_weight=-1.0), "positive_weight"),
        (lambda: SIGMOID(jnp.zeros(2), Y, positive_weight=jnp.array([1, NAN])), "positive_weight"),
        (lambda: SIGMOID(jnp.zeros(2), Y, positive_weight=jnp.ones(3)), "positive_weight"),
        (lambda: SIGMOID(jnp.zeros(2), Y, where=jnp.ones(2)), "where"),
        (lambda: SIGMOID(jnp.zeros(2), Y, where=jnp.ones(3, bool)), "where"),
        (lambda: SIGMOID(jnp.zeros(2), Y, reduction="average"), "reduction"),
        (lambda: FOCAL(X, Y, -1.0), "gamma"),
        (lambda: FOCAL(X, Y, NAN), "gamma"),
        (lambda: FOCAL(X, X), "labels"),
        (lambda: FOCAL(X, jnp.zeros(3, int)), "labels"),
        (lambda: FOCAL(X, Y, class_weights=jnp.ones(2)), "class_weights"),
        (lambda: FOCAL(X, Y, class_weights=-jnp.ones(3)), "class_weights"),
        (lambda: FOCAL(X, Y, ignore_index=0.5), "ignore_index"),
        (lambda: FOCAL(X, Y, where=jnp.ones(3)), "where"),
        (lambda: FOCAL(X, Y, axis=2), "axis"),
        (lambda: FOCAL(X, Y, reduction="average"), "reduction"),
        (lambda: FOCAL(X.astype(int), Y), "logits"),
        (lambda: jaxreg.poly_loss(X, Y, -1.5), "epsilon"),
        (lambda: jaxreg.poly_loss(X, Y, INF), "epsilon"),
        (lambda: jaxreg.poly_loss(X, Y, 1.0, 1.0), "smoothing"),
        (lambda: jaxreg.poly_loss(X, X), "labels"),
        (lambda: jaxreg.poly_loss(X, Y, where=jnp.ones(2, bool)), "where"),
        (lambda: jaxreg.poly_loss(X, Y, ignore_index="no"), "ignore_index"),
        (lambda: jaxreg.poly_loss(X, Y, axis=-3), "axis"),
        (lambda: jaxreg.poly_loss(X, Y, reduction=None), "reduction"),
        (lambda: jaxreg.entropy(X.astype(int)), "logits"),
        (lambda: jaxreg.entropy(jnp.zeros(())), "logits"),
        (lambda: jaxreg.entropy(X, where=jnp.ones(3)), "where"),
        (lambda: jaxreg.entropy(X, where=jnp.ones(2, bool)), "where"),
        (lambda: jaxreg.entropy(X, axis=2), "axis"),
        (lambda: jaxreg.entropy(X, axis=0.5), "axis"),
        (lambda: jaxreg.entropy(X, reduction="average"), "reduction"),
        (lambda: jaxreg.confidence_penalty(X, -0.1), "strength"),
        (lambda: jaxreg.confidence_penalty(X, NAN), "strength"),
        (lambda: jaxreg.confidence_penalty(X, lambda count: 0.1), "strength"),
        (lambda: jaxreg.symmetric_kl(X, X[:1]), "other_logits"),
        (lambda: jaxreg.symmetric_kl(X, X.astype(int)), "other_logits"),
        (lambda: jaxreg.symmetric_kl(X.astype(int), X), "logits"),
        (lambda: jaxreg.symmetric_kl(X, X, axis=2), "axis"),
        (lambda: jaxreg.symmetric_kl(X, X, where=jnp.ones(3)), "where"),
        (lambda: jaxreg.symmetric_kl(X, X, reduction="average"), "reduction"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(jaxreg.ArgumentError) as error:
        call()
    assert message(error).startswith(f"{name}: got ")


@pytest.mark.parametrize("loss", [jaxreg.focal_loss, jaxreg.poly_loss])
@pytest.mark.parametrize("wrong", [jnp.zeros((2, 3)), jnp.array([0, 3])])
def test_losses_of_integer_labels_offer_nothing_else(loss, wrong):
    with pytest.raises(jaxreg.ArgumentError) as error:
        loss(jnp.zeros((2, 3)), wrong)
    assert error.value.name == "labels"
    assert "probabilities" not in error.value.accepted


def test_a_traced_binary_label_out_of_range_is_nan():
    found = jax.jit(jaxreg.sigmoid_smoothed_cross_entropy)(jnp.zeros(3), jnp.array([0, 1, -1]))
    assert np.isnan(found).tolist() == [False, False, True]
