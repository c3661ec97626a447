"""Label-smoothed cross-entropy against the formula written out in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxreg

pytestmark = pytest.mark.core
few = settings(max_examples=40, deadline=None)


def oracle(logits, q, smoothing):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    q = (1 - smoothing) * np.asarray(q, np.float64) + smoothing / logits.shape[-1]
    return -(q * log_p).sum(-1)


def problem(seed, rows=5, classes=7, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=(rows, classes)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, classes, rows), jnp.int32)


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


def test_agrees_with_optax_on_one_hot_labels():
    logits, labels = problem(0)
    smoothed = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.1)
    chex.assert_trees_all_close(
        jaxreg.smoothed_cross_entropy(logits, labels, 0.1),
        optax.softmax_cross_entropy(logits, smoothed),
        rtol=1e-5,
    )


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
        ((jnp.zeros((2, 3), int), jnp.zeros(2, int)), "logits: .*int32.*real floating"),
        ((jnp.zeros(()), jnp.zeros((), int)), "logits: got"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxreg.smoothed_cross_entropy(*arguments)
